"""What lies among images and is never data: hidden names, litter, what --ignore names, and what our commands make.

Every kind of source asks here, for names inside archives as for names on a disk, for folders as for files.
"""

import fnmatch
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.image_names import is_litter
from pipeline.latents.names import FEATURES_FORMAT, MANIFEST_FILE, STORE_FORMAT, WORK_FOLDER

_LARGEST_MANIFEST = 1 << 28
_MADE = {STORE_FORMAT: "latent store", FEATURES_FORMAT: "store of features", "dit-checkpoint": "checkpoint"}
_BEGINNING_OF_RUN = b"# The resolved options of this run"

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
    if is_litter(name):
        return LITTERED
    return IGNORED if any(fnmatch.fnmatch(name, pattern) for pattern in ignored) else None


def rule_against_path(path: str, ignored: tuple[str, ...] = ()) -> str | None:
    """The same for a path inside an archive: the first rule against one of its parts."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return next((rule for part in parts if (rule := rule_against(part, ignored))), None)


def made_here(folder: Path) -> str | None:
    """What a folder is that this project's commands made (a store, finished or not, a run, a checkpoint), or None."""
    if (folder / WORK_FOLDER / "settings.json").is_file():
        return _MADE[STORE_FORMAT]
    told = _format_of(folder / MANIFEST_FILE) or _format_of(folder / "config.json")
    if told in _MADE:
        return _MADE[told]
    if (folder / "config.yaml").is_file() and ((folder / "checkpoints").is_dir() or _is_of_run(folder / "config.yaml")):
        return "training run"
    return None


def _format_of(path: Path) -> str | None:
    """What a JSON file says of its format, or None."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_MANIFEST:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    told = content.get("format") if isinstance(content, dict) else None
    return told if isinstance(told, str) else None


def _is_of_run(path: Path) -> bool:
    """Whether a config.yaml begins as training writes it: a run has one before its first checkpoint."""
    try:
        with path.open("rb") as file:
            return file.readline(200).startswith(_BEGINNING_OF_RUN)
    except OSError:
        return False
