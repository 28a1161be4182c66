"""Open shards of a folder, read by offset: which rows lie where, and which files stay open."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.latents.manifest import ShardEntry
from pipeline.latents.remote import Folder
from pipeline.latents.shards import Rows, ShardFile
from pipeline.runtime.errors import UserError

Indices = int | np.integer[Any] | slice | Sequence[Any] | NDArray[Any] | Tensor
Where = TypeVar("Where", bound=Rows)
THREADS = 16
_MOST_OPEN_SHARDS = 512


class ShardReader(Generic[Where]):
    """Positions in store order → rows of open shards; what lies in a row is the matter of its subclasses.

    It may be used from several threads and survives a fork.
    """

    def __init__(self, folder: Folder, shards: Sequence[ShardEntry]) -> None:
        """Compare every shard's size, where that takes no network.

        Raises:
            UserError: a shard is missing or has not its size.
        """
        self._folder, self._shards = folder, shards
        self._ends = np.cumsum([0, *(shard.samples for shard in shards)], dtype=np.int64)[1:]
        self._layouts: dict[int, Where] = {}
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._most_open = _open_limit()
        self._lock = threading.Lock()
        faults = folder.size_faults(shards)
        if faults:
            more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
            raise UserError("; ".join(faults[:3]) + more)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def close(self) -> None:
        """Close the shards; they are opened again if they are used again."""
        with self._lock:
            self._open.clear()

    def download(self) -> None:
        """Copy every shard of a remote store to the local cache now, several at a time; nothing for a local one."""
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(self._folder.fetch, self._shards))

    def _layout_of(self, shard: int, file: ShardFile) -> Where:
        """Where the rows of an open shard stand."""
        raise NotImplementedError

    def _positions(self, indices: Any) -> NDArray[np.int64]:
        """Positions 0 … N − 1; negative ones count from the end."""
        samples = len(self)
        if isinstance(indices, slice):
            return np.arange(*indices.indices(samples), dtype=np.int64)
        array = np.asarray(indices)
        if array.dtype == np.bool_ and array.shape == (samples,):
            return np.flatnonzero(array)
        if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
            raise TypeError(f"indices are one list of whole numbers, not {array.dtype} of shape {array.shape}")
        array = array.astype(np.int64, copy=False)
        if array.size and (array.min() < -samples or array.max() >= samples):
            raise IndexError(
                f"index {array[(array < -samples) | (array >= samples)][0]} is outside the {samples} samples"
            )
        return np.where(array < 0, array + samples, array) if array.size and array.min() < 0 else array

    def _by_shard(self, rows: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """[(shard, the places in `rows` that lie in it, in the order of the disk)], the shards fetched if need be."""
        order = np.argsort(rows, kind="stable")
        shards = np.searchsorted(self._ends, rows[order], side="right")
        borders = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(rows)]
        groups = [(int(shards[first]), order[first:last]) for first, last in pairwise(borders)]
        self._fetch([shard for shard, _ in groups])
        return groups

    def _local(self, shard: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions within a shard of positions in the store."""
        return rows - (self._ends[shard] - self._shards[shard].samples)

    def _fetch(self, shards: Sequence[int]) -> None:
        """Bring shards of a remote store to the cache, several at a time."""
        absent = [self._shards[shard] for shard in shards if shard not in self._open and self._folder.is_remote]
        if absent:
            with ThreadPoolExecutor(min(THREADS, len(absent))) as threads:
                list(threads.map(self._folder.fetch, absent))

    def _file(self, shard: int) -> tuple[ShardFile, Where]:
        """The open shard and its layout; the shards used longest ago are closed."""
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
        if file is None:
            entry = self._shards[shard]
            file = ShardFile(self._folder.fetch(entry), size=entry.bytes)
            layout = self._layouts.get(shard) or self._layout_of(shard, file)
            file.layout = self._layouts[shard] = layout
            with self._lock:
                self._open[shard] = file
                while len(self._open) > self._most_open:
                    self._open.popitem(last=False)
        return file, self._layouts[shard]


def _open_limit() -> int:
    """How many shards to keep open: a quarter of what the system allows this process, at most 512."""
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN_SHARDS if allowed < 0 else max(16, min(_MOST_OPEN_SHARDS, allowed // 4))
