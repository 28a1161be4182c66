"""NumPy's files that may be a stranger's: what an array's header claims is compared with the bytes that are there.

Nothing is unpickled, and no memory is taken before the comparison.
"""

import math
import os
import tokenize
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline.runtime.gate import check_regular

_MOST_DEFLATED: Final = 1032
"""Bytes that one byte of a deflated stream can stand for at most (zlib's technical details)."""


def check_npy(stream: IO[bytes], held: int) -> None:
    """Read a .npy header and compare it with what follows.

    Args:
        held: bytes of the whole .npy, header included.

    Raises:
        ValueError: it is no .npy of version 1 or 2, holds Python objects, or claims more data than there is.
    """
    start = stream.tell()
    version = npy.read_magic(stream)
    if version not in {(1, 0), (2, 0)}:
        raise ValueError(f"it is in .npy version {version[0]}.{version[1]}, but 1 and 2 are read")
    try:
        shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
    except (tokenize.TokenError, SyntaxError, TypeError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({error})") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    claims, left = math.prod(shape) * dtype.itemsize, held - (stream.tell() - start)
    if min(shape, default=0) < 0 or claims > left:
        raise ValueError(f"its header claims {claims} bytes of data, but it holds {left}")


def load_npy(path: Path) -> NDArray[Any]:
    """The array of a .npy file.

    Raises:
        UserError: it is no regular file.
        OSError, ValueError, EOFError: it cannot be read, or as `check_npy`.
    """
    check_regular(path)
    with path.open("rb") as file:
        check_npy(file, path.stat().st_size)
        file.seek(0)
        return np.asarray(np.load(file, allow_pickle=False))


def check_member(path: Path, name: str) -> None:
    """Compare what array `name` of an .npz claims with its archive.

    Raises:
        UserError: the path is no regular file.
        KeyError: there is no such array.
        OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error: it cannot be read, or as `check_npy`.
    """
    check_regular(path)
    with zipfile.ZipFile(path) as archive, _opened(archive, f"{name}.npy"):
        pass


def load_member(path: Path, name: str) -> NDArray[Any]:
    """Array `name` of an .npz; raises as `check_member`."""
    check_regular(path)
    with zipfile.ZipFile(path) as archive:
        return load_zipped(archive, f"{name}.npy")


def load_zipped(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """The array of the .npy `name` in an open zip; raises as `check_member`."""
    with _opened(archive, name) as stream:
        stream.seek(0)
        return np.asarray(npy.read_array(stream, allow_pickle=False))


@contextmanager
def _opened(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    """A .npy in a zip, its claims compared, as a stream behind its header."""
    entry, name = archive.getinfo(name), name.removesuffix(".npy")
    expands = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _MOST_DEFLATED}.get(entry.compress_type)
    if expands is None:
        raise ValueError(f"{name} is compressed in another way than NumPy does")
    assert archive.fp is not None, "an open archive"
    most = min(entry.compress_size, os.fstat(archive.fp.fileno()).st_size) * expands
    if entry.file_size > most:
        raise ValueError(f"{name} claims {entry.file_size} bytes, but at most {most} can be in its archive")
    with archive.open(entry) as stream:
        try:
            check_npy(stream, entry.file_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        yield stream
