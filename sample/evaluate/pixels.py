"""Features that need no network: small pixels, and their principal axes over the reference's images."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sample.evaluate.metrics import FeatureName, Gaussian

LARGEST_SIDE = 32
MOST_AXES = 64


class PixelFeatures(torch.nn.Module):
    """Images uint8 [n, 3, H, W] to float32 [n, 3 · h · w] in [0, 1], h and w at most 32."""

    def forward(self, images: torch.Tensor, wanted: Sequence[FeatureName]) -> dict[FeatureName, torch.Tensor]:
        height, width = (min(side, LARGEST_SIDE) for side in images.shape[-2:])
        pixels = images.float() / 255
        small = functional.adaptive_avg_pool2d(pixels, (height, width))  # means of areas: no fine pattern is left over
        return {name: small.flatten(1) for name in wanted}


def principal_axes(reference: Gaussian) -> NDArray[np.float64]:
    """The axes [width, at most 64] of the largest variance (Pearson 1901), largest first; signs are arbitrary."""
    from scipy import linalg

    width = len(reference.mean)
    kept = (max(0, width - MOST_AXES), width - 1)
    axes: NDArray[np.float64] = linalg.eigh(reference.covariance, subset_by_index=kept)[1]
    return axes[:, ::-1]


def project(gaussian: Gaussian, axes: NDArray[np.float64]) -> Gaussian:
    """The Gaussian of features [width] seen along axes [width, n]."""
    return Gaussian(mean=gaussian.mean @ axes, covariance=axes.T @ gaussian.covariance @ axes)
