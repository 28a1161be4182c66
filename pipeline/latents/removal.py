"""A store taken away from its folder, and nothing else that lies there.

The manifest goes last: killed at any moment, what is left is still known for a store, and can be removed again.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import explained_writes, read_json
from pipeline.latents.manifest import FORMAT, MANIFEST_FILE
from pipeline.latents.records import SKIPPED_FILE, parse_record

_NUMBERED = re.compile(r"(?P<split>[A-Za-z0-9][A-Za-z0-9._-]*)-(?:\d{5}|[1-9]\d{5,})\.(?:safetensors|tar|json)")


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
    numbered = [(name, match["split"]) for name in names if (match := _NUMBERED.fullmatch(name))]
    for name, begins in numbered:
        if name.endswith(".json") and begins not in splits and _is_record(folder / name):
            splits.add(begins)
    ours = [name for name, begins in numbered if begins in splits]
    shards = [name for name in ours if not name.endswith(".json")]
    records = [name for name in ours if name.endswith(".json")]
    last = [name for name in (SKIPPED_FILE, MANIFEST_FILE) if splits and name in names]
    return [folder / name for name in (*shards, *records, *last)]


def remove_files(files: Iterable[Path]) -> None:
    """Remove what `store_files` gave.

    Raises:
        UserError: there is no permission.
    """
    for file in files:
        with explained_writes(file):
            file.unlink(missing_ok=True)


def _split_of_manifest(path: Path) -> set[str]:
    try:
        manifest = read_json(path)
    except UserError:
        return set()
    is_ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    return {str(manifest["split"])} if is_ours and "split" in manifest else set()


def _is_record(path: Path) -> bool:
    try:
        parse_record(path.read_bytes(), path)
    except (OSError, UserError):
        return False
    return True
