"""What training makes of an encoder's stored features.

What the network's middle is aligned with (REPA, Yu et al. 2024, arXiv 2410.06940).

After some blocks a small MLP makes of every token what the encoder says of the part of the clean image that the token
stands for; the loss is the mean of −cos between the two, in float32. The targets are read from the store: the features
of the view whose latent is learned, given back from fewer numbers where they were stored so, and brought to the grid of
the network's tokens where the encoder has another one.

And the class token that is denoised along with the latent (REG, Wu et al. 2025, arXiv 2507.01467), each of its numbers
brought to mean 0 and deviation 1.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float16
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:  # handed over open
    from pipeline.features import FeatureStore
    from pipeline.features.pca import Projection

Grid = tuple[int, int]
TOKENS_MEASURED = 4096
"""Samples at the store's start, all views of which say what a class token's numbers are like: a random choice, as the
store is shuffled; of so many the mean is off by a 64th of the deviation."""
LEAST_DEVIATION = 1e-5
"""Of the widest number's: what varies less is rounding, and is not blown up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureTargets:
    """What the tokens of a batch are to be aligned with."""

    store: "FeatureStore"
    projection: "Projection | None"
    """The way back from fewer numbers, on the device."""
    grid: Grid
    """The network's tokens, rows and columns."""

    @classmethod
    def on(cls, device: torch.device, store: "FeatureStore", grid: Grid) -> "FeatureTargets":
        """The targets of a network with that grid of tokens, made on that device."""
        projection = None if store.projection is None else store.projection.to(device)
        return cls(store=store, projection=projection, grid=grid)

    def of(self, stored: Float16[Tensor, "batch patch stored"]) -> Float[Tensor, "batch token feature"]:
        """One target for each token, float32, of features as they are stored."""
        patches = stored.float() if self.projection is None else self.projection.back(stored.float())
        return resampled(patches, self.store.manifest.encoder.grid, self.grid)


def resampled(
    patches: Float[Tensor, "batch patch feature"], grid: Grid, wanted: Grid
) -> Float[Tensor, "batch token feature"]:
    """Features on another grid, which covers the same image: bilinear, smoothed where it is coarser."""
    if grid == wanted:
        return patches
    as_image = patches.mT.unflatten(2, grid)
    other = functional.interpolate(as_image, size=wanted, mode="bilinear", align_corners=False, antialias=True)
    return other.flatten(2).mT


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenNormalization:
    """How a class token is fed: (numbers − mean) / deviation."""

    mean: Float[Tensor, " dim"]
    std: Float[Tensor, " dim"]

    @classmethod
    def measured(cls, store: "FeatureStore") -> "TokenNormalization":
        """By the store's first samples, in float64."""
        count, views = min(TOKENS_MEASURED, store.manifest.samples), store.manifest.columns.views
        rows = np.repeat(np.arange(count, dtype=np.int64), views)
        out = store.room_for(len(rows), columns=["cls"])
        tokens = store.gather(rows, np.tile(np.arange(views, dtype=np.int64), count), out)["cls"].double()
        std = tokens.std(0, correction=0)
        std = torch.where(std > LEAST_DEVIATION * std.max(), std, 1.0)
        return cls(mean=tokens.mean(0).float(), std=std.float())

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint records."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    def to(self, device: torch.device) -> "TokenNormalization":
        """The same on a device."""
        return TokenNormalization(mean=self.mean.to(device), std=self.std.to(device))

    def of(self, stored: Float16[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Class tokens as the network is fed them, float32."""
        return (stored.float() - self.mean) / self.std
