"""Commit records of shards, and the statistics of a whole store from the sums in them.

A record is written after its shard; a shard without its record is not there.

A latent drawn from a sample is z = m + exp(l/2) · ε with m the posterior's mean and l its log-variance, so over all
samples, views and cells of a channel  E[z] = E[m]  and  Var[z] = E[m²] − E[m]² + E[exp l].
The sums are taken in float64 over the *stored*, rounded values, so that anyone can make them again from a shard.
"""

import json
import math
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from pipeline.latents.manifest import is_intact
from pipeline.latents.names import is_plain_name, record_name, recorded_shards
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import Count, Crc32, parse_json, read_regular, typed

_LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' clamp
_SAMPLES_AT_ONCE = 32  # part of the definition: it fixes the order in which the sums are taken


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """Sums over samples, views and cells, one per channel."""

    count: int
    """Values per channel."""
    mean: list[float]
    """Σ m"""
    mean_square: list[float]
    """Σ m²"""
    variance: list[float]
    """Σ exp(l), l clamped to [−30, 20]; 0 for points."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sums_of(latents: Shaped[Tensor, "sample view values height width"], kind: str) -> Sums:
    """The sums of a shard's latents, in the dtype they are stored in."""
    samples, views, values, height, width = latents.shape
    channels = values // 2 if kind == "moments" else values
    totals = np.zeros((3, channels))
    for start in range(0, samples, _SAMPLES_AT_ONCE):
        part = latents[start : start + _SAMPLES_AT_ONCE].double().numpy()
        mean = part[:, :, :channels]
        totals[0] += _over_cells(mean)
        totals[1] += _over_cells(mean * mean)
        if kind == "moments":
            totals[2] += _over_cells(np.exp(np.clip(part[:, :, channels:], *_LOGVAR_RANGE)))
    return Sums(
        count=samples * views * height * width,
        mean=totals[0].tolist(),
        mean_square=totals[1].tolist(),
        variance=totals[2].tolist(),
    )


def _over_cells(values: "np.ndarray[Any, np.dtype[np.float64]]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    return np.ascontiguousarray(values).sum(axis=(3, 4)).sum(axis=1).sum(axis=0)


def combine(parts: Iterable[Sums]) -> dict[str, list[float]]:
    """`mean` and `std` per channel over all parts; the same to the bit whatever their order.

    Raises:
        ValueError: there are no values.
    """
    every = list(parts)
    count = sum(part.count for part in every)
    if not count:
        raise ValueError("there are no samples")
    mean = [total / count for total in _totals([part.mean for part in every])]
    square = [total / count for total in _totals([part.mean_square for part in every])]
    variance = [total / count for total in _totals([part.variance for part in every])]
    std = [math.sqrt(max(0.0, s - m * m) + v) for m, s, v in zip(mean, square, variance, strict=True)]
    return {"mean": mean, "std": std}


def _totals(columns: list[list[float]]) -> list[float]:
    return [math.fsum(values) for values in zip(*columns, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """What `train-00000.json` says about its shard."""

    file: str
    samples: int
    bytes: int
    sha256: str
    plan: str
    """Which plan the shard belongs to; a store is never finished from shards of different plans."""
    sums: Sums
    skipped: tuple[tuple[str, str], ...]
    """(key, reason) of every input that would have been in this shard."""
    crc32: tuple[int, ...]
    """Per sample: of its latents' bytes, then label and index as little-endian int64. Tells which sample is damaged."""
    keys: tuple[str, ...]
    """Relative path of every sample, in order."""
    input_crc32: tuple[int, ...] = ()
    """Per sample: of the bytes of the input that it was made from, where known. Tells the same data from other."""

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "samples": self.samples,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "plan": self.plan,
            "sums": self.sums.to_json(),
            "skipped": [{"key": key, "reason": reason} for key, reason in self.skipped],
            "crc32": list(self.crc32),
            **({"input_crc32": list(self.input_crc32)} if self.input_crc32 else {}),
            "keys": list(self.keys),
        }


class _Skipped(msgspec.Struct, frozen=True):
    key: str
    reason: str


class _RecordFile(msgspec.Struct, frozen=True, kw_only=True):
    """The record as it stands in its file."""

    file: str
    samples: Count
    bytes: Count
    sha256: str
    plan: str = ""
    sums: Sums
    skipped: tuple[_Skipped, ...] = ()
    crc32: tuple[Crc32, ...] = ()
    input_crc32: tuple[Crc32, ...] = ()
    keys: tuple[str, ...]


def read_record(folder: Path, split: str, shard: int, *, plan: str | None = None) -> ShardRecord | None:
    """A shard's commit record, or None if the shard is not there (it has no record, or is not of the recorded size).

    Raises:
        UserError: the record is damaged, or the shard belongs to another plan.
    """
    path = folder / record_name(split, shard)
    if not path.exists():
        return None
    record = parse_record(read_regular(path), path)
    if plan is not None and record.plan != plan:
        raise UserError(
            f"{path} belongs to a store of other settings or inputs; "
            "use the same to continue it, name another folder, or start anew with --overwrite"
        )
    try:
        size = (folder / record.file).stat().st_size
    except FileNotFoundError:
        return None
    return record if size == record.bytes else None


def parse_record(data: bytes, path: Path) -> ShardRecord:
    """The record in a file's bytes.

    Raises:
        UserError: it is damaged.
    """
    again = "remove it and run dit-extract again"
    if not is_intact(data):
        raise UserError(f"{path} was changed after it was written (its checksum differs); {again}")
    file = typed(parse_json(data, path, advice=again), _RecordFile, f"{path} is no commit record", advice=again)
    record = ShardRecord(
        file=file.file,
        samples=file.samples,
        bytes=file.bytes,
        sha256=file.sha256,
        plan=file.plan,
        sums=file.sums,
        skipped=tuple((entry.key, entry.reason) for entry in file.skipped),
        crc32=file.crc32,
        input_crc32=file.input_crc32,
        keys=file.keys,
    )
    sums = (*record.sums.mean, *record.sums.mean_square, *record.sums.variance)
    if not is_plain_name(record.file) or len(record.keys) != record.samples or not all(map(math.isfinite, sums)):
        raise UserError(f"{path} is damaged: it contradicts itself; {again}")
    return record


def missing_shards(folder: Path, split: str, shards: int) -> list[int]:
    """The shards that have no commit record yet; one listing of the folder, no file is opened."""
    done = recorded_shards((entry.name for entry in folder.iterdir()), split) if folder.exists() else set()
    return [shard for shard in range(shards) if shard not in done]


def row_checksums(rows: NDArray[np.uint8], labels: NDArray[np.int64], indices: NDArray[np.int64]) -> list[int]:
    """The CRC-32 of every sample: its latents' bytes, then its label and index as little-endian int64."""
    tails = np.stack([labels, indices], axis=1).astype("<i8").view(np.uint8).reshape(len(labels), 16)
    return [zlib.crc32(tail.data, zlib.crc32(row.data)) for row, tail in zip(rows, tails, strict=True)]


def skipped_lines(records: Iterable[ShardRecord]) -> bytes:
    """The contents of skipped.jsonl: one line per input that was left out, in the order of the shards."""
    entries = ({"key": key, "reason": reason} for record in records for key, reason in record.skipped)
    return "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries).encode()
