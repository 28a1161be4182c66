import pytest
import torch

from pipeline.checkpoint.averages import MovingAverage, lerp_fused


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
