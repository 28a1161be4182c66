import numpy as np
import pytest
import torch

from pipeline.checkpoint.averages import (
    MovingAverage,
    PowerAverage,
    gamma_of,
    lerp_fused,
    reconstruction_weights,
    sigma_of,
)


def weights(step):
    draws = torch.Generator().manual_seed(step)
    return [torch.randn(3, 4, generator=draws), torch.randn(5, generator=draws)]


@pytest.mark.parametrize("warmup", [False, True])
def test_an_average_is_the_weighted_sum_of_what_it_saw(warmup):
    average = MovingAverage(weights(0), decay=0.9, warmup=warmup)
    expected = [tensor.double() for tensor in weights(0)]
    for step in range(20):
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        expected = [decay * a + (1 - decay) * w for a, w in zip(expected, weights(step + 1), strict=True)]
        average.update(weights(step + 1), step=step)
    for tensor, wanted in zip(average.tensors, expected, strict=True):
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)


def test_an_average_is_float32_and_a_copy():
    source = [torch.ones(2, dtype=torch.bfloat16), torch.ones(2)]
    average = MovingAverage(source, decay=0.5)
    source[1].zero_()
    assert [tensor.dtype for tensor in average.tensors] == [torch.float32] * 2
    assert average.tensors[1].tolist() == [1, 1]


def test_updates_of_trained_weights_keep_no_history():
    live = [weight.requires_grad_() for weight in weights(0)]
    average = MovingAverage(live, decay=0.5)
    for step in range(3):
        average.update(live, step=step)
        average.update(live, step=step, skip=torch.tensor(0.0))
        with average.exchanged_with(live):
            pass
    assert [tensor.grad_fn for tensor in (*average.tensors, *live)] == [None] * 4
    assert not any(tensor.requires_grad for tensor in average.tensors)


def test_a_skipped_step_leaves_it_alone():
    average = MovingAverage(weights(0), decay=0.5)
    average.update(weights(1), step=0, skip=torch.tensor(1.0))
    assert all(torch.equal(a, w) for a, w in zip(average.tensors, weights(0), strict=True))
    average.update(weights(1), step=0, skip=torch.tensor(0.0))
    assert not torch.equal(average.tensors[0], weights(0)[0])


@pytest.mark.parametrize("weight", [1e-4, 0.0123, 0.1, 0.49])
def test_the_fused_update_of_a_gpu_has_the_bits_of_lerp_and_honours_the_skip(weight):
    """The kernel that CUDA takes, run here on the CPU's tensors."""
    plain, fused, live = weights(0), weights(0), weights(1)
    lerp_fused(fused, live, weight, torch.tensor(1.0))
    assert all(torch.equal(a, w) for a, w in zip(fused, weights(0), strict=True))
    torch._foreach_lerp_(plain, live, weight)
    lerp_fused(fused, live, weight, torch.tensor(0.0))
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))
    assert all(torch.equal(a, w) for a, w in zip(live, weights(1), strict=True)), "the weights are only read"
    lerp_fused(fused, live, weight, None)
    torch._foreach_lerp_(plain, live, weight)
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))


def test_an_exchange_is_undone_to_the_bit_even_after_an_error():
    live, average = weights(1), MovingAverage(weights(0), decay=0.5)
    with pytest.raises(RuntimeError, match="boom"), average.exchanged_with(live):
        assert all(torch.equal(a, w) for a, w in zip(live, weights(0), strict=True))
        raise RuntimeError("boom")
    assert all(torch.equal(a, w) for a, w in zip(live, weights(1), strict=True))
    assert all(torch.equal(a, w) for a, w in zip(average.tensors, weights(0), strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_an_average_is_never_exchanged_with_a_part_of_the_weights(count):
    average = MovingAverage(weights(0), decay=0.5)
    with pytest.raises(ValueError, match="zip"), average.exchanged_with((weights(1) * 2)[:count]):
        pytest.fail("a network of two kinds of weights was handed out")


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1, 0.25, 0.2886])
def test_a_relative_width_and_its_exponent_are_inverse(sigma):
    gamma = gamma_of(sigma)
    assert sigma_of(gamma) == pytest.approx(sigma, rel=1e-9)
    times = np.linspace(0, 1, 200_001)[1:]
    density = times**gamma / (times**gamma).sum()
    mean = (density * times).sum()
    assert (density * (times - mean) ** 2).sum() ** 0.5 == pytest.approx(sigma, rel=1e-3)


def test_the_papers_exponents():
    assert (gamma_of(0.05), gamma_of(0.1)) == pytest.approx((16.97, 6.94), abs=0.005)


def test_a_power_average_begins_as_the_first_weights_and_has_the_closed_form_profile():
    average = PowerAverage(weights(99), sigma=0.1)
    average.update(weights(1), step=0)
    assert all(torch.equal(a, w) for a, w in zip(average.tensors, weights(1), strict=True))
    for step in range(1, 30):
        average.update(weights(step + 1), step=step)
    edges = (np.arange(31) / 30) ** (average.gamma + 1)
    for k, tensor in enumerate(average.tensors):
        wanted = sum(share * weights(n + 1)[k].double() for n, share in enumerate(np.diff(edges)))
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_power_average_moves_after_a_skipped_step_too():
    average, other = (PowerAverage(weights(0), sigma=0.1) for _ in range(2))
    for step in range(4):
        average.update(weights(step), step=step, skip=torch.tensor(1.0))
        other.update(weights(step), step=step)
    assert all(torch.equal(a, b) for a, b in zip(average.tensors, other.tensors, strict=True))
    assert not torch.equal(average.tensors[0], weights(0)[0])


def tracked(steps, sigmas):
    """{(step, sigma): average} of weights that wander, as far from where they began as that is from 0."""
    draws = torch.Generator().manual_seed(0)
    live = torch.randn(500, generator=draws)
    averages = [PowerAverage([live], sigma=sigma) for sigma in sigmas]
    found = {}
    for step in range(steps):
        for average in averages:
            average.update([live], step=step)
            found[step + 1, average.sigma] = average.tensors[0].clone()
        live = live + steps**-0.5 * torch.randn(500, generator=draws)
    return found


@pytest.mark.parametrize("sigma", [0.03, 0.05, 0.08, 0.15, 0.2])
def test_an_average_made_afterwards_is_the_one_tracked_directly(sigma):
    steps, errors = 640, []
    found = tracked(steps, {0.05, 0.1, sigma})
    for count in (8, 32):
        keys = [(n, width) for n in range(steps // count, steps + 1, steps // count) for width in (0.05, 0.1)]
        shares = reconstruction_weights(keys, step=steps, sigma=sigma)
        assert sum(shares) == pytest.approx(1)
        made = sum(share * found[key].double() for share, key in zip(shares, keys, strict=True))
        errors.append(float((made - found[steps, sigma]).norm() / found[steps, sigma].norm()))
    assert errors[1] < 1e-3
    assert errors[1] < errors[0] / 10 or errors[0] < 1e-6  # a width that is tracked is taken as it is


def test_half_precision_costs_no_more_than_its_rounding():
    found = tracked(640, (0.05, 0.08, 0.1))
    keys = [(n, width) for n in range(20, 641, 20) for width in (0.05, 0.1)]
    shares = reconstruction_weights(keys, step=640, sigma=0.08)
    made = sum(share * found[key].half().double() for share, key in zip(shares, keys, strict=True))
    assert (made - found[640, 0.08]).norm() / found[640, 0.08].norm() < 3e-4
