"""Moving averages of weights: float32, updated in one pass, a function of the step.

Exponential ones, and power-function ones, of which any other can be made afterwards (Karras et al. 2023,
arXiv 2312.02696, section 3 and appendix C).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

WIDEST = 12**-0.5
"""What a power function's relative width stays below: it is that of weights counting all the same (gamma 0)."""


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

    @property
    def setting(self) -> float | str:
        """What it is, as a checkpoint's counters record it."""
        return self.decay

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


class PowerAverage(MovingAverage):
    """An average in which the weights of step n count in proportion to n^gamma (arXiv 2312.02696, equations 2 and 10).

    After step n, counted from 1, it moves with the decay (1 - 1/n)^(gamma + 1), so that it begins as w_1. It moves
    after skipped steps too, whose weights are those of before: else decay and profile would no longer fit n.
    """

    def __init__(self, weights: Sequence[Tensor], *, sigma: float) -> None:
        """Take the profile whose standard deviation is `sigma` of the time trained so far."""
        super().__init__(weights, decay=0.0)
        self.sigma, self.gamma = sigma, gamma_of(sigma)

    @property
    def setting(self) -> float | str:
        return f"sigma={self.sigma:g}"

    def decay_at(self, step: int) -> float:
        """The decay of the update that follows step `step`, counted from 0."""
        return float((1 - 1 / (step + 1)) ** (self.gamma + 1))

    def update(self, weights: Sequence[Tensor], *, step: int, skip: Tensor | None = None) -> None:  # noqa: ARG002
        """Move towards the weights, whether the step was skipped or not."""
        super().update(weights, step=step)


def sigma_of(gamma: float) -> float:
    """Standard deviation of the density (gamma + 1) · τ^gamma on 0 … 1 (arXiv 2312.02696, equation 121)."""
    return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


def gamma_of(sigma: float) -> float:
    """The inverse of `sigma_of` for 0 < sigma < 12^-½: the largest real root of its cubic."""
    there = sigma**-2
    roots = np.roots([1, 7, 16 - there, 12 - there])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9 * max(1.0, abs(root))))


def reconstruction_weights(snapshots: Sequence[tuple[int, float]], *, step: int, sigma: float) -> list[float]:
    """How much of each (step, sigma) there must be in the average of width `sigma` at `step`; they add up to 1.

    The combination of the snapshots' profiles that comes closest, in the mean square over time, to the profile wanted
    (arXiv 2312.02696, appendix C.2).
    """
    times = np.array([float(at) for at, _ in snapshots])
    gammas = np.array([gamma_of(width) for _, width in snapshots])
    gamma = gamma_of(sigma)
    gram = _overlap(times[:, None], gammas[:, None], times[None], gammas[None])
    wanted = _overlap(times, gammas, np.full_like(times, step), np.full_like(gammas, gamma))
    scale = np.diag(gram) ** 0.5  # profiles of length 1: those of early snapshots are much longer than others
    solved = np.linalg.lstsq(gram / np.outer(scale, scale), wanted / scale, rcond=1e-13)[0] / scale
    return [float(share) for share in solved / solved.sum()]


def _overlap(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """∫ p_a(τ) p_b(τ) dτ of the densities p(τ) = (gamma + 1) τ^gamma / t^(gamma + 1) on 0 … t, by logarithms."""
    total = gamma_a + gamma_b + 1
    exponent = total * np.log(np.minimum(t_a, t_b)) - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b)
    overlap: np.ndarray = (gamma_a + 1) * (gamma_b + 1) / total * np.exp(exponent)
    return overlap
