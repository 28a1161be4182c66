"""Mean and spread of the latents that a store holds, exactly, from sums that any process can make of its shards.

A latent drawn from a sample is z = m + exp(l/2) · ε with m the posterior's mean and l its log-variance, so over all
samples, views and cells of a channel  E[z] = E[m]  and  Var[z] = E[m²] − E[m]² + E[exp l].
The sums are taken in float64 over the *stored*, rounded values, so that anyone can make them again from a shard.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

_LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' clamp
_SAMPLES_AT_ONCE = 32  # part of the definition: it fixes the order in which the sums are taken


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """Sums over samples, views and cells, one per channel."""

    count: int
    """Values per channel."""
    mean: list[float]
    """Σ m"""
    mean_square: list[float]
    """Σ m²"""
    variance: list[float]
    """Σ exp(l), l clamped to [−30, 20]; 0 for points."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sums_of(latents: Shaped[Tensor, "sample view values height width"], kind: str) -> Sums:
    """The sums of a shard's latents, in the dtype they are stored in."""
    samples, views, values, height, width = latents.shape
    channels = values // 2 if kind == "moments" else values
    totals = np.zeros((3, channels))
    for start in range(0, samples, _SAMPLES_AT_ONCE):
        part = latents[start : start + _SAMPLES_AT_ONCE].double().numpy()
        mean = part[:, :, :channels]
        totals[0] += _over_cells(mean)
        totals[1] += _over_cells(mean * mean)
        if kind == "moments":
            totals[2] += _over_cells(np.exp(np.clip(part[:, :, channels:], *_LOGVAR_RANGE)))
    return Sums(
        count=samples * views * height * width,
        mean=totals[0].tolist(),
        mean_square=totals[1].tolist(),
        variance=totals[2].tolist(),
    )


def _over_cells(values: "np.ndarray[Any, np.dtype[np.float64]]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    return np.ascontiguousarray(values).sum(axis=(3, 4)).sum(axis=1).sum(axis=0)


def combine(parts: Iterable[Sums]) -> dict[str, list[float]]:
    """`mean` and `std` per channel over all parts; the same to the bit whatever their order.

    Raises:
        ValueError: there are no values.
    """
    every = list(parts)
    count = sum(part.count for part in every)
    if not count:
        raise ValueError("there are no samples")
    mean = [total / count for total in _totals([part.mean for part in every])]
    square = [total / count for total in _totals([part.mean_square for part in every])]
    variance = [total / count for total in _totals([part.variance for part in every])]
    std = [math.sqrt(max(0.0, s - m * m) + v) for m, s, v in zip(mean, square, variance, strict=True)]
    return {"mean": mean, "std": std}


def _totals(columns: list[list[float]]) -> list[float]:
    return [math.fsum(values) for values in zip(*columns, strict=True)]
