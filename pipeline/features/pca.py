"""Features in fewer numbers: principal directions of a sample of patches (PCA), and the way back.

z = C (x − m) with m the mean and C the K directions of largest variance, orthonormal rows; x̂ = m + Cᵀ z is the nearest
point to x that K numbers can say, and the kept variance is the share of the sample's that its z have.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.features.manifest import Encoder, Reduction
from pipeline.latents.names import PCA_FILE, WORK_FOLDER
from pipeline.latents.remote import Folder
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, write_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """A mean and some directions, float32."""

    mean: Float[Tensor, " width"]
    components: Float[Tensor, "dim width"]

    def forth(self, x: Float[Tensor, "*n width"]) -> Float[Tensor, "*n dim"]:
        """z = C (x − m)."""
        return (x - self.mean) @ self.components.T

    def back(self, z: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n width"]:
        """x̂ = m + Cᵀ z."""
        return self.mean + z @ self.components

    def to(self, device: torch.device) -> "Projection":
        """The same on a device."""
        return Projection(mean=self.mean.to(device), components=self.components.to(device))


class Covariance:
    """Sums over patches from which the directions are found, in float64 and in the order they come."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, x: Float[Tensor, "n width"]) -> None:
        """Count these patches in."""
        values = x.double()
        self.count += len(values)
        self._sum += values.sum(0)
        self._products += values.T @ values

    def principal(self, dim: int) -> tuple[Projection, Float[Tensor, " width"]]:
        """(the projection to `dim` directions, the variance along every direction, falling).

        A direction's sign is that which makes its largest number positive.
        """
        mean = self._sum / self.count
        variances, vectors = torch.linalg.eigh(self._products / self.count - torch.outer(mean, mean))
        components = vectors.T.flip(0)[:dim]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        return Projection(mean=mean.float(), components=(components * largest.sign()).float()), variances.flip(0)


def write_projection(folder: Path, projection: Projection, variances: Tensor, *, images: int) -> Reduction:
    """Publish `pca.safetensors`: `components` [K, D], `images` [1], `mean` [D], `variance` [D].

    Returns:
        What the manifest says of it.
    """
    variances = variances.clamp(min=0)
    tensors = {
        "components": projection.components,
        "images": torch.tensor([images]),
        "mean": projection.mean,
        "variance": variances,
    }
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    make_folder(folder / WORK_FOLDER)
    write_bytes(folder / PCA_FILE, data, work_folder=folder / WORK_FOLDER)
    return describe(data)


def describe(data: bytes) -> Reduction:
    """What the manifest says of a file of directions.

    Raises:
        UserError: it is none.
    """
    projection, variances, images = _parse(data, PCA_FILE)
    kept, whole = float(variances[: len(projection.components)].sum()), float(variances.sum())
    return Reduction(
        file=PCA_FILE,
        sha256=hashlib.sha256(data).hexdigest(),
        components=len(projection.components),
        kept_variance=kept / whole if whole else 1.0,
        images=images,
    )


def read_projection(folder: Folder, recorded: Reduction, encoder: Encoder) -> Projection:
    """The directions that a manifest names.

    Raises:
        UserError: the file is missing or is not that which the manifest names.
    """
    data, place = folder.small_file(recorded.file), folder.describe(recorded.file)
    if data is None or hashlib.sha256(data).hexdigest() != recorded.sha256:
        what = "is missing" if data is None else "has not the SHA-256 of the manifest"
        raise UserError(f"{place} {what}; restore it, or make the features again by dit-extract --add-features")
    projection, _, _ = _parse(data, place)
    if projection.components.shape != (recorded.components, encoder.width):
        raise UserError(f"{place} has {list(projection.components.shape)} directions, not those of the manifest")
    return projection


def _parse(data: bytes, place: str) -> tuple[Projection, Tensor, int]:
    try:
        tensors = load(data)
        projection = Projection(mean=tensors["mean"], components=tensors["components"])
        return projection, tensors["variance"], int(tensors["images"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{place} holds no principal directions ({error}); restore it or make it again") from error
