import dataclasses
import math

import pytest
import torch

from pipeline.runtime.errors import UserError
from train.optimizer import SCALE_GROWS_AFTER, SCALE_START, Optimizer, learning_rate
from train.options import OptimizerOptions


def make(options=None, *, scaled=False, size=6):
    draws = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, size, generator=draws)) for _ in range(3)]
    return Optimizer(weights, options or OptimizerOptions(), scaled=scaled)


def gradients(step, size=6, factor=1.0):
    draws = torch.Generator().manual_seed(100 + step)
    return [factor * torch.randn(size, size, generator=draws) for _ in range(3)]


def everything(optimizer):
    adam = optimizer.state_tensors()
    tensors = [*optimizer.weights, *adam["exp_avg"], *adam["exp_avg_sq"]]
    return [tensor.detach().clone() for tensor in tensors], optimizer.counters()["adamw_steps"]


def same(one, other):
    return one[1] == other[1] and all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def test_constant_rate_is_the_papers():
    assert {learning_rate(step, OptimizerOptions()) for step in (0, 10, 10**7)} == {1e-4}


def test_a_constant_rate_stays_whatever_decay_steps_says():
    assert {learning_rate(step, OptimizerOptions(decay_steps=10)) for step in (0, 10, 10**7)} == {1e-4}


def test_warm_up_rises_in_a_line_to_the_rate():
    options = OptimizerOptions(lr=0.4, lr_warmup_steps=4)
    assert [learning_rate(step, options) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_cosine_falls_to_its_end_and_stays_there_whatever_the_steps():
    options = OptimizerOptions(lr=1.0, lr_end=0.2, lr_schedule="cosine", decay_steps=100)
    longer = OptimizerOptions(lr=1.0, lr_end=0.2, lr_schedule="cosine", decay_steps=100, steps=10**6)
    assert learning_rate(49, options) == pytest.approx(0.6)
    assert learning_rate(99, options) == learning_rate(10**6, options) == pytest.approx(0.2)
    assert all(learning_rate(step, options) == learning_rate(step, longer) for step in range(200))


def test_inverse_square_root_begins_at_its_decay_steps():
    options = OptimizerOptions(lr=1.0, lr_schedule="inverse-sqrt", decay_steps=100)
    assert learning_rate(99, options) == 1.0
    assert learning_rate(399, options) == pytest.approx(0.5)


def test_linear_falls_in_a_line_from_its_start_to_its_end_and_stays_there():
    options = OptimizerOptions(lr=1.0, lr_end=0.2, lr_schedule="linear", decay_steps=100)
    later = dataclasses.replace(options, decay_start=60)
    assert [learning_rate(step, options) for step in (24, 49, 99, 10**6)] == pytest.approx([0.8, 0.6, 0.2, 0.2])
    assert [learning_rate(step, later) for step in (0, 59, 79, 99, 10**6)] == pytest.approx([1, 1, 0.6, 0.2, 0.2])


def test_wsd_warms_up_stays_and_falls_over_the_last_fifth_or_from_where_it_is_told():
    options = OptimizerOptions(lr=1.0, lr_end=0.1, lr_schedule="wsd", decay_steps=100, lr_warmup_steps=10)
    assert [learning_rate(step, options) for step in (4, 9, 79)] == pytest.approx([0.5, 1.0, 1.0])
    assert [learning_rate(step, options) for step in (84, 99, 10**6)] == pytest.approx([0.1 + 0.9 * 0.5, 0.1, 0.1])
    later = dataclasses.replace(options, decay_start=96)
    assert [learning_rate(step, later) for step in (95, 96, 98)] == pytest.approx(
        [1, 0.55, 0.1 + 0.9 * (1 - 0.75**0.5)]
    )


def test_a_decay_start_is_refused_where_nothing_falls_and_behind_the_end():
    with pytest.raises(UserError, match="--decay-start is for --lr-schedule linear, cosine or wsd, not constant"):
        OptimizerOptions(decay_start=3)
    with pytest.raises(UserError, match="--decay-start 9 must be below --decay-steps 9"):
        OptimizerOptions(lr_schedule="wsd", decay_steps=9, decay_start=9)


def test_a_decaying_schedule_without_its_length_is_refused():
    with pytest.raises(UserError, match="--lr-schedule cosine needs --decay-steps"):
        OptimizerOptions(lr_schedule="cosine")


@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e9])
def test_a_step_is_adamw_after_clipping(clip_norm):
    optimizer = make(OptimizerOptions(lr=1e-2, weight_decay=0.1, clip_norm=clip_norm))
    weights = [torch.nn.Parameter(weight.detach().clone()) for weight in optimizer.weights]
    plain = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    for step in range(5):
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        expected = torch.nn.utils.clip_grad_norm_(weights, clip_norm or math.inf)
        plain.step()
        norm, skip = optimizer.step(gradients(step), 1e-2)
        assert norm == expected and not skip
    for ours, theirs in zip(optimizer.weights, weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(bad):
    optimizer = make(OptimizerOptions(clip_norm=1.0))
    optimizer.step(gradients(0), 1e-2)
    before = everything(optimizer)
    broken = gradients(1)
    broken[1][2, 3] = bad
    _, skip = optimizer.step(broken, 1e-2)
    assert skip and same(everything(optimizer), before)
    assert optimizer.counters()["skipped"] == optimizer.counters()["skipped_in_a_row"] == 1
    optimizer.step(gradients(2), 1e-2)
    assert (optimizer.counters()["skipped"], optimizer.counters()["skipped_in_a_row"]) == (1, 0)
    assert not same(everything(optimizer), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_poisons_every_gradient(bad):
    optimizer = make()
    flat = sum((weight.detach() * weight).sum() for weight in optimizer.weights)
    optimizer.backward(flat + bad, 2)  # the constant has no gradient of its own
    assert all(weight.grad.isnan().all() for weight in optimizer.weights)


def test_the_loss_scale_leaves_the_step_as_it_is():
    plain, scaled = make(OptimizerOptions(clip_norm=0.7)), make(OptimizerOptions(clip_norm=0.7), scaled=True)
    norm, _ = plain.step(gradients(0), 1e-2)
    scaled_norm, _ = scaled.step(gradients(0, factor=SCALE_START), 1e-2)
    assert scaled_norm == norm
    assert same(everything(scaled), everything(plain))


def test_the_loss_scale_halves_on_a_skip_without_counting_it_as_trouble_until_it_is_1():
    optimizer = make(scaled=True)
    broken = gradients(0, factor=math.nan)
    for k in range(1, 17):
        optimizer.step(broken, 1e-2)
        assert optimizer.scale == SCALE_START / 2**k and optimizer.skipped_in_a_row == 0
    optimizer.step(broken, 1e-2)
    assert optimizer.scale == 1 and optimizer.skipped_in_a_row == 1 and optimizer.skipped == 17


def test_the_loss_scale_doubles_after_enough_good_steps():
    optimizer = make(scaled=True, size=1)
    optimizer.finite_in_a_row.fill_(SCALE_GROWS_AFTER - 1)
    optimizer.step(gradients(0, size=1), 1e-2)
    assert optimizer.scale == 2 * SCALE_START and optimizer.finite_in_a_row == 0


def test_counters_and_adams_state_put_back_go_on_with_the_same_bits():
    first = make(scaled=True)
    for step in range(3):
        first.step(gradients(step), 1e-2)
    second = make(scaled=True)
    second.restore_counters(first.counters())
    for name, tensors in second.state_tensors().items():
        for target, source in zip(tensors, first.state_tensors()[name], strict=True):
            target.copy_(source)
    with torch.no_grad():
        for target, source in zip(second.weights, first.weights, strict=True):
            target.copy_(source)
    for step in range(3, 6):
        first.step(gradients(step), 1e-2)
        second.step(gradients(step), 1e-2)
    assert same(everything(first), everything(second))
    assert first.counters() == second.counters()


def test_a_step_moves_by_the_rate_it_is_given_and_not_by_the_options():
    for rate in (0.0, 1e-3, 0.5):
        optimizer = make(OptimizerOptions(lr=1e-2))
        before = [weight.detach().clone() for weight in optimizer.weights]
        optimizer.step(gradients(0), rate)
        for old, new in zip(before, optimizer.weights, strict=True):  # Adam's first step is the rate, whatever the size
            torch.testing.assert_close((old - new).abs(), torch.full_like(old, rate), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_without_the_fused_kernel_the_step_is_the_same_and_bad_ones_are_skipped(monkeypatch, clip_norm):
    options = OptimizerOptions(clip_norm=clip_norm)
    fused = make(options, scaled=True)
    monkeypatch.setattr("train.optimizer.FUSED_ON", set())
    plain = make(options, scaled=True)
    assert (fused.kernel, plain.kernel) == ("fused", "foreach")
    for step, factor in ((0, SCALE_START), (1, math.nan), (2, SCALE_START / 2)):
        for optimizer in (fused, plain):
            optimizer.step(gradients(step, factor=factor), 1e-2)
    assert plain.counters() == fused.counters() and plain.skipped == 1
    for ours, theirs in zip(everything(plain)[0], everything(fused)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
