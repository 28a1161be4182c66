"""What lies among images and is never data: litter of file systems and desktops, and what our commands make.

Every kind of source asks here, for names inside archives as for names on a disk, for folders as for files.
"""

import fnmatch
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.latents.manifest import FORMAT
from pipeline.latents.names import MANIFEST_FILE, WORK_FOLDER

LITTER = (
    # macOS, Windows
    "__MACOSX",
    "Icon\r",
    "Network Trash Folder",
    "Temporary Items",
    "Thumbs.db",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "$RECYCLE.BIN",
    "System Volume Information",
    # disks in a network: Synology, QNAP, NetApp
    "@eaDir",
    "@Recycle",
    "@Recently-Snapshot",
    "#recycle",
    "#snapshot",
    "~snapshot",
    # file systems, Python
    "lost+found",
    "__pycache__",
)
"""Names in any case of letters; hidden names (`._*`, `.DS_Store`, `.Trash-1000`) need no entry."""
_FOLDED = frozenset(name.casefold() for name in LITTER)
_LARGEST_MANIFEST = 1 << 28

HIDDEN, LITTERED, IGNORED = "hidden", "litter of file systems and desktops", "by --ignore"


class LeftOut:
    """What was left out, counted by rule, with an example of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, rule: str, name: str) -> None:
        self._counts[rule] += 1
        self._examples.setdefault(rule, name)

    def notes(self) -> Iterator[str]:
        """A line for each rule."""
        for rule, count in sorted(self._counts.items()):
            more = ", …" if count > 1 else ""
            yield f"left out: {count:,} {rule} ({self._examples[rule]}{more})"


def rule_against(name: str, ignored: tuple[str, ...] = ()) -> str | None:
    """Why a file or folder of that name is no data, or None if nothing speaks against it.

    Args:
        name: without the folders above it.
        ignored: the patterns of --ignore.
    """
    if name.startswith("."):
        return HIDDEN
    if name.casefold() in _FOLDED:
        return LITTERED
    return IGNORED if any(fnmatch.fnmatch(name, pattern) for pattern in ignored) else None


def rule_against_path(path: str, ignored: tuple[str, ...] = ()) -> str | None:
    """The same for a path inside an archive: the first rule against one of its parts."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return next((rule for part in parts if (rule := rule_against(part, ignored))), None)


def made_here(folder: Path) -> str | None:
    """What a folder is that this project's commands made (a store, finished or not, or a run), or None."""
    if (folder / WORK_FOLDER / "settings.json").is_file() or _is_manifest(folder / MANIFEST_FILE):
        return "latent store"
    if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
        return "training run"
    return None


def _is_manifest(path: Path) -> bool:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_MANIFEST:
            return False
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
