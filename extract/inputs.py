"""One input on its way to the encoder: bytes → image → the crops whose views are stored."""

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from extract.options import PixelOptions
from extract.sources.listing import Listing, Source, UnreadableInputError
from pipeline.images import ImageError, center_crop, choose_box, decode_image, random_resized_crop


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
