"""Exponential moving averages of weights: float32, updated in one fused pass, a function of the step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


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
        if skip is None or skip.device.type == "cpu":
            if skip is None or not skip:
                torch._foreach_lerp_(self.tensors, list(weights), weight)
            return
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
