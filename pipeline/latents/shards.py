"""Shards: what one stores per sample and where, an open one read by offset, and many ranges of many read at once.

`pread` instead of a memory map: a file that is truncated or vanishes under a map ends the process with SIGBUS;
here it becomes an error that names shard and row.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from pipeline.latents.manifest import DTYPE_BYTES, LatentSpec
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import check_regular

_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
_preadv = os.preadv
_ADVISE = hasattr(os, "posix_fadvise")
_THREADS = 16
_MOST_BUFFERS = 512  # of the kernel's 1024 in one call
_LARGEST_GAP = 4096
"""Two ranges with no more bytes than this between them are read in one call; the gap goes to waste."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowType:
    """What a shard stores per sample beside its label and index."""

    tensor: str
    """`moments` or `latent`."""
    dtype: str
    """`float16`, `bfloat16` or `float32`."""
    shape: tuple[int, int, int, int]
    """[views, values, height, width]."""
    bytes: int
    """Bytes of one sample's tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A field of every sample: row r's begins at byte start + r · stride and takes `bytes`."""

    start: int
    stride: int
    bytes: int


@runtime_checkable
class Rows(Protocol):
    """Where the rows of a shard stand."""

    def row_at(self, offset: int) -> int:
        """The sample that a byte belongs to, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The columns of one shard."""

    latents: Column
    labels: Column
    indices: Column

    def row_at(self, offset: int) -> int:
        """The sample that a byte of the latents belongs to; of any byte, where samples lie whole one after another."""
        first = self.indices if self.indices.stride == self.latents.stride else self.latents
        return max(0, (offset - first.start) // max(1, first.stride))


def row_type(latent: LatentSpec, views: int) -> RowType:
    """What is stored per sample."""
    return row_type_of(latent.tensor, latent.dtype, latent.row_shape(views))


def row_type_of(tensor: str, dtype: str, shape: tuple[int, int, int, int]) -> RowType:
    """What is stored per sample, from the tensor's name, type and shape without the first axis."""
    views, values, height, width = shape
    return RowType(tensor=tensor, dtype=dtype, shape=shape, bytes=views * values * height * width * DTYPE_BYTES[dtype])


class ShardFile:
    """A shard opened for reading; closed when nothing uses it any more, so it can be dropped while others read."""

    def __init__(self, path: Path, *, size: int) -> None:
        """Open the file and compare its size.

        Raises:
            UserError: it is missing, unreadable, or not of that size.
        """
        self.path, self.size = path, size
        self.layout: Rows | None = None
        self.descriptor = -1
        self.can_tell_what_is_cached = bool(_NO_WAIT)
        try:
            check_regular(path)
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            found = os.fstat(self.descriptor).st_size
        except OSError as error:
            raise _unreadable(path, error) from error
        if found != size:
            raise UserError(size_fault(path, found, size))
        if _ADVISE:  # rows are read in any order: no reading ahead beyond them
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.descriptor >= 0:
            close(self.descriptor)

    def read(self, offset: int, length: int) -> bytearray:
        """Exactly these bytes.

        Raises:
            UserError: the file ends before them or cannot be read; names shard and row.
        """
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return data

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from that offset; errors as `read`."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise UserError(f"{self._place(offset)} cannot be read ({error.strerror}); check the disk") from error
            if count == 0:
                raise UserError(
                    f"{self._place(offset)} is cut off: the file ended at byte {offset + done} while it was read; "
                    "restore it, or run the same dit-extract again"
                )
            done += count

    def _place(self, offset: int) -> str:
        return f"{self.path}" if self.layout is None else f"{self.path}, row {self.layout.row_at(offset)},"


Range = tuple[int, memoryview]
"""(offset in the file, the buffer to fill)."""
Run = tuple[ShardFile, int, list[memoryview], int]
"""Consecutive bytes of a shard: (shard, offset, the buffers they go to, how many bytes); plain tuples, for speed."""


def runs_of(file: ShardFile, ranges: Sequence[Range]) -> list[Run]:
    """Runs that cover the ranges, which come sorted by offset; near neighbours are read in one call."""
    runs: list[Run] = []
    first, end = 0, -_LARGEST_GAP - 1
    buffers: list[memoryview] = []
    for offset, buffer in ranges:
        gap = offset - end
        if 0 <= gap <= _LARGEST_GAP and len(buffers) < _MOST_BUFFERS:
            if gap:
                buffers.append(memoryview(bytearray(gap)))  # bytes that nobody wants
            buffers.append(buffer)
        else:
            if buffers:
                runs.append((file, first, buffers, end - first))
            first, buffers = offset, [buffer]
        end = offset + len(buffer)
    if buffers:
        runs.append((file, first, buffers, end - first))
    return runs


def read_runs(runs: Sequence[Run]) -> None:
    """Read them all: first what is in memory, then the rest, many at a time so that the disk has a queue to work on.

    Random rows of 16 KiB from an SSD: one after the other 5,400 samples/s, with `posix_fadvise` alone 11,000, with
    threads 18,000; `benchmarks/loader.py` measures the whole.

    Raises:
        UserError: a shard is cut off or cannot be read; names shard and row.
    """
    waiting = [run for run in runs if not _read_if_cached(run)]
    if len(waiting) < 4:
        for run in waiting:
            _read(run)
        return

    def read_every(start: int) -> None:
        for run in waiting[start::_THREADS]:
            _read(run)

    list(_threads(os.getpid()).map(read_every, range(min(_THREADS, len(waiting)))))


def _read_if_cached(run: Run) -> bool:
    """Read what is in memory already; False if any of it would have to come from the disk."""
    file, offset, buffers, length = run
    if not file.can_tell_what_is_cached:
        return False
    try:
        return _preadv(file.descriptor, buffers, offset, _NO_WAIT) == length
    except BlockingIOError:
        return False
    except OSError:  # a file system in memory or on the network, or trouble that the next read will name
        file.can_tell_what_is_cached = False
        return False


def _read(run: Run) -> None:
    """Read all of it, waiting for the disk; errors as `ShardFile.read`."""
    file, offset, buffers, length = run
    try:
        if _preadv(file.descriptor, buffers, offset) == length:
            return
    except OSError:
        pass  # told by the piecewise reading below, with its row
    for buffer in buffers:
        file.read_into(buffer, offset)
        offset += len(buffer)


@cache
def _threads(_process: int) -> ThreadPoolExecutor:
    """The reading threads of this process; a fork does not take threads along, so it gets its own."""
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="gather")


def size_fault(path: Path | str, found: int, expected: int) -> str:
    """The sentence for a shard whose size is not what the manifest says."""
    what = "is cut off" if found < expected else "is too long"
    return (
        f"{path} {what}: it has {found} bytes, but the manifest says {expected}; "
        "restore it, or run the same dit-extract again"
    )


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} is missing, but the manifest lists it; restore it, or extract again")
    return UserError(f"{path} cannot be opened ({error.strerror}); check its rights and the disk")
