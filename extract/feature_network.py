"""The network that makes stored features of pixels: an encoder, and the directions that its patches are reduced to."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.encoder import Encoder
from extract.inputs import StoreInputs
from extract.options import ExtractOptions
from extract.store_folder import OutputFolder
from pipeline.features.encoder import VisionEncoder
from pipeline.features.manifest import Reduction
from pipeline.features.pca import Covariance, Projection, describe, read_projection, write_projection
from pipeline.latents.names import PCA_FILE
from pipeline.latents.remote import LocalFolder
from pipeline.latents.writer import unstorable_rows
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.threads import read_ahead

PCA_IMAGES = 2048
"""The store's first samples, whose order --seed has shuffled; all patches of so many images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureNetwork:
    """An encoder as the batches see it: pixels of a view in, the numbers that are stored of it out."""

    encoder: VisionEncoder
    projection: Projection | None
    with_patches: bool = True
    """Else of the class token alone."""

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def encode(self, pixels: Tensor) -> Tensor:
        """[n, T · K + D]: the patches' numbers one after the other, then the class token's."""
        patches, cls = self.encoder.tokens(pixels)
        if self.projection is not None:
            patches = self.projection.forth(patches)
        made = [*([patches.flatten(1)] if self.with_patches else []), *([] if cls is None else [cls])]
        return torch.cat(made, dim=1)

    def view_shape(self, _image_px: int) -> tuple[int]:
        rows, columns = self.encoder.about.grid
        about = self.encoder.about
        dim = about.width if self.projection is None else len(self.projection.components)
        dim = dim if self.with_patches else 0
        return (rows * columns * dim + (about.width if self.encoder.has_cls else 0),)

    def compile_encoder(self) -> None:
        self.encoder.model.compile()


def not_storable(encoder: VisionEncoder) -> str:
    """The sentence for features that are not finite in half precision."""
    return (
        f"the encoder {encoder.about.name} gives features that are not finite in half precision; use "
        "--encode-dtype float32, or another encoder"
    )


def projection_of(
    output: OutputFolder, images: StoreInputs, encoder: VisionEncoder, options: ExtractOptions, workers: int
) -> Projection | None:
    """The directions to reduce to: found by whoever comes first, the same whoever that is; None to keep all."""
    dim = options.features_dim
    if not dim:
        return None
    with output.exclusive("pca"):
        place = output.place
        if not (place / PCA_FILE).exists():
            count = min(PCA_IMAGES, len(images.indices))
            say(f"finding the {dim} principal directions of the patches of {count:,} images")
            projection, variances = _principal(images, encoder, options, workers, count).principal(dim)
            kept = write_projection(place, projection, variances, images=count).kept_variance
            say(f"{dim} of {encoder.about.width} directions keep {kept:.1%} of the patches' variance")
        return read_projection(LocalFolder(place), reduction_in(place), encoder.about).to(encoder.device)


def reduction_in(place: Path) -> Reduction:
    """What a manifest says of the directions that were found."""
    return describe((place / PCA_FILE).read_bytes())


def _principal(
    images: StoreInputs, encoder: VisionEncoder, options: ExtractOptions, workers: int, count: int
) -> Covariance:
    """What the patches of the store's first samples, in their first view, add up to."""
    sums, width = Covariance(encoder.about.width), encoder.about.width
    numbers: list[int] = []
    for shard in range(len(images.manifest.shards)):
        if len(numbers) < count:
            numbers += images.rows(shard).tolist()
    with Encoder(
        FeatureNetwork(encoder=encoder, projection=None),
        batch_size=options.work.batch_size,
        flip=False,
        store_dtype=torch.float32,
        views=1,
        image_px=encoder.about.resolution,
    ) as passes:
        patches = encoder.about.grid[0] * encoder.about.grid[1]
        window = 2 * passes.batch_size + workers
        with read_ahead(numbers[:count], images.load, workers=workers, window=window) as loaded:
            batch: list[NDArray[np.uint8]] = []
            for number, (_, one) in enumerate(loaded, 1):
                assert one.crops is not None
                batch.append(one.crops[:1])
                if len(batch) == passes.batch_size or number == count:
                    values = passes.start(batch).result()
                    if len(unstorable_rows(values, "float16")):
                        raise UserError(not_storable(encoder))
                    sums.add(values[:, 0, : patches * width].reshape(-1, width))
                    batch = []
    return sums
