"""A store behind a URL: every process makes its part of the shards on its own disk and puts them there, without locks.

    URL/.work/settings.json   what the store is made of, until it is finished
    URL/train-00000.…         a shard, then its record, each put whole; then both leave the disk here
    URL/manifest.json         put last, by whoever finds all records there: the same bytes

Which shards are missing is what the listing says when a process starts; those of a process that was killed are missing
for the next run of the same command. Shards do not depend on who makes them, so it does no harm where two do.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extract.encoder import arithmetic
from extract.inputs import Inputs, list_inputs
from extract.options import ExtractOptions
from extract.plan import Plan
from extract.run import (
    as_served,
    describe_store,
    fill_missing,
    lane,
    preview,
    settings_of,
    too_many,
    vae_of,
)
from extract.same_data import Begun, begun, check_inputs, differences, shards_to_check
from extract.sources.selection import open_source
from extract.store_folder import OutputFolder
from pipeline.latents.manifest import Manifest, parse_manifest
from pipeline.latents.names import (
    CARD_FILE,
    FEATURES_FOLDER,
    MANIFEST_FILE,
    SKIPPED_FILE,
    parse_name,
    record_name,
    recorded_shards,
    shard_name,
)
from pipeline.latents.records import ShardRecord, parse_record, skipped_lines
from pipeline.latents.remote import cache_folder
from pipeline.latents.store_files import card_of
from pipeline.latents.writer import StoreDescription, manifest_of
from pipeline.runtime.console import say, warn
from pipeline.runtime.devices import choose_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, remove_folder
from pipeline.runtime.gate import parse_json
from pipeline.runtime.launchers import part_of_job, say_unfollowed
from pipeline.runtime.processes import Launch, StopRequest, launch
from pipeline.runtime.remote_files import UrlFolder

_SETTINGS = ".work/settings.json"
_THREADS = 16


class _Mine:
    """The right to make a shard, which nobody else is asked for."""

    def release(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlOutput:
    """The shards of a store behind a URL, for a process that makes a part of them."""

    far: UrlFolder
    split: str
    place: Path
    """Where a shard lies until it is there."""
    part: int
    parts: int
    there: set[int] = field(default_factory=set)
    """Shards whose records were listed, or have been put."""
    shards_on_disk: int = 3
    """One that is encoded, one that is written, one that goes up."""

    @property
    def path(self) -> Path:
        return self.place

    def done(self, shards: range) -> list[int]:
        """Those of the shards that are there, as far as this process knows."""
        return sorted(self.there & set(shards))

    def claim(self, shard: int) -> _Mine | None:
        """The right to make a shard, if it is missing and in this process's part."""
        return _Mine() if shard % self.parts == self.part and shard not in self.there else None

    def publish(self, shard: int, shard_format: str) -> None:
        """Put a shard and then its record, and remove both here.

        Raises:
            UserError: another process has made it of other bytes, or it cannot be put there.
        """
        name, record = shard_name(self.split, shard, shard_format), record_name(self.split, shard)
        made = parse_record((self.place / record).read_bytes(), self.place / record)
        other = self.far.read(record)
        if other is not None and _parsed(other, self.far, record, made.plan).sha256 != made.sha256:
            raise UserError(
                f"{self.far.describe(name)} was put there by another process, with other bytes than were made here; "
                "let machines of one kind, with one version of PyTorch, make a store"
            )
        self.far.put_all({each: self.place / each for each in (name, record)})
        for each in (name, record):
            (self.place / each).unlink()
        self.there.add(shard)


def extract_to_url(options: ExtractOptions, url: str) -> int:
    """Make this process's part of the store behind a URL, and finish it if nothing is missing then; the exit status.

    Raises:
        UserError: something the user can mend.
    """
    place, far, split = launch(), UrlFolder(url), options.source.split
    far.check_writable()
    scratch = cache_folder(None) / "extract" / hashlib.sha256(far.url.encode()).hexdigest()[:16]
    local = OutputFolder(path=scratch, split=split)  # the listing and copies of remote tars, shared on this machine
    part, parts = part_of_job(place)
    with local.occupied():
        source = open_source(options.source, local.remote_copies)
        with local.exclusive("listing"):
            inputs = list_inputs(options, source, local.listing_cache)
        if options.preview is not None and place.is_main:
            preview(options, inputs, place)
        made_in = local.work / f"shards-{os.getpid()}"
        remove_folder(made_in)
        make_folder(made_in)
        try:
            return _make(options, UrlOutput(far=far, split=split, place=made_in, part=part, parts=parts), inputs, place)
        finally:
            remove_folder(made_in)


def _make(options: ExtractOptions, output: UrlOutput, inputs: Inputs, place: Launch) -> int:
    far, split, plan = output.far, output.split, inputs.plan
    settings = settings_of(options, inputs.loader.source, inputs)
    plan_hash = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    # What is there
    names = far.names()
    manifest = _manifest(far)
    _check_settings(far, names, manifest, settings)
    output.there.update(recorded_shards(names, split))
    if manifest is not None:
        lost = _lost(far, manifest, names, split)
        if not lost:
            say(f"{far.url} is already finished; nothing to do")
            return 0
        _reopen(far, manifest, lost, split)
        output.there.difference_update(lost)
    shards = shards_to_check(output.done(range(plan.shards)))
    check_inputs(zip(shards, _records(far, split, shards, plan_hash), strict=True), plan, inputs.loader, far.url)

    # This process's part of what is missing
    say_unfollowed({"precision": "--encode-dtype", "dynamo": "--compile"})
    device, reason = choose_device(options.work.device, place)
    settings |= lane(options, device)
    with arithmetic(device), StopRequest() as stop:
        vae = vae_of(options, device)
        say(f"encoding on {device} ({reason}) in {options.work.encode_dtype}; part {output.part + 1} of {output.parts}")
        _begin(far, settings | as_served(inputs.loader.source))
        fill_missing(options, output, inputs, plan_hash, vae, stop)
    if stop.signal:
        say(f"stopped; {len(output.there)} of {plan.shards} shards are known to be there; run the same command again")
        return stop.exit_status

    # The manifest, if nothing is missing
    missing = set(range(plan.shards)) - output.there - recorded_shards(far.names(), split)
    if missing:
        say(
            f"{len(missing)} of {plan.shards} shards are not there yet: they are other processes' parts, or outside "
            "--shard-range; whichever process finds all of them finishes the store, and the same command again makes "
            "what was left out"
        )
        return 0
    description = describe_store(
        options, settings, plan_hash, vae, classes=inputs.classes, class_ids=inputs.listing.class_ids
    )
    return _finish(far, plan, description, allow_skips=options.work.allow_skips)


def _finish(far: UrlFolder, plan: Plan, description: StoreDescription, *, allow_skips: float) -> int:
    """Put the manifest, unless too many inputs were left out or a shard is not there after all; the exit status."""
    split, sizes = description.split, far.names()
    records = _records(far, split, range(plan.shards), description.plan)
    for shard, record in enumerate(records):
        if sizes.get(record.file, record.bytes) != record.bytes:  # one that is not listed yet may be there
            far.remove(record_name(split, shard))
            raise UserError(
                f"{far.describe(record.file)} has {sizes[record.file]:,} bytes instead of {record.bytes:,}; its record "
                "has been removed, run the same command again to make the shard anew"
            )
    far.put(SKIPPED_FILE, skipped_lines(records))
    skipped = sum(len(record.skipped) for record in records)
    if skipped > allow_skips * plan.samples:
        raise UserError(too_many(plan, records, allow_skips, listed_in=far.describe(SKIPPED_FILE)))
    manifest = manifest_of(description, records)
    card = card_of(description.shard_format, split)
    if card is not None and CARD_FILE not in sizes:  # else it is there already, or someone's own
        far.put(CARD_FILE, card)
    far.put(MANIFEST_FILE, manifest.to_bytes())
    far.remove(_SETTINGS)
    left_out = f"; {skipped} left out, skipped.jsonl says why" if skipped else ""
    say(f"{far.url} is finished: {manifest.samples:,} samples, {plan.shards} shards{left_out}", every_process=True)
    return 0


# ---- what is there


def _manifest(far: UrlFolder) -> Manifest | None:
    data = far.read(MANIFEST_FILE)
    return None if data is None else parse_manifest(data, far.describe(MANIFEST_FILE))


def _check_settings(far: UrlFolder, names: Iterable[str], manifest: Manifest | None, wanted: Mapping[str, Any]) -> None:
    """Raise UserError unless nothing is there, or a store of these settings, finished or not."""
    others = sorted(name for name in names if not _is_ours(name))
    recorded = manifest.extraction if manifest is not None else _recorded(far)
    if others and recorded is None:
        raise UserError(f"--out {far.url} holds other things ({', '.join(others[:3])}); name an empty place")
    found = [] if recorded is None else differences(recorded, wanted)
    if found:
        raise UserError(
            f"{far.url} was begun with other settings ({'; '.join(found)}); use the same to continue it, or "
            "name another --out"
        )


def _is_ours(name: str) -> bool:
    plain = name.removeprefix(f"{FEATURES_FOLDER}/")
    return plain in {MANIFEST_FILE, SKIPPED_FILE, _SETTINGS} or parse_name(plain) is not None


def _recorded(far: UrlFolder) -> Begun | None:
    data, place = far.read(_SETTINGS), Path(far.describe(_SETTINGS))
    return None if data is None else begun(parse_json(data, place), place)


def _begin(far: UrlFolder, settings: Mapping[str, Any]) -> None:
    """Say what the store is made of, or check that another process has said the same meanwhile."""
    _check_settings(far, (), None, settings)
    if far.read(_SETTINGS) is None:
        far.put(_SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())


def _lost(far: UrlFolder, manifest: Manifest, names: Mapping[str, int], split: str) -> list[int]:
    """The shards of a finished store that are gone or not of their size; what is not listed is asked for by name."""
    unsure = [
        (number, shard)
        for number, shard in enumerate(manifest.shards)
        if names.get(shard.file) != shard.bytes or record_name(split, number) not in names
    ]
    return [
        number
        for number, shard in unsure
        if far.size(shard.file) != shard.bytes or far.size(record_name(split, number)) is None
    ]


def _reopen(far: UrlFolder, manifest: Manifest, lost: Sequence[int], split: str) -> None:
    """Make a finished store that has lost shards an unfinished one, which lacks just these."""
    warn(f"{len(lost)} shards of the finished store {far.url} are gone or not of their size; made anew")
    far.put(_SETTINGS, (json.dumps(manifest.extraction, indent=1) + "\n").encode())
    far.remove(MANIFEST_FILE)
    for shard in lost:
        far.remove(record_name(split, shard))


def _records(far: UrlFolder, split: str, shards: Iterable[int], plan: str) -> list[ShardRecord]:
    """The records of shards that are there.

    Raises:
        UserError: one is damaged, of another plan, or gone.
    """

    def read(shard: int) -> ShardRecord:
        name = record_name(split, shard)
        data = far.read(name)
        if data is None:
            raise UserError(f"{far.describe(name)} was listed and is gone; run the same command again")
        return _parsed(data, far, name, plan)

    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(read, shards))


def _parsed(data: bytes, far: UrlFolder, name: str, plan: str) -> ShardRecord:
    record = parse_record(data, Path(far.describe(name)))
    if record.plan != plan:
        raise UserError(
            f"{far.describe(name)} belongs to a store of other settings or inputs; use the same to continue it, or "
            "name another --out"
        )
    return record
