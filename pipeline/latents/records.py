"""Commit records: `train-00000.json` says that its shard is there, what is in it, and what was left out of it."""

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.latents.formats import record_name
from pipeline.latents.manifest import is_plain_name
from pipeline.latents.sealing import is_intact
from pipeline.latents.statistics import Sums

SKIPPED_FILE = "skipped.jsonl"


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


def read_record(folder: Path, split: str, shard: int, *, plan: str | None = None) -> ShardRecord | None:
    """A shard's commit record, or None if the shard is not there (it has no record, or is not of the recorded size).

    Raises:
        UserError: the record is damaged, or the shard belongs to another plan.
    """
    path = folder / record_name(split, shard)
    if not path.exists():
        return None
    record = parse_record(path.read_bytes(), path)
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
    try:
        value = json.loads(data)
        record = ShardRecord(
            file=value["file"],
            samples=int(value["samples"]),
            bytes=int(value["bytes"]),
            sha256=str(value["sha256"]),
            plan=str(value.get("plan", "")),
            sums=Sums(**value["sums"]),
            skipped=tuple((entry["key"], entry["reason"]) for entry in value.get("skipped", ())),
            crc32=tuple(value.get("crc32", ())),
            input_crc32=tuple(value.get("input_crc32", ())),
            keys=tuple(value["keys"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no commit record ({error!r}); {again}") from error
    if not is_plain_name(record.file) or len(record.keys) != record.samples:
        raise UserError(f"{path} is damaged: it contradicts itself; {again}")
    return record


def missing_shards(folder: Path, split: str, shards: int) -> list[int]:
    """The shards that have no commit record yet; one listing of the folder, no file is opened."""
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    return [shard for shard in range(shards) if record_name(split, shard) not in names]


def row_checksums(rows: NDArray[np.uint8], labels: NDArray[np.int64], indices: NDArray[np.int64]) -> list[int]:
    """The CRC-32 of every sample: its latents' bytes, then its label and index as little-endian int64."""
    tails = np.stack([labels, indices], axis=1).astype("<i8").view(np.uint8).reshape(len(labels), 16)
    return [zlib.crc32(tail.data, zlib.crc32(row.data)) for row, tail in zip(rows, tails, strict=True)]


def skipped_lines(records: Iterable[ShardRecord]) -> bytes:
    """The contents of skipped.jsonl: one line per input that was left out, in the order of the shards."""
    entries = ({"key": key, "reason": reason} for record in records for key, reason in record.skipped)
    return "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries).encode()
