"""Exponential moving averages of weights: float32, updated in one pass, a function of the step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def lerp_fused(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float, skip: Tensor | None) -> None:
    """a ← a + weight · (end − a) in a few kernels for all tensors together, none where `skip` is not 0.

    It is PyTorch's fused step of gradient descent: with the weight decay −1 the gradient is end − a, and the learning
    rate −weight turns the descent into an approach. (`_foreach_lerp_` takes a skip only as one weight per tensor, and
    then starts a kernel for each.) Below 1/2 the bits are those of `lerp`.
    """
    torch._fused_sgd_(
        list(tensors),
        [end.to(tensor.dtype) for tensor, end in zip(tensors, ends, strict=True)],
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=-weight,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
        found_inf=None if skip is None else (skip != 0).float(),
    )


class MovingAverage:
    """An average a of the weights w: a ← a + (1 − d)(w − a) once per step, d the decay.

    With the warm-up, d at step n (counted from 0) is min(decay, (1 + n) / (10 + n)), so that a short run's average
    does not remember the untrained weights. The tensors are those of one process: whole, or its shards.
    """

    def __init__(self, weights: Sequence[Tensor], *, decay: float, warmup: bool = False) -> None:
        self.decay = decay
        self.warmup = warmup
        self.tensors = [weight.detach().to(torch.float32, copy=True) for weight in weights]

    def decay_at(self, step: int) -> float:
        """The decay of the update that follows step `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], *, step: int, skip: Tensor | None = None) -> None:
        """Move towards the weights.

        Args:
            skip: a scalar on the weights' device; where it is not 0 nothing changes, and off the CPU the host does
                not wait to see it.
        """
        weight = 1.0 - self.decay_at(step)
        if self.tensors and self.tensors[0].is_cuda:
            lerp_fused(self.tensors, weights, weight, skip)
        elif skip is None or skip.device.type == "cpu":
            if skip is None or not skip:
                torch._foreach_lerp_(self.tensors, list(weights), weight)
        else:
            moved = weight * (1.0 - skip.float())
            torch._foreach_lerp_(self.tensors, list(weights), [moved] * len(self.tensors))

    @contextmanager
    @torch.no_grad()
    def exchanged_with(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Put the average in the weights' place while the block runs, one tensor's copy of memory at a time."""
        self._exchange(weights)
        try:
            yield
        finally:
            self._exchange(weights)

    @torch.no_grad()
    def _exchange(self, weights: Sequence[Tensor]) -> None:
        for average, weight in zip(self.tensors, weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
