"""What the network's middle is aligned with: an encoder's stored features (REPA, Yu et al. 2024, arXiv 2410.06940).

After some blocks a small MLP makes of every token what the encoder says of the part of the clean image that the token
stands for; the loss is the mean of −cos between the two, in float32. The targets are read from the store: the features
of the view whose latent is learned, given back from fewer numbers where they were stored so, and brought to the grid of
the network's tokens where the encoder has another one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Float16
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:  # handed over open
    from pipeline.features import FeatureStore
    from pipeline.features.pca import Projection

Grid = tuple[int, int]


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
