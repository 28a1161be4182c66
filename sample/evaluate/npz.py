"""Images in an .npz, read batch by batch: 50,000 images of 256 pixels are 10 GB, and need not all be in memory.

Nothing is unpickled: an array of Python objects is refused before its data is looked at.
"""

import hashlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline.runtime.arrays import check_member, load_member
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of
from pipeline.runtime.gate import check_regular
from sample.evaluate.options import PART_IMAGES

_SCAN_IMAGES = 64
# RuntimeError is what zipfile says of encrypted members, KeyError of missing ones, the last four numpy of odd headers
_DAMAGE = (
    *(OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, KeyError),
    *(tokenize.TokenError, SyntaxError, TypeError, struct.error),
)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what a damaged or foreign file raises inside the block into a `UserError` that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path") from error
    except _DAMAGE as error:
        why = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(error)[:300])
        raise UserError(f"{path} is not a readable .npz ({why}); restore it or make it again") from error


def list_arrays(path: Path) -> dict[str, tuple[int, int]]:
    """{array's name: (bytes, CRC-32)} of an .npz, from its directory alone.

    Raises:
        UserError: the file is missing or damaged.
    """
    with readable(path):
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            return {
                entry.filename.removesuffix(".npy"): (entry.file_size, entry.CRC)
                for entry in archive.infolist()
                if entry.filename.endswith(".npy")
            }


def content_key(path: Path) -> str:
    """A digest over names, sizes and checksums of all arrays: other contents give another one, without a full read."""
    return hashlib.sha256(repr(sorted(list_arrays(path).items())).encode()).hexdigest()


def read_array(path: Path, name: str) -> NDArray[np.generic]:
    """One whole array of an .npz.

    Raises:
        UserError: the file or the array is damaged, or holds Python objects.
    """
    with readable(path):
        return load_member(path, name)


class NpzImages:
    """`arr_0` [N, H, W, 3] uint8 of an .npz, plain or compressed, in the order it stands there."""

    kind = "images in an .npz"
    part_size = PART_IMAGES
    sorted_by_name = False

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as (_, shape, dtype):
            pass
        if len(shape) != 4 or shape[-1] != 3 or 0 in shape[1:]:
            raise UserError(f"arr_0 of {path} has the shape {list(shape)}, but images are [N, H, W, 3]; save it so")
        if shape[0] == 0:
            raise UserError(f"arr_0 of {path} holds no images; make the file again")
        if dtype != np.uint8:
            self._refuse(shape, dtype)
        with readable(path):
            check_member(path, "arr_0")
        self.count = shape[0]
        self.size = (shape[2], shape[1])
        self._stream: IO[bytes] | None = None
        self._open_files = ExitStack()
        self._position = 0

    def _refuse(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        """Raise a `UserError` for images that are no bytes; the first one that is not finite is named."""
        with self._opened() as (stream, _, _), readable(self.path):
            for start in range(0, shape[0] if dtype.kind == "f" else 0, _SCAN_IMAGES):
                images = _read_rows(stream, (min(_SCAN_IMAGES, shape[0] - start), *shape[1:]), dtype)
                broken = ~np.isfinite(images).all(axis=(1, 2, 3))
                if broken.any():
                    image = start + int(broken.argmax())
                    raise UserError(f"image {image} of {self.path} is not finite (NaN or infinity); make it again")
        raise UserError(f"arr_0 of {self.path} is {dtype}, but images are uint8 in 0 … 255; convert and save it so")

    @contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[np.generic]]]:
        """Open arr_0 and give its stream behind the header, its shape and its type."""
        with readable(self.path), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
            yield stream, *_read_header(stream, self.path)

    def name_of(self, index: int) -> str:
        return f"image {index} of {self.path}"

    def key(self) -> str:
        """A digest of the file: a resumed read of an uncompressed array skips what its checksum is of."""
        with readable(self.path):
            return sha256_of(self.path)

    def describe(self) -> dict[str, object]:
        return {}

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        """Give images start … stop − 1; quick where the last call ended, as a deflated stream only runs forward."""
        image_bytes = 3 * self.size[0] * self.size[1]
        with readable(self.path):
            stream = self._stream_at(start, image_bytes)
            for at in range(start, stop, batch_size):
                rows = min(batch_size, stop - at)
                images = _read_rows(stream, (rows, self.size[1], self.size[0], 3), np.dtype(np.uint8))
                self._position = at + rows
                yield images.astype(np.uint8, copy=False)
            if stop == self.count:
                stream.read(1)  # the end of the member is where its checksum is compared

    def labels(self) -> NDArray[np.int64] | None:
        """`arr_1`, where there is one.

        Raises:
            UserError: it is damaged, or not one whole number for each image.
        """
        if "arr_1" not in list_arrays(self.path):
            return None
        labels = read_array(self.path, "arr_1")
        if labels.shape != (self.count,) or labels.dtype.kind not in "iu":
            raise UserError(f"arr_1 of {self.path} must be {self.count} whole numbers, one for each image")
        return labels.astype(np.int64)

    def close(self) -> None:
        """Close the file; reading opens it again."""
        self._open_files.close()
        self._stream = None

    def _stream_at(self, start: int, image_bytes: int) -> IO[bytes]:
        if self._stream is None or self._position > start:
            self.close()
            archive = self._open_files.enter_context(zipfile.ZipFile(self.path))
            self._stream = self._open_files.enter_context(archive.open("arr_0.npy"))
            _read_header(self._stream, self.path)
            self._position = 0
        if start > self._position:
            self._stream.seek((start - self._position) * image_bytes, 1)
            self._position = start
        return self._stream


def _read_header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    version = npy.read_magic(stream)
    if version not in {(1, 0), (2, 0)}:
        raise UserError(f"arr_0 of {path} is in .npy version {version[0]}, but 1 and 2 are read; save it with numpy")
    reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = reader(stream)
    if dtype.hasobject:
        raise UserError(f"arr_0 of {path} holds Python objects, which are never loaded; save uint8 images instead")
    if fortran_order:
        raise UserError(f"arr_0 of {path} is in Fortran order, but images are read in C order; save a C-ordered copy")
    return shape, dtype


def _read_rows(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    wanted = int(np.prod(shape)) * dtype.itemsize
    data = bytearray()
    while len(data) < wanted:
        piece = stream.read(wanted - len(data))
        if not piece:
            raise EOFError(f"it ends after {len(data)} of {wanted} bytes")
        data += piece
    return np.frombuffer(data, dtype=dtype).reshape(shape)
