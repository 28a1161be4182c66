"""Which kind of source DATA is, one row of SOURCES each: recognised by its form and by what is there."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from extract.sources.folders import FolderSource, is_ignored_name, looks_like_image
from extract.sources.imagenet import VAL_IMAGE, ImageLabels, kaggle_folder, kaggle_labels, labels_from_files
from extract.sources.listing import Source
from extract.sources.remote import is_remote
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from extract.options import SourceOptions
else:
    SourceOptions = object

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".7z", ".rar")


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What --data names, looked at once."""

    options: SourceOptions
    copies: Path
    """Where copies of remote tars go."""
    left_out: Path | None
    """The store's folder, which is no part of the data wherever it lies."""

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
        split = self.folder / self.options.split
        return kaggle_folder(self.folder, self.options.split) or (split if split.is_dir() else self.folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceKind:
    """A kind of source: how it is recognised and opened."""

    help: str
    """What of it --data takes, for the command's help."""
    suits: Callable[[Given], bool]
    open: Callable[[Given], Source]


def _is_table(given: Given) -> bool:
    is_hub = given.data.startswith("hf:") and not given.data.startswith("hf://")
    return is_hub or (given.folder is not None and _table_folder(given.folder, given.root) is not None)


def _table_folder(folder: Path, root: Path) -> Path | None:
    from extract.sources.huggingface import holds_tables

    return next((place for place in dict.fromkeys((root, folder)) if holds_tables(place)), None)


def _open_table(given: Given) -> Source:
    from extract.sources.huggingface import open_table

    options = given.options
    place = options.data if given.folder is None else str(_table_folder(given.folder, given.root))
    return open_table(place, options.split, options.image_column, options.label_column)


def _is_tars(given: Given) -> bool:
    named = given.data.lower().split("?")[0].endswith(".tar") or is_remote(given.data)
    return named or (given.folder is not None and bool(_tars_in(given.root, given.options.split)))


def _open_tars(given: Given) -> Source:
    if given.folder is not None:
        return _tar_source([str(tar) for tar in _tars_in(given.root, given.options.split)], given.options, Path())
    return _tar_source(_addresses(given.data), given.options, given.options.source_cache or given.copies)


def _open_folder(given: Given) -> Source:
    options, root = given.options, given.root
    labels = labels_from_files(options.val_labels, options.devkit) or _labels_beside(root, options.ignored)
    return FolderSource(
        root=root,
        ignored=options.ignored,
        label_of=labels.label_of if labels else None,
        label_ids=labels.class_ids if labels else (),
        left_out=given.left_out,
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
    for kind in SOURCES.values():
        if kind.suits(given):
            return kind.open(given)
    if Path(options.data).expanduser().is_file():
        hint = "unpack it first" if options.data.lower().endswith(_COMPRESSED) else "name the folder it lies in"
        raise UserError(f"--data {options.data} is a file, but neither a folder nor a .tar; {hint}")
    raise UserError(f"--data {options.data} does not exist; name a folder of images, tars, or hf:OWNER/NAME")


def data_help() -> str:
    """What --data takes, for the command's help."""
    return f"What to read: {'; '.join(kind.help for kind in reversed(SOURCES.values()))}."


def _tars_in(root: Path, split: str) -> list[Path]:
    """The tars to read in a folder that holds tars and no folders: those of the split, if names tell it, else all.

    ImageNet's own tars are known by name, whatever is unpacked beside them.
    """
    entries = [entry for entry in root.iterdir() if not is_ignored_name(entry.name)] if root.is_dir() else []
    tars = sorted(entry for entry in entries if entry.suffix == ".tar")
    imagenet = [tar for tar in tars if tar.name == f"ILSVRC2012_img_{split}.tar"]
    if imagenet or not tars or any(entry.is_dir() for entry in entries):
        return imagenet
    images = [entry.name for entry in sorted(entries)[:200] if entry.suffix != ".tar" and looks_like_image(entry)]
    if images:
        raise UserError(
            f"{root} holds tars ({tars[0].name}, …) and also images beside them ({images[0]}, …); name the tars "
            f"themselves in --data, or move one or the other away"
        )
    return [tar for tar in tars if tar.name.startswith(split)] or tars


def _labels_beside(root: Path, ignored: tuple[str, ...]) -> ImageLabels | None:
    """Kaggle's solution file, if this is a flat folder of validation images that has one above it."""
    some = islice((entry.name for entry in root.iterdir() if not is_ignored_name(entry.name, ignored)), 1000)
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
        copies=remote_folder,
        names=_short_names(addresses),
        image_extension=options.image_column,
        label_extension=options.label_column,
        ignored=options.ignored,
        val_labels=labels_from_files(options.val_labels, options.devkit),
    )


def _short_names(addresses: list[str]) -> tuple[str, ...]:
    """The addresses without the folders that all of them share, so that keys do not tell where the data lies."""
    parts = [address.split("?")[0].split("/") for address in addresses]
    shared = 0
    while all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    return tuple("/".join(one[shared:]) for one in parts)
