"""Checkpoints behind a URL: which of a run are whole there, and copies of one for whoever reads checkpoints.

There a checkpoint counts from the moment its state/files.json is there, which is put last and removed first; one that
dit-convert wrote has none, and counts by the `files` in its config.json.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from pipeline.checkpoint.folder import STATE_FILES, FileRecord, is_inside, recorded_files
from pipeline.latents.remote import cache_folder, fetch_copy
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, write_bytes
from pipeline.runtime.gate import parse_json, typed
from pipeline.runtime.remote_files import UrlFolder, is_url
from pipeline.runtime.units import size

_COUNTS: Final = re.compile(rf"(?:.*/)?step-(\d+)/{STATE_FILES}")
_AVERAGE_RECORD: Final = ".safetensors.json"


def whole_steps(names: Iterable[str]) -> list[int]:
    """The steps of a run's checkpoints that count, by the names of its files, rising."""
    return sorted(int(match[1]) for match in map(_COUNTS.fullmatch, names) if match)


def localized(path: str | Path, *, whole: bool = False, averages: bool = False) -> Path:
    """A path as it is; of a checkpoint behind a URL (of a run its newest) a folder with copies, which are made once.

    Copies lie in the cache that stores have, by the checksums of the checkpoint's files, and are checked on arrival.

    Args:
        path: of a run or a checkpoint, or its URL.
        whole: with what only resuming needs, which is half of it or more.
        averages: with the run's snapshots of averages.

    Raises:
        UserError: there is no whole checkpoint, a file is damaged, or the server cannot be reached.
    """
    if not is_url(path):
        return Path(str(path).removeprefix("file://"))
    far = UrlFolder(str(path))
    below, listing = _found(far)
    run = cache_folder(None) / "checkpoints" / hashlib.sha256(listing).hexdigest()[:32]
    folder = run / "checkpoints" / (below.rpartition("/")[2] or "checkpoint")
    record = STATE_FILES if below or b'"dit-train-state"' in listing else "config.json"
    make_folder((folder / record).parent)
    write_bytes(folder / record, listing)
    files = recorded_files(folder)
    if files is None:
        raise UserError(f"{far.url} holds a checkpoint without checksums; copy it to a disk, and name that")
    wanted = {name: known for name, known in files.items() if whole or not name.startswith("state/")}
    _fetch_all(far, f"{below}/" if below else "", folder, wanted)
    if averages:
        _fetch_averages(far, run)
    return folder


def _found(far: UrlFolder) -> tuple[str, bytes]:
    """(where in the folder the checkpoint is, the contents of the file that lists its files)."""
    config = far.read("config.json")
    if config is not None:
        return "", far.read(STATE_FILES) or config
    steps = {_below(name): step for name in far.names() for step in whole_steps([name])}
    for below in sorted(steps, key=lambda below: -steps[below]):
        listing = far.read(f"{below}/{STATE_FILES}")
        if listing is not None:  # else it has been removed since it was listed
            return below, listing
    raise UserError(
        f"there is no whole checkpoint at {far.url}: neither config.json, nor checkpoints/step-…/{STATE_FILES}; check "
        "the URL, or wait until dit-train --mirror has put one there"
    )


def _below(name: str) -> str:
    return name.removesuffix(f"/{STATE_FILES}")


def _fetch_all(far: UrlFolder, prefix: str, folder: Path, files: dict[str, FileRecord]) -> None:
    missing = {name: known for name, known in files.items() if not (folder / name).exists()}
    if missing:
        say(f"fetching {far.describe(prefix.rstrip('/'))} ({size(sum(known.bytes for known in missing.values()))})")
    for name, known in files.items():
        fetch_copy(far, f"{prefix}{name}", folder / name, size=known.bytes, sha256=known.sha256)


def _fetch_averages(far: UrlFolder, run: Path) -> None:
    """Copies of the run's snapshots of averages, each one's record last."""
    for name in sorted(name for name in far.names("averages") if name.endswith(_AVERAGE_RECORD) and is_inside(name)):
        data = far.read(name)
        if data is None:
            continue
        known = typed(parse_json(data, Path(name)), FileRecord, f"{far.describe(name)} is damaged", advice="restore it")
        weights = name.removesuffix(".json")
        fetch_copy(far, weights, run / weights, size=known.bytes, sha256=known.sha256)
        write_bytes(run / name, data)
