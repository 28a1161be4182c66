"""Images as files in folders: one folder per class at any depth, or one flat folder without labels.

Files are told apart by content, not by name: every file that is not hidden is an input, and one that turns out not to
be an image is left out with its reason. Nothing is opened or looked at while listing, folders excepted.
"""

import fnmatch
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.sources.imagenet import hash_of_labels, listed_labels
from extract.sources.listing import UNLABELLED, Listing, MtimeSize, UnreadableInputError, printable, sorted_listing
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError

_IGNORED_NAMES = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # what Windows and macOS leave behind
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
_LARGEST_INPUT = 1 << 30
_TELL_EVERY = 200_000
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_GONE = (FileNotFoundError, NotADirectoryError)
_REFUSED = (PermissionError, IsADirectoryError)


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource:
    """A folder of class folders, or a flat folder."""

    root: Path
    ignored: tuple[str, ...] = ()
    """Patterns of file names to leave out."""
    label_of: Mapping[str, int] | None = None
    """Labels by file stem, for a flat folder that is labelled by a list (ImageNet's validation images)."""
    label_ids: tuple[str, ...] = ()
    """Class ids of `label_of`."""
    left_out: Path | None = None
    """A folder that is no part of the data: the store, where it is made within the data's folder."""

    @property
    def description(self) -> str:
        return f"folder {self.root}"

    @property
    def is_remote(self) -> bool:
        return False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    @property
    def as_served(self) -> None:
        return None

    @property
    def identity(self) -> str:
        labels = hash_of_labels(self.label_of) if self.label_of is not None else ""
        return "\n".join(["folder", str(self.root.absolute()), *self.ignored, labels])

    def inputs(self) -> Listing:
        mtime_sizes: list[MtimeSize] = []
        keys: list[str] = []
        classes: list[str] = []
        beside: list[str] = []
        for count, key in enumerate(walk(self.root, mtime_sizes, classes, left_out=self.left_out), 1):
            if not any(fnmatch.fnmatch(key.rpartition("/")[2], pattern) for pattern in self.ignored):
                (keys if "/" in key else beside).append(key)
            if count % _TELL_EVERY == 0:
                say(f"listing {self.root}: {count:,} files so far")
        if not keys and not beside:
            raise UserError(f"{self.root} holds no files; --data must name a folder with images in it")
        if self.label_of is not None:
            return self._labelled_by_list(keys + beside, mtime_sizes)
        if not keys:
            return sorted_listing(beside, [UNLABELLED] * len(beside), mtime_sizes=mtime_sizes)
        names = sorted(classes)
        label_of = {name: label for label, name in enumerate(names)}
        labels = [label_of[key.partition("/")[0]] for key in keys]
        filled = set(labels)
        class_ids = tuple(printable(name) for name in names)
        notes = list(self._notes(names, beside, [name for label, name in enumerate(class_ids) if label not in filled]))
        return sorted_listing(keys, labels, class_ids=class_ids, mtime_sizes=mtime_sizes, notes=notes)

    def _labelled_by_list(self, keys: list[str], mtime_sizes: list[MtimeSize]) -> Listing:
        assert self.label_of is not None
        labels = listed_labels(keys, self.label_of, str(self.root))
        return sorted_listing(keys, labels, class_ids=self.label_ids, mtime_sizes=mtime_sizes)

    def _notes(self, classes: list[str], beside: list[str], empty: list[str]) -> Iterator[str]:
        images = [name for name in sorted(beside)[:100] if looks_like_image(self.root / name)]
        if images:
            raise UserError(
                f"{self.root} holds class folders and also images beside them ({', '.join(images[:3])}"
                f"{', …' if len(images) > 3 else ''}), whose class nothing tells; move them into a class folder or away"
            )
        if classes and all(name.lower() in _SPLITS for name in classes):
            yield f"{_some(classes, 'folder')} taken for classes, but named like splits; --split reads one of them"
        if beside:
            yield f"left out: {_some(beside, 'file')} beside the class folders"
        if empty:
            yield f"{_some(empty, 'class folder')} without any file; the labels stay as they are"

    def read(self, listing: Listing, index: int) -> bytes:
        path = self.root / listing.keys[index]
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > _LARGEST_INPUT:
                    raise UnreadableInputError(f"the file has {size:,} bytes, more than any image here may have")
                return file.readall()
        except _REFUSED as error:
            raise UnreadableInputError(f"cannot be opened: {error.strerror}") from error
        except _GONE as error:
            if path.is_symlink():
                raise UnreadableInputError("broken symbolic link") from error
            raise UserError(gone(path)) from error
        except OSError as error:
            if path.is_symlink() and not path.exists():
                raise UnreadableInputError(f"symbolic link that leads nowhere: {error.strerror}") from error
            raise UserError(storage_failed(path, error)) from error


def gone(path: str | Path) -> str:
    """The sentence for an input that was listed and is no longer there."""
    return (
        f"{path} is gone since the data was listed; bring it back and run the same command again to continue, "
        "or start anew with --overwrite"
    )


def storage_failed(path: str | Path, error: OSError) -> str:
    """The sentence for storage that fails while an input is read."""
    return f"{path} cannot be read ({error.strerror}); mend the storage and run the same command again to continue"


def walk(
    root: Path, mtime_sizes: list[MtimeSize], classes: list[str], *, left_out: Path | None = None
) -> Iterator[str]:
    """The path of every file under `root`, relative to it, in no order; links to folders are followed once.

    Args:
        root: where to begin.
        mtime_sizes: receives every folder that was listed.
        classes: receives the names of the folders directly under `root`.
        left_out: a folder that is passed over.

    Raises:
        UserError: a folder cannot be listed.
    """
    passed_over = None if left_out is None else os.path.realpath(left_out)
    pending: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while pending:
        prefix, above = pending.pop()
        folder = root / prefix
        try:
            mtime_sizes.append(MtimeSize.of(folder))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_ignored_name(entry.name):
                        continue
                    if _is_folder(entry):
                        chain = _chain(entry, above)
                        if chain is None or (passed_over and os.path.realpath(entry.path) == passed_over):
                            continue
                        pending.append((f"{prefix}{entry.name}/", chain))
                        if not prefix:
                            classes.append(entry.name)
                    elif entry.is_file(follow_symlinks=False) or (entry.is_symlink() and _may_be_file(entry.path)):
                        yield prefix + entry.name
        except OSError as error:
            raise UserError(
                f"{folder} cannot be listed ({error.strerror}); change its rights or move it away"
            ) from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a folder or a link to one; a link that cannot be followed is read, and then left out, as a file."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _chain(entry: "os.DirEntry[str]", above: tuple[str, ...]) -> tuple[str, ...] | None:
    """The real folders above this one, or None where a link leads back into one of them."""
    if not entry.is_symlink():
        return above
    real = os.path.realpath(entry.path)
    return None if any(f"{folder}/".startswith(f"{real}/") for folder in above) else (*above, real)


def _may_be_file(path: str) -> bool:
    """Whether a link is worth reading: a broken one is (it is reported), one to a pipe or device is not."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except OSError:
        return True


def is_ignored_name(name: str, ignored: Iterable[str] = ()) -> bool:
    """Whether a file of that name is never an input: hidden, left behind by a system, or to be left out."""
    return name.startswith(".") or name in _IGNORED_NAMES or any(fnmatch.fnmatch(name, pattern) for pattern in ignored)


def looks_like_image(path: Path) -> bool:
    """Whether the first bytes are those of an image."""
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(_IMAGE_STARTS)
    except OSError:
        return False


def _some(names: Iterable[str], what: str) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:3]) + (", …" if len(ordered) > 3 else "")
    return f"{len(ordered)} {what}{'s' if len(ordered) > 1 else ''} ({shown})"
