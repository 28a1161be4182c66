"""How a store comes to be: shards, each with its commit record, and the manifest once all of them are in place.

A shard is the unit of work. It is written under another name, flushed to disk and renamed, then its record likewise;
a shard without its record is not there. So a kill at any moment leaves nothing that looks finished and is not, and any
process may make any shard: the bytes depend on what goes in, not on who writes.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.latents.manifest import (
    FORMAT,
    VERSION,
    LatentSpec,
    Manifest,
    latent_json,
    make_manifest,
    read_manifest,
    sealed,
    write_manifest,
)
from pipeline.latents.names import (
    CARD_FILE,
    MANIFEST_FILE,
    SKIPPED_FILE,
    WORK_FOLDER,
    format_of,
    is_plain_name,
    record_name,
    shard_name,
)
from pipeline.latents.records import (
    ShardRecord,
    combine,
    missing_shards,
    read_record,
    row_checksums,
    skipped_lines,
    sums_of,
)
from pipeline.latents.shards import row_type_of
from pipeline.latents.store_files import card_of
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import (
    make_folder,
    replacing,
    write_bytes,
)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
__all__ = [
    "DTYPES",
    "ShardRecord",
    "StoreDescription",
    "finish_store",
    "missing_shards",
    "read_record",
    "unstorable_rows",
    "write_shard",
]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreDescription:
    """What a manifest says that does not come from the shards."""

    split: str
    shard_format: str
    latent: LatentSpec
    views: Sequence[str]
    image: Mapping[str, Any]
    """`size` in pixels, `crop` "adm-center" or "random-resized"."""
    vae: Mapping[str, Any]
    """`name`, `class`, `sha256`, `scaling_factor`, `shift_factor`."""
    classes: Sequence[str]
    class_ids: Sequence[str]
    seed: int
    plan: str = ""
    """The plan that every record must name."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys for the manifest, as they are."""


def unstorable_rows(latents: Shaped[Tensor, "sample ..."], dtype: str) -> NDArray[np.int64]:
    """The samples with a value that is not finite once it is rounded to the store's dtype (65,504 is float16's end)."""
    finite = torch.isfinite(latents.to(DTYPES[dtype])).flatten(1).all(1)
    return np.flatnonzero(~finite.cpu().numpy())


def write_shard(
    folder: Path,
    split: str,
    shard: int,
    shard_format: str,
    latents: Shaped[Tensor, "sample view values height width"],
    labels: ArrayLike,
    indices: ArrayLike,
    keys: Sequence[str],
    *,
    kind: str = "moments",
    skipped: Sequence[tuple[str, str]] = (),
    plan: str = "",
    input_crc32: Sequence[int] = (),
) -> ShardRecord:
    """Publish a shard and then its commit record; gives the record.

    Args:
        latents: unscaled, on the CPU, in the dtype of the store.
        labels: one per sample, −1 for unlabelled.
        indices: position of each input in the sorted listing.
        keys: relative path of each input.
        skipped: (key, reason) of the inputs that are left out of this shard.
        plan: any text that is the same for all shards of one store and differs for other settings.
        input_crc32: one per sample, of the bytes of its input, or none at all.

    Raises:
        UserError: the disk is full or read-only, or a latent is not finite.
    """
    if not is_plain_name(split):
        raise UserError(f"--split {split!r} cannot begin a file's name; use letters, digits, '-', '_' and '.'")
    labels, indices = np.asarray(labels, dtype=np.int64), np.asarray(indices, dtype=np.int64)
    if not len(latents) == len(labels) == len(indices) == len(keys):
        raise ValueError(f"{len(latents)} latents, {len(labels)} labels, {len(indices)} indices, {len(keys)} keys")
    dtype = _NAMES[latents.dtype]
    _check_finite(latents, keys, dtype)
    row = row_type_of("moments" if kind == "moments" else "latent", dtype, _row_shape(latents))
    rows = latents.contiguous().flatten(1).view(torch.uint8).numpy()
    work = folder / WORK_FOLDER
    make_folder(work)
    name = shard_name(split, shard, shard_format)
    size, sha256 = publish_pieces(folder / name, format_of(shard_format).pieces(rows, labels, indices, row), work)
    record = ShardRecord(
        file=name,
        samples=len(rows),
        bytes=size,
        sha256=sha256,
        plan=plan,
        sums=sums_of(latents, kind),
        skipped=tuple((str(key), str(reason)) for key, reason in skipped),
        crc32=tuple(row_checksums(rows, labels, indices)),
        keys=tuple(keys),
        input_crc32=tuple(input_crc32),
    )
    write_bytes(folder / record_name(split, shard), sealed(record.to_json()), work_folder=work)
    return record


def _row_shape(latents: Tensor) -> tuple[int, int, int, int]:
    _, views, values, height, width = latents.shape
    return views, values, height, width


def _check_finite(latents: Tensor, keys: Sequence[str], dtype: str) -> None:
    bad = unstorable_rows(latents, dtype)
    if len(bad):
        names = ", ".join(keys[row] for row in bad[:3])
        raise UserError(
            f"the latents of {len(bad)} inputs are not finite in {dtype} ({names}{', …' if len(bad) > 3 else ''}); "
            "dit-extract takes --store-dtype bfloat16 or float32, another --encode-dtype, another --vae"
        )


def publish_pieces(path: Path, pieces: Iterable[bytes | memoryview], work: Path) -> tuple[int, str]:
    """Write, flush and rename; (bytes, SHA-256)."""
    digest, size = hashlib.sha256(), 0
    with replacing(path, work_folder=work) as temporary, temporary.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def finish_store(folder: Path, description: StoreDescription, *, shards: int) -> Manifest | None:
    """The manifest, written if all shards are in place; None if some are missing.

    Any process may call it, any number of times; all write the same bytes.

    Raises:
        UserError: a record is damaged or of another plan, no sample is left, or the disk is full.
    """
    if (folder / MANIFEST_FILE).exists():
        manifest = read_manifest(folder)
        if manifest.plan != description.plan:
            raise UserError(
                f"{folder} holds a finished store of other settings or inputs; name another folder, or start anew with "
                f"--overwrite"
            )
        return manifest
    if missing_shards(folder, description.split, shards):
        return None
    records = []
    for shard in range(shards):
        record = read_record(folder, description.split, shard, plan=description.plan)
        if record is None:
            return None
        records.append(record)
    manifest = manifest_of(description, records)
    work = folder / WORK_FOLDER
    make_folder(work)
    write_bytes(folder / SKIPPED_FILE, skipped_lines(records), work_folder=work)
    card = card_of(description.shard_format, description.split)
    if card is not None and not (folder / CARD_FILE).exists():
        write_bytes(folder / CARD_FILE, card, work_folder=work)
    write_manifest(folder, manifest, work_folder=work)
    with suppress(OSError):  # it goes now, unless someone keeps something in it
        work.rmdir()
    return manifest


def manifest_of(description: StoreDescription, records: Sequence[ShardRecord]) -> Manifest:
    """The manifest of a store with these shards.

    Raises:
        UserError: no sample is left.
    """
    samples = sum(record.samples for record in records)
    if not samples:
        raise UserError("not one input could be encoded, so there is no store to finish; see the reasons above")
    values: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "shard_format": description.shard_format,
        "split": description.split,
        "samples": samples,
        "skipped": sum(len(record.skipped) for record in records),
        "classes": list(description.classes),
        "class_ids": list(description.class_ids),
        "image": dict(description.image),
        "views": list(description.views),
        "latent": latent_json(description.latent),
        "vae": dict(description.vae),
        "statistics": combine(record.sums for record in records),
        "seed": description.seed,
        **description.extra,
        "plan": description.plan,
        "shards": [{"file": r.file, "samples": r.samples, "bytes": r.bytes, "sha256": r.sha256} for r in records],
    }
    return make_manifest(values)
