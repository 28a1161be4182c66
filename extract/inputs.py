"""What there is to encode, and one input on its way to the encoder: bytes → image → the crops that are stored."""

import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from extract import understood
from extract.class_names import class_names
from extract.options import ExtractOptions, PixelOptions
from extract.plan import Plan
from extract.sources.listing import Listing, Source, UnreadableInputError, cached_listing
from pipeline.images import ImageError, center_crop, choose_box, decode_image, random_resized_crop
from pipeline.latents import LatentStore
from pipeline.latents.manifest import Manifest
from pipeline.latents.records import read_record
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What became of one input."""

    crops: NDArray[np.uint8] | None
    """[crops, size, size, 3], or None for an input that has to be left out."""
    bytes_read: int = 0
    checksum: int = 0
    """CRC-32 of the bytes."""
    reason: str = ""
    """Why it is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """Loads inputs by their position in the listing; safe to call from many threads."""

    source: Source
    listing: Listing
    options: PixelOptions
    seed: int

    def __call__(self, index: int) -> Loaded:
        """The input's crops, or the reason why it has none."""
        size = 0
        try:
            data = self.source.read(self.listing, index)
            size = len(data)
            return Loaded(crops=self.crops(data, index), bytes_read=size, checksum=zlib.crc32(data))
        except UnreadableInputError as error:
            return Loaded(crops=None, bytes_read=size, reason=str(error))
        except ImageError as error:
            return Loaded(crops=None, bytes_read=size, reason=error.reason)

    def key(self, index: int) -> str:
        """The input's key, as people and files see it."""
        return self.listing.printable_key(index)

    def crops(self, data: bytes, index: int) -> NDArray[np.uint8]:
        """The crops of an encoded image, [crops, size, size, 3]; a random one depends on (seed, index, its number).

        Raises:
            ImageError: it is no image that can be decoded.
        """
        image = decode_image(data, self.key(index))
        px = self.options.image_size
        if self.options.crop == "adm-center":
            return center_crop(image, px)[None]
        numbers = range(self.options.crop_count)
        boxes = (choose_box(image.width, image.height, self.seed, index, number) for number in numbers)
        return np.stack([random_resized_crop(image, px, box) for box in boxes])


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What there is to encode, and in which order."""

    loader: Loader
    plan: Plan
    classes: tuple[str, ...]
    """Readable names, index = label."""

    @property
    def listing(self) -> Listing:
        return self.loader.listing


def list_inputs(options: ExtractOptions, source: Source, cache: Path | None) -> Inputs:
    """The inputs of a source, and a word about how they were understood.

    Args:
        cache: the file that keeps the listing.
    """
    listing = cached_listing(source, cache)
    classes = class_names(listing.class_ids, options.source.class_names)
    plan = Plan(
        inputs=len(listing),
        seed=options.shards.seed,
        samples_per_shard=options.shards.samples_per_shard,
        limit=options.source.limit,
    )
    for line in understood.lines(source.description, listing, classes):
        say(line)
    loader = Loader(source=source, listing=listing, options=options.pixels, seed=options.shards.seed)
    return Inputs(loader=loader, plan=plan, classes=classes)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreInputs:
    """The images of a finished store's samples, which must be what they were."""

    path: Path
    manifest: Manifest
    loader: Loader
    indices: NDArray[np.int64]
    """Every sample's position in the listing, in store order."""
    _checksums: dict[int, int] = field(default_factory=dict)
    _rows: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    """Of the shards that were looked at; each record is read and compared once."""

    def rows(self, number: int) -> NDArray[np.int64]:
        """The positions in the listing of a shard's samples.

        Raises:
            UserError: the store's record is damaged, or the data has other names at these positions.
        """
        if number in self._rows:
            return self._rows[number]
        end = sum(shard.samples for shard in self.manifest.shards[: number + 1])
        rows = self.indices[end - self.manifest.shards[number].samples : end]
        record = read_record(self.path, self.manifest.split, number)
        if record is None or len(record.input_crc32) != len(rows):
            raise UserError(
                f"{self.path} does not say of its shard {number} which images it was made from, so nothing tells "
                "whether --data holds the same; this needs a store that dit-extract made of images"
            )
        names = [self.loader.key(index) if index < len(self.loader.listing) else "" for index in rows.tolist()]
        if names != list(record.keys):
            other = next(key for name, key in zip(names, record.keys, strict=True) if name != key)
            raise UserError(f"--data is not what {self.path} was made from: {other} is not where it was in the listing")
        self._checksums.update(zip(rows.tolist(), record.input_crc32, strict=True))
        self._rows[number] = rows
        return rows

    def load(self, index: int) -> Loaded:
        """The crops of an input whose shard was asked for.

        Raises:
            UserError: it cannot be read, or is another image than it was.
        """
        loaded = self.loader(index)
        key = self.loader.key(index)
        if loaded.crops is None:
            raise UserError(f"{key} has a latent in {self.path}, but cannot be read now: {loaded.reason}; restore it")
        if loaded.checksum != self._checksums[index]:
            raise UserError(
                f"{key} is not the image that its latent in {self.path} was made from; give the data that the store "
                "was made from, or extract it again"
            )
        return loaded


def check_same_listing(path: str | Path, made_from: str, inputs: Inputs) -> None:
    """Compare the inputs with the fingerprint of the listing that a store was made from.

    Raises:
        UserError: they are others.
    """
    if inputs.listing.sha256 != made_from:
        raise UserError(
            f"--data has not the inputs that {path} was made from (other names, labels or classes); give the same "
            "data with the same flags of how it is read"
        )


def images_of(path: Path, inputs: Inputs, *, image_px: int) -> StoreInputs:
    """The images of a finished store's samples, cropped as the store says, at `image_px` pixels."""
    with LatentStore(path) as store:
        manifest, indices = store.manifest, store.indices().numpy()
    made = manifest.extraction
    pixels = PixelOptions(
        image_size=image_px,
        crop=made["crop"],
        crops=made["crops"] if made["crop"] == "random-resized" else None,
        flip=made["flip"],
    )
    loader = Loader(source=inputs.loader.source, listing=inputs.listing, options=pixels, seed=manifest.seed)
    return StoreInputs(path=path, manifest=manifest, loader=loader, indices=indices)
