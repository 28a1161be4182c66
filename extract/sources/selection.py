"""Which kind of source DATA is, one row of SOURCES each: recognised by its form and by what is there."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from extract.sources.folders import FolderSource, looks_like_image
from extract.sources.imagenet import VAL_IMAGE, ImageLabels, kaggle_folder, kaggle_labels, labels_from_files
from extract.sources.labels import is_split
from extract.sources.listing import Source
from extract.sources.litter import made_here, rule_against
from extract.sources.mistaken import container_of, refuse_hub_cache
from pipeline.image_names import named_like_image
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.remote_files import is_url

if TYPE_CHECKING:
    from extract.options import SourceOptions
else:
    SourceOptions = object

_LARGER_FILES = (".parquet", ".arrow", ".tar")


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What --data names, looked at once."""

    options: SourceOptions
    copies: Path
    """Where copies of remote tars go."""
    left_out: Path | None
    """The store's folder, which is no part of the data wherever it lies."""
    _seen: dict[Path, list[Path]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def data(self) -> str:
        return self.options.data

    @property
    def folder(self) -> Path | None:
        """The folder of that name, if there is one."""
        path = Path(self.data).expanduser()
        return path if path.is_dir() else None

    @property
    def root(self) -> Path:
        """Where in the folder the data is: Kaggle's place for the split, the sub-folder of its name, or itself."""
        assert self.folder is not None
        if self.options.layout == "class-folders":
            return self.folder
        split = self.folder / self.options.split
        return kaggle_folder(self.folder, self.options.split) or (split if split.is_dir() else self.folder)

    def entries(self, folder: Path) -> list[Path]:
        """What lies in a folder and may be data, sorted by name: no litter, nothing of --ignore, no store or run.

        Nor links to what lies in the same folder, which is read itself.
        """
        if not folder.is_dir():
            return []
        with os.scandir(folder) as found:
            named = [entry for entry in found if rule_against(entry.name, self.options.ignored) is None]
        kept = [Path(entry) for entry in named if not entry.is_dir() or not self._is_ours(Path(entry))]
        return sorted(path for path in kept if not _leads_within(path, folder))

    def larger_files(self, folder: Path) -> list[Path]:
        """The tables and tars in a folder or one below; looked for once, as a million images may lie beside them."""
        if folder not in self._seen:
            here = _entries_of(folder)
            below = (entry for inner in here if inner.is_dir() for entry in _entries_of(inner))
            self._seen[folder] = [Path(entry) for entry in chain(here, below) if entry.name.endswith(_LARGER_FILES)]
        return self._seen[folder]

    def _is_ours(self, folder: Path) -> bool:
        is_out = self.left_out is not None and folder.resolve() == self.left_out.resolve()
        return is_out or made_here(folder) is not None

    def tell_of_split(self) -> None:
        """Say what lies beside the split's folder and is not read.

        Raises:
            UserError: the folder is rather one class among others.
        """
        options = self.options
        if self.folder is None or self.root == self.folder or kaggle_folder(self.folder, options.split):
            return
        beside = [path for path in self.entries(self.folder) if path.is_dir() and not is_split(path.name)]
        if not beside:
            return
        names = ", ".join(path.name for path in beside[:3]) + (", …" if len(beside) > 3 else "")
        classes = [path for path in beside if self.holds_images(path)]
        if classes and options.layout == "auto" and self.holds_images(self.root):
            raise UserError(
                f"{self.folder} holds a folder named like --split {options.split}, and beside it others that hold "
                f"images ({names}): if all are classes, say --layout class-folders; if {options.split} alone is the "
                "data, say --layout split-folder"
            )
        say(f"reading the folder {options.split} of {self.folder}; not read: {len(beside)} folders beside it ({names})")

    def has_others_beside(self, folder: Path, tables: list[Path]) -> bool:
        """Whether images, or stores of ours, lie in a folder of tables or one below."""
        places = {folder, *(table.parent for table in tables), *(path for path in folder.iterdir() if path.is_dir())}
        return any(made_here(place) or self.holds_images(place) for place in places)

    def holds_images(self, folder: Path) -> bool:
        """Whether images lie directly in a folder, as far as its first entries tell."""
        some = [path for path in self.entries(folder)[:50] if path.is_file()]
        return any(named_like_image(path.name) or looks_like_image(path) for path in some)


def _leads_within(path: Path, folder: Path) -> bool:
    """Whether this is a link to something in the folder."""
    return path.is_symlink() and path.exists() and path.resolve().is_relative_to(folder.resolve())


def _entries_of(folder: str | os.PathLike[str]) -> list["os.DirEntry[str]"]:
    """All that lies in a folder; nothing where it may not be looked at, which the listing says later."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (PermissionError, FileNotFoundError, NotADirectoryError):
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceKind:
    """A kind of source: how it is recognised and opened."""

    help: str
    """What of it --data takes, for the command's help."""
    suits: Callable[[Given], bool]
    open: Callable[[Given], Source]


def _is_table(given: Given) -> bool:
    is_hub = given.data.startswith("hf:") and not given.data.startswith("hf://")
    return is_hub or (given.folder is not None and _table_folder(given) is not None)


def _table_folder(given: Given) -> Path | None:
    if given.options.layout not in ("auto", "table", "flat"):
        return None
    assert given.folder is not None
    marks = ("state.json", "dataset_dict.json")
    roots = (given.root, given.folder)
    if not any(_tables_in(given, place) or any((place / mark).is_file() for mark in marks) for place in roots):
        return None
    from extract.sources.tables import holds_images

    places = dict.fromkeys((given.root, given.folder))
    chosen = given.options.image_column
    found = next((place for place in places if holds_images(place, _tables_in(given, place), chosen)), None)
    return found or next((place for place in places if _is_tables_alone(given, place)), None)


def _is_tables_alone(given: Given, folder: Path) -> bool:
    """Whether a folder holds tables and nothing else that could be data."""
    tables = _tables_in(given, folder)
    places = {folder} | {table.parent for table in tables}
    others = {path for place in places for path in given.entries(place)} - set(tables) - places
    return bool(tables) and all(path.suffix in (".md", ".json", ".txt") for path in others)


def _tables_in(given: Given, folder: Path) -> list[Path]:
    """The parquet and arrow files in a folder or one below, that may be data."""
    found = [path for path in given.larger_files(folder) if path.suffix != ".tar"]
    below = {path.parent for path in found if path.parent != folder}
    allowed = {folder} | (below.intersection(given.entries(folder)) if below else set())
    ignored = given.options.ignored
    kept = (path for path in found if path.parent in allowed and rule_against(path.name, ignored) is None)
    return sorted(path for path in kept if not _leads_within(path, folder))


def _open_table(given: Given) -> Source:
    from extract.sources.huggingface import open_table
    from extract.sources.tables import has_embedded

    options = given.options
    columns = options.image_column, options.label_column
    is_flat = options.layout == "flat"
    if given.folder is None:
        return open_table(options.data, options.split, *columns, is_flat=is_flat)
    place = _table_folder(given)
    assert place is not None
    files = _tables_in(given, place)
    beside = [path for path in given.entries(place) if path.is_dir() and path not in {file.parent for file in files}]
    with_images = [path.name for path in beside if given.holds_images(path)]
    if len(with_images) > 1 and options.layout == "auto" and has_embedded(files):
        raise UserError(
            f"{place} holds tables of images ({files[0].name}, …) and also folders of images beside them "
            f"({', '.join(with_images[:3])}); say --layout table or --layout class-folders, or leave one out by "
            "--ignore"
        )
    return open_table(
        str(place),
        options.split,
        *columns,
        files=files,
        anyway=options.anyway,
        is_flat=is_flat,
        are_alone=not given.has_others_beside(place, files),
    )


def _is_tars(given: Given) -> bool:
    if given.folder is not None:
        return bool(_tars_in(given)[0])
    return given.data.lower().split("?")[0].endswith(".tar") or is_url(given.data)


def _open_tars(given: Given) -> Source:
    if given.folder is not None:
        tars, notes = _tars_in(given)
        for note in notes:
            say(note)
        return _tar_source([str(tar) for tar in tars], given.options, Path())
    return _tar_source(_addresses(given.data), given.options, given.options.source_cache or given.copies)


def _is_zip(given: Given) -> bool:
    return given.folder is None and given.data.lower().endswith(".zip") and Path(given.data).expanduser().is_file()


def _open_zip(given: Given) -> Source:
    from extract.sources.zips import ZipSource

    options = given.options
    path = Path(options.data).expanduser()
    return ZipSource(path=path, ignored=options.ignored, layout=given_layout(options), split=options.split)


def _open_folder(given: Given) -> Source:
    options, root = given.options, given.root
    labels = labels_from_files(options.val_labels, options.devkit) or _labels_beside(root, options.ignored)
    return FolderSource(
        root=root,
        ignored=options.ignored,
        label_of=labels.label_of if labels else None,
        label_ids=labels.class_ids if labels else (),
        left_out=given.left_out,
        layout=given_layout(options),
        lists=tuple(path for path in given.entries(root.parent) if path.is_file()) if root != given.folder else (),
    )


SOURCES: dict[str, SourceKind] = {
    "table": SourceKind(
        help="hf:OWNER/NAME[:CONFIG], or a folder of parquet or arrow files", suits=_is_table, open=_open_table
    ),
    "tars": SourceKind(
        help="WebDataset tars (/data/train-{000000..000146}.tar, also as https://, s3://, gs:// or hf:// URLs), "
        "ImageNet's own tars",
        suits=_is_tars,
        open=_open_tars,
    ),
    "zip": SourceKind(
        help="a zip of images, also with StyleGAN's and EDM's dataset.json", suits=_is_zip, open=_open_zip
    ),
    "folder": SourceKind(
        help="a folder of class folders, a flat folder of images, Kaggle's layout",
        suits=lambda given: given.folder is not None,
        open=_open_folder,
    ),
}
"""By name; the first kind that suits what is given opens it."""


def open_source(options: SourceOptions, remote_folder: Path, *, left_out: Path | None = None) -> Source:
    """The source that --data names; remote tars are fetched into `remote_folder` (or --source-cache) when listed.

    Args:
        options: what is asked for.
        remote_folder: where copies go.
        left_out: the store's folder, which is no part of the data wherever it lies.

    Raises:
        UserError: nothing usable is there, or flags do not fit what is there.
    """
    given = Given(options=options, copies=remote_folder, left_out=left_out)
    if given.folder is not None and (made := made_here(given.folder)) is not None:
        raise UserError(f"--data {options.data} is a {made}, not images; name what it was made from")
    if given.folder is not None:
        refuse_hub_cache(given.folder)
    given.tell_of_split()
    for kind in SOURCES.values():
        if kind.suits(given):
            return kind.open(given)
    if Path(options.data).expanduser().is_file():
        what, advice = container_of(options.data) or ("", "name the folder it lies in")
        told = f" ({what})" if what else ""
        raise UserError(f"--data {options.data} is a file{told}, but neither a folder nor a .tar; {advice}")
    raise UserError(f"--data {options.data} does not exist; name a folder of images, tars, or hf:OWNER/NAME")


def given_layout(options: SourceOptions) -> str:
    """What --layout says to a source, for which the folder of the split is chosen already."""
    return "auto" if options.layout == "split-folder" else options.layout


def data_help() -> str:
    """What --data takes, for the command's help."""
    return f"What to read: {'; '.join(kind.help for kind in reversed(SOURCES.values()))}."


def _tars_in(given: Given) -> tuple[list[Path], list[str]]:
    """The tars to read in a folder of tars, and what to say about it: those of the split, if names tell it, else all.

    ImageNet's own tars are known by name, whatever is unpacked beside them.
    """
    root, options = given.root, given.options
    if options.layout not in ("auto", "webdataset", "class-tars", "flat", "class-folders"):
        return [], []
    entries = given.entries(root)
    tars = [entry for entry in entries if entry.suffix == ".tar" and entry.is_file()]
    imagenet = [tar for tar in tars if tar.name == f"ILSVRC2012_img_{options.split}.tar"]
    if imagenet:
        return imagenet, []
    folders = [entry for entry in entries if entry.is_dir()]
    if not tars:
        return _tars_below(given, entries, folders), []
    with_images = [folder for folder in folders if _reaches_images(given, folder)]
    images = [entry for entry in entries[:200] if entry not in tars and entry.is_file() and looks_like_image(entry)]
    if images or with_images:
        beside = ", ".join(path.name for path in (images or with_images)[:2])
        raise UserError(
            f"{root} holds tars ({tars[0].name}, …) and also images beside them ({beside}, …); name the tars "
            f"themselves in --data, leave one or the other out by --ignore, or move it away"
        )
    notes = [f"left out: {len(folders)} folders beside the tars ({folders[0].name}, …)"] if folders else []
    links = [path.name for path in sorted(root.glob("*.tar")) if _leads_within(path, root)]
    if links:
        notes.append(f"left out: {len(links)} links to what is read itself ({links[0]}, …)")
    of_split = [tar for tar in tars if tar.name.startswith(options.split)]
    if of_split and len(of_split) < len(tars):
        others = [tar.name for tar in tars if tar not in of_split]
        notes.append(f"left out: {len(others)} tars whose names do not begin with {options.split} ({others[0]}, …)")
    splits = {re.split(r"[-_.0-9]", tar.name)[0] for tar in tars}
    if not of_split and len(splits) > 1 and all(map(is_split, splits)):
        raise UserError(
            f"{root} holds tars of the splits {', '.join(sorted(splits))}, and --split is {options.split}; choose one "
            "of them, or name the tars themselves in --data"
        )
    return of_split or tars, notes


def _tars_below(given: Given, entries: list[Path], folders: list[Path]) -> list[Path]:
    """The tars in sub-folders, where these hold tars alone."""
    if not any(path.suffix == ".tar" for path in given.larger_files(given.root)):  # quick, beside a million images
        return []
    files = [path for folder in folders for path in given.entries(folder)]
    tars = [path for path in files if path.suffix == ".tar" and path.is_file()]
    others = [path for path in (*files, *entries) if path not in tars and path not in folders]
    sidecars = (".json", ".parquet", ".txt", ".idx", ".md")
    return tars if all(path.suffix in sidecars and path.is_file() for path in others) else []


def _reaches_images(given: Given, folder: Path) -> bool:
    """Whether a folder, or one below, holds images, as far as its first entries tell."""
    some = given.entries(folder)[:50]
    below = [inner for path in some if path.is_dir() for inner in given.entries(path)[:10]]
    return any(path.is_file() and looks_like_image(path) for path in (*some, *below))


def _labels_beside(root: Path, ignored: tuple[str, ...]) -> ImageLabels | None:
    """Kaggle's solution file, if this is a flat folder of validation images that has one above it."""
    some = islice((entry.name for entry in root.iterdir() if rule_against(entry.name, ignored) is None), 1000)
    return kaggle_labels(root) if any(map(VAL_IMAGE.fullmatch, some)) else None


def _addresses(data: str) -> list[str]:
    """The tars that a name with braces stands for."""
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    try:
        addresses = list(braceexpand(data))
    except UnbalancedBracesError as error:
        raise UserError(f"--data {data} has a brace without its partner; write it as train-{{000..146}}.tar") from error
    strange = [address for address in addresses if not address.lower().split("?")[0].endswith(".tar")]
    if strange:
        raise UserError(f"--data names {strange[0]}, which does not end in .tar; remote data must be uncompressed tars")
    return addresses


def _tar_source(addresses: list[str], options: SourceOptions, remote_folder: Path) -> Source:
    from extract.sources.tars import TarSource

    return TarSource(
        addresses=tuple(addresses),
        copies=remote_folder / "thin" if options.remote_tars == "stream" else remote_folder,
        names=_short_names(addresses),
        image_extension=options.image_column,
        label_extension=options.label_column,
        ignored=options.ignored,
        val_labels=labels_from_files(options.val_labels, options.devkit),
        layout=given_layout(options),
        split=options.split,
        streamed=options.remote_tars == "stream",
    )


def _short_names(addresses: list[str]) -> tuple[str, ...]:
    """The addresses without the folders that all of them share, so that keys do not tell where the data lies."""
    parts = [address.split("?")[0].split("/") for address in addresses]
    shared = 0
    while all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    return tuple("/".join(one[shared:]) for one in parts)
