"""A folder of image files, at any depth, as images [N, H, W, 3] in the order of their sorted relative paths."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.image_names import is_litter, named_like_image
from pipeline.images import FORMATS, ImageError, center_crop, decode_image
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of
from pipeline.runtime.gate import MOST_IMAGE_BYTES, check_regular, read_regular
from sample.evaluate.options import PART_IMAGES

_BATCHES_AHEAD = 2


def list_images(folder: Path) -> list[str]:
    """The relative paths of all image files at any depth, sorted; without hidden ones and litter, folders likewise.

    Links are followed, but never back into a folder that they lie in: two such links in one folder would not end.
    """
    found: list[str] = []
    above = {folder: frozenset({os.path.realpath(folder)})}
    for place, folders, names in os.walk(folder, followlinks=True):
        here = above.pop(Path(place))
        inner = {name: os.path.realpath(Path(place, name)) for name in filter(_may_be_data, folders)}
        folders[:] = [name for name, real in inner.items() if real not in here]
        above |= {Path(place, name): here | {inner[name]} for name in folders}
        wanted = (name for name in filter(_may_be_data, names) if named_like_image(name))
        found += [Path(place, name).relative_to(folder).as_posix() for name in wanted]
    return sorted(found)


def _may_be_data(name: str) -> bool:
    return not name.startswith(".") and not is_litter(name)


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """Turn what keeps the file from being read inside the block into a `UserError` that names it; so no file at all."""
    try:
        check_regular(path)
        yield path
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the file and its rights") from error


def _size_in_header(path: Path) -> tuple[int, int] | None:
    """Width and height as they lie in the file; None where the header cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception:  # noqa: BLE001 - decoding says what is wrong, in a sentence
        return None


class FolderImages:
    """Every image file of a folder, centre-cropped to `image_size` pixels, or as it is where all have one size."""

    kind = "folder of images"
    part_size = PART_IMAGES
    sorted_by_name = True

    def __init__(self, folder: Path, *, image_size: int | None, workers: int) -> None:
        self.folder = folder
        self.names = list_images(folder)
        if not self.names:
            raise UserError(
                f"{folder} holds no images, and is no latent store and no run either; "
                f"give a folder with files such as .png or .jpg at any depth"
            )
        self.count = len(self.names)
        self.image_size = image_size
        self.workers = workers
        first = self._read(self.names[0])
        self.size = (first.shape[1], first.shape[0])

    def name_of(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def key(self) -> str:
        """A digest over every file's name and bytes, and over the crop; size and time can stay when a file changes.

        Raises:
            UserError: a file cannot be read, or has another size than the first: now, not when its turn comes.
        """
        digest = hashlib.sha256(repr(self.image_size).encode())
        with ThreadPoolExecutor(self.workers) as pool:
            for name, data in zip(self.names, pool.map(self._sha256_of, range(self.count)), strict=True):
                digest.update(f"{name}\0{data}\0".encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, object]:
        return {"crop": None if self.image_size is None else "adm-center"}

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        """Give images start … stop − 1, decoded by threads that run two batches ahead."""
        waiting: deque[Future[NDArray[np.uint8]]] = deque()
        upcoming = iter(self.names[start:stop])
        with ThreadPoolExecutor(self.workers) as pool:
            for at in range(start, stop, batch_size):
                while len(waiting) < _BATCHES_AHEAD * batch_size and (name := next(upcoming, None)) is not None:
                    waiting.append(pool.submit(self._read, name))
                yield np.stack(
                    [self._checked(waiting.popleft().result(), at + i) for i in range(min(batch_size, stop - at))]
                )

    def labels(self) -> NDArray[np.int64] | None:
        """No label is told by a file's name."""
        return None

    def close(self) -> None:
        """Nothing is open between batches."""

    def _sha256_of(self, index: int) -> str:
        name = self.names[index]
        with _readable(self.folder / name) as path:
            found = sha256_of(path)
        size = _size_in_header(path)
        if size is None or (self.image_size is None and size != self.size):
            self._checked(self._read(name), index)  # says what is wrong; turned upright, it may be right
        return found

    def _read(self, name: str) -> NDArray[np.uint8]:
        try:
            with _readable(self.folder / name) as path:
                image = decode_image(read_regular(path, most=MOST_IMAGE_BYTES), str(path))
        except ImageError as error:
            raise UserError(f"{path} cannot be used: {error}; restore it or take it out of the folder") from error
        return np.asarray(image, dtype=np.uint8) if self.image_size is None else center_crop(image, self.image_size)

    def _checked(self, image: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        found = (image.shape[1], image.shape[0])
        if found != self.size:
            raise UserError(
                f"the images of {self.folder} have different sizes: {self.names[0]} has "
                f"{self.size[0]}×{self.size[1]} pixels, {self.names[index]} has {found[0]}×{found[1]}; "
                f"give --image-size to crop them all alike"
            )
        return image
