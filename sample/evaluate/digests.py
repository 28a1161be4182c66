"""Fingerprints: of settings, and of images whatever file they came from."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
