"""Every byte of a store compared with what was written: hashes of shards, seals of records and manifest."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.latents.manifest import Manifest, ShardEntry, is_intact, parse_manifest
from pipeline.latents.names import MANIFEST_FILE, SKIPPED_FILE, format_of, record_of
from pipeline.latents.records import ShardRecord, combine, parse_record, row_checksums, skipped_lines
from pipeline.latents.remote import Folder, open_folder
from pipeline.latents.shards import ShardFile, row_type
from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of

_THREADS = 4


def verify(path: str | Path, cache: str | Path | None = None) -> list[str]:
    """A sentence for everything in the store that is not as it was written; none if it is whole.

    Raises:
        UserError: the store is not there, not finished, or of an unknown version.
    """
    return faults_of(open_folder(path, cache))


def faults_of(folder: Folder) -> list[str]:
    """As `verify`, for a folder that is open."""
    data = folder.manifest_bytes()
    origin = folder.describe(MANIFEST_FILE)
    faults = [] if is_intact(data) else [f"{origin} was changed after it was written (its checksum differs)"]
    manifest = parse_manifest(data, origin, check_seal=False)
    with ThreadPoolExecutor(_THREADS) as threads:
        results = list(threads.map(lambda shard: _check_shard(folder, manifest, shard), manifest.shards))
    records = [record for record, _ in results if record is not None]
    faults += [fault for _, some in results for fault in some]
    if len(records) == len(manifest.shards):
        faults += _totals_faults(folder, manifest, records)
    return faults


def _check_shard(folder: Folder, manifest: Manifest, shard: ShardEntry) -> tuple[ShardRecord | None, list[str]]:
    """(the record without its long lists, what is wrong with the shard and its record)."""
    record, faults = _check_record(folder, shard)
    place = folder.describe(shard.file)
    try:
        path = folder.fetch(shard)
        if folder.is_remote and sha256_of(path) != shard.sha256:  # damaged since it arrived: only the copy is
            warn(f"{path}, the copy of {place}, was damaged and is fetched anew")
            path.unlink()
            path = folder.fetch(shard)
        file = ShardFile(path, size=shard.bytes)
        if sha256_of(path) != shard.sha256:
            faults.append(f"{place} has not the SHA-256 of the manifest{_where(file, manifest, shard, record)}")
    except (UserError, OSError) as error:
        faults.append(str(error))
    return None if record is None else replace(record, keys=(), crc32=()), faults


def _check_record(folder: Folder, shard: ShardEntry) -> tuple[ShardRecord | None, list[str]]:
    name = record_of(shard.file)
    place = folder.describe(name)
    data = folder.small_file(name)
    if data is None:
        return None, [f"{place} is missing: the commit record of {shard.file}"]
    try:
        record = parse_record(data, Path(place))
    except UserError as error:
        return None, [str(error)]
    found = (record.samples, record.bytes, record.sha256)
    if found != (shard.samples, shard.bytes, shard.sha256):
        return record, [f"{place} and the manifest disagree about samples, bytes or SHA-256 of {shard.file}"]
    return record, []


def _where(file: ShardFile, manifest: Manifest, shard: ShardEntry, record: ShardRecord | None) -> str:
    """Which sample is damaged, if the record tells, as a half sentence."""
    if record is None or len(record.crc32) != shard.samples:
        return ""
    module = format_of(manifest.shard_format)
    try:
        layout = module.read_layout(file, shard.samples, row_type(manifest.latent, len(manifest.views)))
    except UserError as error:
        return f" ({error})"
    for row, expected in enumerate(record.crc32):
        try:
            latents, label, index = (
                np.frombuffer(file.read(column.start + row * column.stride, column.bytes), dtype=np.uint8)[None]
                for column in (layout.latents, layout.labels, layout.indices)
            )
            found = row_checksums(latents, module.decode_integers(label), module.decode_integers(index))
        except (ValueError, OverflowError):
            found = []
        if found != [expected]:
            return f": row {row} ({record.keys[row]}) is damaged"
    return ": what is damaged is between the samples"


def _totals_faults(folder: Folder, manifest: Manifest, records: list[ShardRecord]) -> list[str]:
    """What the manifest says of the whole, compared with its parts."""
    faults = []
    if manifest.samples:
        expected = combine(record.sums for record in records)
        found = manifest.statistics
        if not all(np.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected):
            faults.append(f"{folder.describe(MANIFEST_FILE)}: the statistics are not those of the records")
    listed = folder.small_file(SKIPPED_FILE)
    if listed is None:
        faults.append(f"{folder.describe(SKIPPED_FILE)} is missing")
    elif listed != skipped_lines(records):
        faults.append(f"{folder.describe(SKIPPED_FILE)} is not what the records say was skipped")
    return faults
