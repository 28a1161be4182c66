"""Images as files in folders: one folder per class at any depth, or one flat folder without labels.

Files are told apart by content, not by name: every file that is not hidden is an input, and one that turns out not to
be an image is left out with its reason. Nothing is opened or looked at while listing, folders excepted.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from extract.sources.dataset_json import DATASET_JSON, labelled_by_dataset_json
from extract.sources.imagenet import hash_of_labels, listed_labels
from extract.sources.labels import (
    Labels,
    in_order,
    is_split,
    labels_of_names,
    synset_in_name,
    synsets_in_names,
)
from extract.sources.listing import (
    UNLABELLED,
    Listing,
    MtimeSize,
    Source,
    UnreadableInputError,
    printable,
    sorted_listing,
)
from extract.sources.litter import LeftOut, made_here, rule_against
from extract.sources.mistaken import refuse_containers, refuse_label_list, refuse_wrappers, some
from pipeline.image_names import named_like_image
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import MOST_IMAGE_BYTES, check_regular, read_regular

_TELL_EVERY = 200_000
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_GONE = (FileNotFoundError, NotADirectoryError)
_REFUSED = (PermissionError, IsADirectoryError)


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource(Source):
    """A folder of class folders, or a flat folder."""

    root: Path
    ignored: tuple[str, ...] = ()
    """Patterns of names to leave out, of files and folders."""
    label_of: Mapping[str, int] | None = None
    """Labels by file stem, for a flat folder that is labelled by a list (ImageNet's validation images)."""
    label_ids: tuple[str, ...] = ()
    """Class ids of `label_of`."""
    left_out: Path | None = None
    """A folder that is no part of the data: the store, where it is made within the data's folder."""
    layout: str = "auto"
    """What --layout says."""
    lists: tuple[Path, ...] = ()
    """Files beside the root that may tell something of what is in it."""

    @property
    def description(self) -> str:
        return f"folder {self.root}"

    @property
    def identity(self) -> str:
        labels = hash_of_labels(self.label_of) if self.label_of is not None else ""
        return "\n".join(["folder", str(self.root.absolute()), *self.ignored, labels, self.layout])

    def inputs(self) -> Listing:
        tree = Tree.of(self.root, ignored=self.ignored, left_out=self.left_out)
        keys, beside = tree.keys, tree.beside
        if not keys and not beside:
            left = "; ".join(tree.left_out.notes())
            raise UserError(
                f"{self.root} holds no files; --data must name a folder with images in it{f' ({left})' if left else ''}"
            )
        refuse_containers(str(self.root), keys + beside, lambda key: looks_like_image(self.root / key))
        if self.label_of is not None:
            labels = listed_labels(keys + beside, self.label_of, str(self.root))
            return tree.listing(keys + beside, labels, self.label_ids, labels_from="the list of validation labels")
        if self.layout in ("auto", "dataset-json") and DATASET_JSON in beside:
            data, where = read_regular(self.root / DATASET_JSON), str(self.root / DATASET_JSON)
            if (found := labelled_by_dataset_json(data, keys + beside, where)) is not None:
                return tree.labelled(found.keys, found.labels, DATASET_JSON, notes=found.notes)
        if self.layout == "dataset-json":
            raise UserError(f"--layout dataset-json: {self.root} holds no {DATASET_JSON} with labels in it")
        if self.layout == "flat":
            return tree.listing(keys + beside, [UNLABELLED] * len(keys + beside), ())
        if (synsets := self._synsets(keys or beside)) is not None:
            for name in beside if keys else ():
                tree.left_out.add("beside the folders", name)
            return tree.labelled(keys or beside, labels_of_names(synsets), "the synsets in file names")
        if not keys:
            if self.layout == "auto":
                refuse_label_list(self.root, beside, self.lists)
            return tree.listing(beside, [UNLABELLED] * len(beside), (), notes=_mixed_names(beside))
        return self._by_class_folders(tree)

    def _synsets(self, keys: Sequence[str]) -> list[str] | None:
        """The synsets in the names of all files, where no folder tells the class as well."""
        if self.layout != "auto" or not keys or synset_in_name(keys[0]) is None:
            return None
        synsets = synsets_in_names(keys)
        folders: dict[str, set[str]] = defaultdict(set)
        for key, synset in zip(keys, synsets or (), strict=False):
            folders[key.rpartition("/")[0]].add(synset)
        is_told_by_folder = all(len(one) == 1 and folder for folder, one in folders.items())
        return None if is_told_by_folder else synsets

    def _by_class_folders(self, tree: "Tree") -> Listing:
        names, order = in_order(tree.classes)
        label_of = {name: label for label, name in enumerate(names)}
        labels = [label_of[key.partition("/")[0]] for key in tree.keys]
        filled = set(labels)
        class_ids = tuple(printable(name) for name in names)
        meant = self.layout != "auto"
        notes = [] if meant else list(refuse_wrappers(self.root, names, tree.keys, self._is_image))
        empty = [name for label, name in enumerate(class_ids) if label not in filled]
        notes += self._notes(names, tree.beside, empty)
        return tree.listing(
            tree.keys, labels, class_ids, labels_from="the names of class folders", order=order, notes=notes
        )

    def _is_image(self, key: str) -> bool:
        return named_like_image(key) or looks_like_image(self.root / key)

    def _notes(self, classes: Sequence[str], beside: list[str], empty: list[str]) -> Iterator[str]:
        images = [name for name in sorted(beside)[:100] if looks_like_image(self.root / name)]
        if images:
            raise UserError(
                f"{self.root} holds class folders and also images beside them ({', '.join(images[:3])}"
                f"{', …' if len(images) > 3 else ''}), whose class nothing tells; move them into a class folder or "
                "away, leave them out by --ignore, or say --layout flat to read all of it without labels"
            )
        if classes and all(map(is_split, classes)):
            yield f"{some(classes, 'folder')} taken for classes, but named like splits; --split reads one of them"
        if beside:
            yield f"left out: {some(beside, 'file')} beside the class folders"
        if empty:
            yield f"{some(empty, 'class folder')} without any file; the labels stay as they are"

    def read(self, listing: Listing, index: int) -> bytes:
        path = self.root / listing.keys[index]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # should a pipe have come meanwhile
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise UnreadableInputError("a pipe or a device, where a file was when the data was listed")
                if status.st_size > MOST_IMAGE_BYTES:
                    raise UnreadableInputError(
                        f"the file has {status.st_size:,} bytes, more than any image here may have"
                    )
                return file.readall() if status.st_size else b""  # the kernel's own claim none, and some never end
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


@dataclass(kw_only=True, slots=True)
class Tree:
    """All files under a folder, as they were found."""

    keys: list[str]
    """Those in sub-folders."""
    beside: list[str]
    """Those directly in it."""
    classes: list[str]
    """The sub-folders directly in it."""
    mtime_sizes: list[MtimeSize]
    left_out: LeftOut

    @classmethod
    def of(cls, root: Path, *, ignored: tuple[str, ...] = (), left_out: Path | None = None) -> "Tree":
        """What is under `root`, without what is no data.

        Raises:
            UserError: a folder cannot be listed.
        """
        tree = cls(keys=[], beside=[], classes=[], mtime_sizes=[], left_out=LeftOut())
        for count, key in enumerate(tree._walk(root, ignored, left_out), 1):
            (tree.keys if "/" in key else tree.beside).append(key)
            if count % _TELL_EVERY == 0:
                say(f"listing {root}: {count:,} files so far")
        return tree

    def _walk(self, root: Path, ignored: tuple[str, ...], store: Path | None) -> Iterator[str]:
        """The path of every file under `root`, relative to it, in no order; links to folders are followed once."""
        top = os.path.realpath(root)
        passed_over = None if store is None else os.path.realpath(store)
        pending: list[tuple[str, tuple[str, ...]]] = [("", (top,))]
        while pending:
            prefix, above = pending.pop()
            folder = root / prefix
            try:
                self.mtime_sizes.append(MtimeSize.of(folder))
                with os.scandir(folder) as entries:
                    for entry in entries:
                        name = entry.name
                        if (rule := rule_against(name, ignored)) is not None:
                            self.left_out.add(rule, prefix + name)
                        elif _is_folder(entry):
                            if (rule := _rule_against_folder(entry, above, top, passed_over)) is not None:
                                self.left_out.add(rule, prefix + name)
                                continue
                            pending.append((f"{prefix}{name}/", _chain(entry, above) or above))
                            if not prefix:
                                self.classes.append(name)
                        elif entry.is_file(follow_symlinks=False) or (entry.is_symlink() and _may_be_file(entry.path)):
                            yield prefix + name
            except OSError as error:
                raise UserError(
                    f"{folder} cannot be listed ({error.strerror}); change its rights or move it away"
                ) from error

    def labelled(self, keys: Sequence[str], labels: Labels, labels_from: str, *, notes: Iterable[str] = ()) -> Listing:
        """The listing of files with labels that were found somewhere."""
        told = labels_from if labels.class_ids else ""
        return self.listing(keys, labels.values, labels.class_ids, labels_from=told, order=labels.order, notes=notes)

    def listing(
        self,
        keys: Sequence[str],
        labels: Sequence[int],
        class_ids: tuple[str, ...],
        *,
        labels_from: str = "",
        order: str = "",
        notes: Iterable[str] = (),
    ) -> Listing:
        return sorted_listing(
            keys,
            labels,
            class_ids=class_ids,
            mtime_sizes=self.mtime_sizes,
            notes=[*notes, *self.left_out.notes()],
            labels_from=labels_from,
            order=order,
        )


def _rule_against_folder(
    entry: "os.DirEntry[str]", above: tuple[str, ...], top: str, passed_over: str | None
) -> str | None:
    """Why a folder is no part of the data: it is a store or a run, or a link to what is read anyway."""
    if entry.is_symlink():
        real = os.path.realpath(entry.path)
        if _chain(entry, above) is None or real.startswith(f"{top}/"):
            return "links to folders that are read themselves"
    elif passed_over is None:
        real = ""
    else:
        real = os.path.realpath(entry.path)
    if passed_over and real == passed_over:
        return "the store itself"
    made = made_here(Path(entry.path))
    return None if made is None else f"{made}s"


def _mixed_names(names: Sequence[str]) -> list[str]:
    """A line where some names of a flat folder tell a class and others do not."""
    told = sum(synset_in_name(name) is not None for name in names)
    return [f"{told} of {len(names)} names hold a synset; the others do not, so all are unlabelled"] if told else []


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


def looks_like_image(path: Path) -> bool:
    """Whether the first bytes are those of an image; a pipe, which would wait, is none."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            return file.read(8).startswith(_IMAGE_STARTS)
    except (OSError, UserError):
        return False
