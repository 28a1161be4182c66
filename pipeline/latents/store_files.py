"""The files of a store in its folder: which are its own, how they go, and how a finished store takes another's place.

While a finished store is replaced, the new one lies ready in `.work/ready`, and changes places with the old one file by
file under a lock. Where a kill interrupted that, the next command for the store, a reader too, completes it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from pipeline.latents.names import (
    CARD_FILE,
    FEATURES_FOLDER,
    FORMATS,
    MANIFEST_FILE,
    PCA_FILE,
    SKIPPED_FILE,
    WORK_FOLDER,
    format_of,
    parse_name,
)
from pipeline.latents.records import parse_record
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes, flush_folder, read_json, remove_folder
from pipeline.runtime.gate import read_regular, typed
from pipeline.runtime.work_queue import exclusive

READY = "ready"
REPLACEMENT_LOCK = "replace.lock"
_LARGEST_CARD = 1 << 16


def store_files(folder: Path, *, split: str | None = None) -> list[Path]:
    """The files of the store in a folder, finished or not, in the order to remove them; none if it holds no store.

    Shards and records are known by the split that their names begin with, and the split by the manifest or by a sound
    commit record, so that files of other programs are not taken for them.

    Args:
        split: one that is known to be the store's.
    """
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir())
    splits = ({split} if split else set()) | _split_of_manifest(folder / MANIFEST_FILE)
    numbered = [(name, found) for name in names if (found := parse_name(name))]
    for name, found in numbered:
        if found.is_record and found.split not in splits and _is_record(folder / name):
            splits.add(found.split)
    ours = [(name, found.is_record) for name, found in numbered if found.split in splits]
    shards = [name for name, is_record in ours if not is_record]
    records = [name for name, is_record in ours if is_record]
    last = [name for name in (PCA_FILE, SKIPPED_FILE, MANIFEST_FILE) if splits and name in names]
    if CARD_FILE in names and _is_card(folder / CARD_FILE, splits):
        last.insert(0, CARD_FILE)
    return [folder / name for name in (*shards, *records, *last)]


def remove_files(files: Iterable[Path]) -> None:
    """Remove what `store_files` gave.

    Raises:
        UserError: there is no permission.
    """
    for file in files:
        with explained_writes(file):
            file.unlink(missing_ok=True)


def replace_store(folder: Path, ready: Path) -> None:
    """Let the finished store in `ready`, a folder on the same disk, take the place of the one in `folder`.

    The old manifest goes first and the new one comes last, so that no manifest ever stands over shards of the other
    store. Called again after a kill, it goes on where it was.

    Raises:
        UserError: there is no permission.
    """
    old = ready / "old"
    with explained_writes(folder):
        if (folder / MANIFEST_FILE).exists() and (ready / MANIFEST_FILE).exists():
            (folder / MANIFEST_FILE).rename(old)
            flush_folder(folder)
        if old.exists():
            split = next(iter(_split_of_manifest(old)), None)
            remove_files(reversed(store_files(folder / FEATURES_FOLDER, split=split)))  # of the old store's samples
            remove_files(store_files(folder, split=split))
            flush_folder(folder)
            old.unlink()
        for path in store_files(ready):  # the manifest comes last
            if path.name == MANIFEST_FILE:
                flush_folder(folder)
            if path.name == CARD_FILE and (folder / CARD_FILE).exists():
                continue  # someone's own
            path.rename(folder / path.name)
        flush_folder(folder)
        remove_folder(ready)


def complete_replacement(folder: Path) -> bool:
    """Let a store that lies ready take the place of the one in the folder; whether there was one.

    Raises:
        UserError: there is no permission.
    """
    ready = folder / WORK_FOLDER / READY
    if not ready.is_dir():
        return False
    with exclusive(folder / WORK_FOLDER / REPLACEMENT_LOCK, needed=False):
        if ready.is_dir():
            replace_store(folder, ready)
    return True


def card_of(shard_format: str, split: str) -> bytes | None:
    """What README.md beside the shards says, or None for a format that has none."""
    written = getattr(format_of(shard_format), "dataset_card", None)
    return None if written is None else bytes(written(split))


def _is_card(path: Path, splits: Iterable[str]) -> bool:
    """Whether a README.md is as it was written here: one that someone has changed is theirs."""
    cards = {card_of(shard_format, split) for split in splits for shard_format in FORMATS}
    return path.is_file() and path.stat().st_size < _LARGEST_CARD and path.read_bytes() in cards


def _split_of_manifest(path: Path) -> set[str]:
    try:
        return {typed(read_json(path), _Ours, "no manifest of ours", advice="").split}
    except UserError:
        return set()


class _Ours(msgspec.Struct, frozen=True):
    """What is asked of a manifest by who only wants to know whose files these are."""

    format: Literal["dit-latents", "dit-features"]
    split: str


def _is_record(path: Path) -> bool:
    try:
        parse_record(read_regular(path), path)
    except (OSError, UserError):
        return False
    return True
