"""How features come to be: shards with their commit records, and the manifest once all of them are in place."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Int8
from numpy.typing import NDArray
from torch import Tensor

from pipeline.features.manifest import Columns, FeatureManifest
from pipeline.latents.manifest import ShardEntry, sealed
from pipeline.latents.names import MANIFEST_FILE, WORK_FOLDER, record_name, shard_name
from pipeline.latents.records import ShardRecord, Sums
from pipeline.latents.safetensors_shards import header
from pipeline.latents.writer import publish_pieces
from pipeline.runtime.files import make_folder, write_bytes

_ROWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureRows:
    """The features of a shard's samples."""

    columns: Columns
    values: Float16[Tensor, "sample view values"]
    """Of each view: the patches' numbers one after the other, then the class token's."""
    indices: NDArray[np.int64]
    """Position of each input in the sorted listing, as the store has it."""
    keys: Sequence[str]
    scale: Float[Tensor, " dim"] | None = field(init=False, default=None)
    """Of int8: what a step is of each of a patch's numbers."""

    def __post_init__(self) -> None:
        if self.columns.dtype == "int8":
            largest = [self._patches(rows).abs().flatten(0, 2).amax(0) for rows in self._parts()]
            object.__setattr__(self, "scale", scale_of(torch.stack(largest or [torch.zeros(self.columns.dim)])))

    def _patches(self, rows: slice) -> Float[Tensor, "sample view token dim"]:
        border = self.columns.tokens * self.columns.dim
        return self.values[rows, :, :border].unflatten(2, (self.columns.tokens, self.columns.dim)).float()

    def column(self, name: str, rows: slice) -> NDArray[np.uint8]:
        """The bytes of some rows of a column, [n, bytes]."""
        border = self.columns.tokens * self.columns.dim
        if name == "cls":
            part = self.values[rows, :, border:]
        elif self.scale is None:
            part = self.values[rows, :, :border]
        else:
            part = to_int8(self._patches(rows), self.scale)
        return part.contiguous().flatten(1).view(torch.uint8).numpy()

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The shard's bytes, piece by piece: header, `index`, `cls`, `features`, and of int8 their scale."""
        yield header(self.columns.tensors(len(self.indices)))
        yield self.indices.astype("<i8").tobytes()
        for name in self.columns.widths:
            for rows in self._parts():
                yield np.ascontiguousarray(self.column(name, rows)).data.cast("B")
        if self.scale is not None:
            yield self.scale.numpy().astype("<f4").tobytes()

    def checksums(self) -> list[int]:
        """The CRC-32 of every sample, see `row_checksum`."""
        return [
            row_checksum(row, int(index))
            for rows in self._parts()
            for *row, index in zip(
                *(self.column(name, rows) for name in self.columns.widths), self.indices[rows], strict=True
            )
        ]

    def _parts(self) -> Iterator[slice]:
        return (slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(self.indices), _ROWS_AT_ONCE))


def scale_of(values: Float[Tensor, "*any dim"]) -> Float[Tensor, " dim"]:
    """What a step of int8 is of each number: a 127th of the largest magnitude; 1 where all are 0."""
    largest = values.abs().flatten(0, -2).amax(0)
    return torch.where(largest > 0, largest / 127, torch.ones_like(largest))


def to_int8(values: Float[Tensor, "*any dim"], scale: Float[Tensor, " dim"]) -> Int8[Tensor, "*any dim"]:
    """Numbers of steps, to nearest; times `scale` they are at most half a step off."""
    return (values / scale).round().clamp(-127, 127).to(torch.int8)


def row_checksum(columns: Sequence[NDArray[np.uint8]], index: int) -> int:
    """The CRC-32 of a sample: its columns' bytes in the order of the file, then its index as little-endian int64."""
    checksum = 0
    for data in (*columns, np.array(index, dtype="<i8")):
        checksum = zlib.crc32(np.ascontiguousarray(data).data.cast("B"), checksum)
    return checksum


def write_shard(folder: Path, split: str, shard: int, rows: FeatureRows, *, plan: str) -> ShardRecord:
    """Publish a shard and then its commit record; gives the record.

    Args:
        plan: any text that is the same for all shards of these features and differs for other settings.

    Raises:
        UserError: the disk is full or read-only.
    """
    work = folder / WORK_FOLDER
    make_folder(work)
    name = shard_name(split, shard, "safetensors")
    size, sha256 = publish_pieces(folder / name, rows.pieces(), work)
    record = ShardRecord(
        file=name,
        samples=len(rows.indices),
        bytes=size,
        sha256=sha256,
        plan=plan,
        sums=Sums(count=0, mean=[], mean_square=[], variance=[]),
        skipped=(),
        crc32=tuple(rows.checksums()),
        keys=tuple(rows.keys),
    )
    write_bytes(folder / record_name(split, shard), sealed(record.to_json()), work_folder=work)
    return record


def entries_of(records: Sequence[ShardRecord]) -> tuple[ShardEntry, ...]:
    """The shards as the manifest lists them."""
    return tuple(ShardEntry(file=r.file, samples=r.samples, bytes=r.bytes, sha256=r.sha256) for r in records)


def finish_features(folder: Path, manifest: FeatureManifest) -> None:
    """Write the manifest, once all shards are in place; any process may, all write the same bytes.

    Raises:
        UserError: the disk is full or read-only.
    """
    work = folder / WORK_FOLDER
    make_folder(work)
    write_bytes(folder / MANIFEST_FILE, manifest.to_bytes(), work_folder=work)
    with suppress(OSError):  # it goes now, unless someone keeps something in it
        work.rmdir()
