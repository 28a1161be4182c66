"""What every input of images can do, and the fingerprints of images and settings."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class ImageSet(Protocol):
    """Images in a fixed order, made or read when they are asked for."""

    kind: str
    """What they are, for people."""
    count: int
    part_size: int
    """Images in one unit of work."""
    size: tuple[int, int]
    """Width and height in pixels."""
    sorted_by_name: bool
    """Whether neighbours are alike because the order is that of class folders."""

    def name_of(self, index: int) -> str:
        """What a message calls the image."""

    def key(self) -> str:
        """A digest that changes when the images do."""

    def describe(self) -> dict[str, Any]:
        """What the result file says of them beside their kind, count and size."""

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        """Give images start … stop − 1 as uint8 [n, H, W, 3], n at most `batch_size`."""

    def labels(self) -> NDArray[np.int64] | None:
        """The class of every image, below 0 for none; None where nothing says them."""

    def close(self) -> None:
        """Close what is open."""


def names_of(images: ImageSet, first: int, rows: Sequence[int]) -> str:
    """What a message calls some rows of a batch that begins at image `first`: four of them, and how many more."""
    names = ", ".join(images.name_of(first + row) for row in rows[:4])
    return names + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")


def digest_of(value: Any) -> str:
    """The SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def image_digests(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The SHA-256 of each image's height, width and bytes [n, 32]."""
    size = np.asarray(images.shape[1:3], dtype="<i8").tobytes()
    digests = [hashlib.sha256(size + image.tobytes()).digest() for image in images]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)


def pixels_fingerprint(digests: Iterable[NDArray[np.uint8]]) -> str:
    """The SHA-256 over every image's digest, in order: the same images have it however they are stored."""
    total = hashlib.sha256()
    for block in digests:
        total.update(np.ascontiguousarray(block).data)
    return total.hexdigest()
