"""Reading a latent store: any samples, in any order, by one sorted read per batch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from pipeline.latents.manifest import parse_manifest
from pipeline.latents.names import MANIFEST_FILE, format_of
from pipeline.latents.remote import open_folder
from pipeline.latents.shard_reader import THREADS, Indices, ShardReader
from pipeline.latents.shards import Column, Layout, Range, Run, ShardFile, read_runs, row_type, runs_of
from pipeline.latents.writer import DTYPES
from pipeline.runtime.errors import UserError

_NOT_READ = np.iinfo(np.int32).min


class _Unread:
    """Labels of a batch that are read together with the latents beside them."""

    __slots__ = ("data", "places", "rows", "shard")

    def __init__(self, shard: int, places: NDArray[np.int64], rows: NDArray[np.int64], width: int) -> None:
        self.shard, self.places, self.rows = shard, places, rows
        self.data = np.empty((len(rows), width), dtype=np.uint8)


class LatentStore(ShardReader[Layout]):
    """A finished latent store: `len(store)`, `store.manifest`, `store[i]`, `store[indices]`, `store.gather(…)`.

    Samples are read with `pread` at known offsets, whatever the shard format; no latent is kept in memory. Labels that
    were read stay, 4 bytes each: 0.4 GB for 100 million samples. It may be used from several threads and survives a
    fork; pickling it opens it anew.
    """

    def __init__(self, path: str | Path, cache: str | Path | None = None) -> None:
        """Open a folder, or a URL of any kind that fsspec knows, whose shards are copied to a local cache as needed.

        Args:
            path: the store.
            cache: where copies of a remote store's shards go; else DIT_LATENTS_CACHE, else the user's cache folder.

        Raises:
            UserError: the store is not there, not finished, of an unknown version, or a shard has not its size.
        """
        self._arguments = (path, cache)
        self.path = str(path)
        folder = open_folder(path, cache)
        self.manifest = parse_manifest(folder.manifest_bytes(), folder.describe(MANIFEST_FILE))
        super().__init__(folder, self.manifest.shards)
        self._module = format_of(self.manifest.shard_format)
        self._row = row_type(self.manifest.latent, len(self.manifest.views))
        self._dtype = DTYPES[self.manifest.latent.dtype]
        self._labels: dict[int, NDArray[np.int32]] = {}

    def __repr__(self) -> str:
        return f"LatentStore({self.path!r}: {self.manifest!r})"

    def __enter__(self) -> "LatentStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentStore, self._arguments

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """(latents, labels) in store order: [n, V, 2C, H, W] and [n] int64; one integer drops the first axis of both.

        Raises:
            IndexError: an index is outside the store.
            UserError: a shard is damaged or missing; names shard and row.
        """
        if isinstance(indices, int | np.integer):
            latents, labels = self[[int(indices)]]
            return latents[0], labels[0]
        rows = self._positions(indices)
        out = torch.empty((len(rows), *self._row.shape), dtype=self._dtype)
        return out, self._read(rows, np.zeros_like(rows), self._row.bytes, out)

    def gather(
        self,
        indices: Int64[np.ndarray, " n"],
        views: Int64[np.ndarray, " n"] | None = None,
        out: Shaped[Tensor, "n values height width"] | None = None,
    ) -> tuple[Shaped[Tensor, "n values height width"], Int64[Tensor, " n"]]:
        """(latents of one view per sample, labels) in the order asked for, read in the order they lie on the disk.

        Args:
            indices: positions in store order.
            views: the view of each sample; the first one if left out.
            out: a contiguous CPU tensor of the store's dtype to read into (pinned memory, for example).

        Raises:
            IndexError: an index or view is outside the store.
            UserError: a shard is damaged or missing; names shard and row.
        """
        rows = self._positions(indices)
        views = np.zeros_like(rows) if views is None else np.asarray(views, dtype=np.int64)
        shape = self._row.shape
        if views.size and (views.min() < 0 or views.max() >= shape[0]):
            raise IndexError(f"views must lie in 0 … {shape[0] - 1}: the store has {', '.join(self.manifest.views)}")
        if out is None:
            out = torch.empty((len(rows), *shape[1:]), dtype=self._dtype)
        elif out.shape != (len(rows), *shape[1:]) or out.dtype != self._dtype or not out.is_contiguous():
            raise ValueError(
                f"out is {out.dtype} {tuple(out.shape)}, not contiguous {self._dtype} of the store's shape"
            )
        return out, self._read(rows, views, self._row.bytes // shape[0], out)

    def labels(self) -> Int64[Tensor, " samples"]:
        """Every sample's label, in store order; −1 is unlabelled."""
        return torch.from_numpy(self._column("labels"))

    def indices(self) -> Int64[Tensor, " samples"]:
        """Every sample's position in the sorted listing of the inputs, in store order."""
        return torch.from_numpy(self._column("indices"))

    def verify(self) -> None:
        """Raise UserError unless every byte of the store is what was written.

        Raises:
            UserError: a shard, a record or the manifest is damaged; all are named.
        """
        from pipeline.latents.verify import faults_of

        faults = faults_of(self._folder)
        if faults:
            raise UserError(f"{self.path} is damaged: {'; '.join(faults)}; restore what is named, or extract it again")

    def _read(self, rows: NDArray[np.int64], views: NDArray[np.int64], width: int, out: Tensor) -> Tensor:
        """Read `width` bytes of each sample from its view's offset on into `out`; gives the labels."""
        labels = np.empty(len(rows), dtype=np.int64)
        if not len(rows):
            return torch.from_numpy(labels)
        target = out.view(-1).view(torch.uint8).numpy().data
        runs: list[Run] = []
        unread: list[_Unread] = []
        for shard, places in self._by_shard(rows):
            file, layout = self._file(shard)
            local = self._local(shard, rows[places])
            starts = layout.latents.start + local * layout.latents.stride + views[places] * width
            part = [
                (start, target[place * width : (place + 1) * width])
                for start, place in zip(starts.tolist(), places.tolist(), strict=True)
            ]
            known = self._known_labels(shard, file, layout)[local]
            labels[places] = known
            gaps = np.flatnonzero(known == _NOT_READ)
            if len(gaps):
                unread.append(_Unread(shard, places[gaps], local[gaps], layout.labels.bytes))
                part += _column_ranges(layout.labels, local[gaps], unread[-1].data)
                part.sort(key=itemgetter(0))
            runs += runs_of(file, part)
        read_runs(runs)
        for some in unread:
            labels[some.places] = self._labels[some.shard][some.rows] = _narrow(self._decode(some.shard, some.data))
        return torch.from_numpy(labels)

    def _layout_of(self, shard: int, file: ShardFile) -> Layout:
        layout: Layout = self._module.read_layout(file, self._shards[shard].samples, self._row)
        return layout

    def _known_labels(self, shard: int, file: ShardFile, layout: Layout) -> NDArray[np.int32]:
        """A shard's labels; where they stand beside the latents, those that were read already."""
        labels = self._labels.get(shard)
        if labels is None:
            samples = self._shards[shard].samples
            labels = np.full(samples, _NOT_READ, dtype=np.int32)
            if _stands_alone(layout.labels):
                labels[:] = _narrow(self._integers(shard, file, layout.labels))
            self._labels[shard] = labels
        return labels

    def _decode(self, shard: int, data: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Labels or indices from their bytes.

        Raises:
            UserError: they are no numbers; names the shard.
        """
        try:
            values: NDArray[np.int64] = self._module.decode_integers(data)
        except (ValueError, OverflowError) as error:
            name = self._folder.describe(self._shards[shard].file)
            raise UserError(
                f"{name} holds a label that is no number; it is damaged, restore it or extract again"
            ) from error
        return values

    def _column(self, name: str) -> NDArray[np.int64]:
        """A field of every sample; shards are read side by side, for the sake of slow disks and networks."""
        values = np.empty(len(self), dtype=np.int64)

        def fill(shard: int) -> None:
            file, layout = self._file(shard)
            samples, end = self._shards[shard].samples, self._ends[shard]
            values[end - samples : end] = self._integers(shard, file, getattr(layout, name))

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(fill, [number for number, shard in enumerate(self._shards) if shard.samples]))
        return values

    def _integers(self, shard: int, file: ShardFile, column: Column) -> NDArray[np.int64]:
        """A whole column of one shard."""
        samples = self._shards[shard].samples
        data = np.empty((samples, column.bytes), dtype=np.uint8)
        if _stands_alone(column):
            file.read_into(data.reshape(-1).data, column.start)
        else:
            read_runs(runs_of(file, _column_ranges(column, np.arange(samples), data)))
        return self._decode(shard, data)


def _narrow(labels: NDArray[np.int64]) -> NDArray[np.int32]:
    """Labels in half the memory; one that does not fit is damaged, and must not become one that looks right."""
    return np.clip(labels, -1 << 30, 1 << 30).astype(np.int32)


def _stands_alone(column: Column) -> bool:
    """Whether the column's rows follow one another without anything between."""
    return column.stride == column.bytes


def _column_ranges(column: Column, rows: NDArray[np.int64], data: NDArray[np.uint8]) -> list[Range]:
    flat = data.reshape(-1).data
    width = column.bytes
    return [
        (column.start + row * column.stride, flat[place * width : (place + 1) * width])
        for place, row in enumerate(rows.tolist())
    ]
