"""Which kind of source DATA is: decided by its form and by what is there, and said to the user."""

from itertools import islice
from pathlib import Path

from extract.options import SourceOptions
from extract.sources.folders import FolderSource, is_litter, looks_like_image
from extract.sources.imagenet import VAL_IMAGE, ImageLabels, kaggle_folder, kaggle_labels, labels_from_files
from extract.sources.listing import Source
from extract.sources.remote import is_remote
from pipeline.runtime.errors import UserError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".7z", ".rar")


def open_source(options: SourceOptions, remote_folder: Path, *, left_out: Path | None = None) -> Source:
    """The source that --data names; remote tars are fetched into `remote_folder` (or --source-cache) when listed.

    Args:
        options: what is asked for.
        remote_folder: where copies go.
        left_out: the store's folder, which is no part of the data wherever it lies.

    Raises:
        UserError: nothing usable is there, or flags do not fit what is there.
    """
    data = options.data
    if data.startswith("hf:") and not data.startswith("hf://"):
        return _table(data, options)
    if data.lower().split("?")[0].endswith(".tar") or is_remote(data):
        return _tars(options, options.source_cache or remote_folder)
    path = Path(data).expanduser()
    if path.is_file():
        hint = "unpack it first" if data.lower().endswith(_COMPRESSED) else "name the folder it lies in"
        raise UserError(f"--data {data} is a file, but neither a folder nor a .tar; {hint}")
    if not path.is_dir():
        raise UserError(f"--data {data} does not exist; name a folder of images, tars, or hf:OWNER/NAME")
    return _folder(path, options, left_out)


def _folder(path: Path, options: SourceOptions, left_out: Path | None) -> Source:
    from extract.sources.huggingface import holds_tables

    kaggle = kaggle_folder(path, options.split)
    root = kaggle or (path / options.split if (path / options.split).is_dir() else path)
    if holds_tables(root) or (root != path and holds_tables(path)):
        return _table(str(root if holds_tables(root) else path), options)
    tars = _tars_in(root, options.split)
    if tars:
        return _tar_source([str(tar) for tar in tars], options, Path())
    labels = labels_from_files(options.val_labels, options.devkit) or _labels_beside(root, options.ignored)
    return FolderSource(
        root=root,
        ignored=options.ignored,
        label_of=labels.label_of if labels else None,
        label_ids=labels.class_ids if labels else (),
        left_out=left_out,
    )


def _tars_in(root: Path, split: str) -> list[Path]:
    """The tars to read in a folder that holds tars and no folders: those of the split, if names tell it, else all.

    ImageNet's own tars are known by name, whatever is unpacked beside them.
    """
    entries = [entry for entry in root.iterdir() if not is_litter(entry.name)] if root.is_dir() else []
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
    some = islice((entry.name for entry in root.iterdir() if not is_litter(entry.name, ignored)), 1000)
    return kaggle_labels(root) if any(map(VAL_IMAGE.fullmatch, some)) else None


def _tars(options: SourceOptions, remote_folder: Path) -> Source:
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    try:
        addresses = list(braceexpand(options.data))
    except UnbalancedBracesError as error:
        raise UserError(
            f"--data {options.data} has a brace without its partner; write it as train-{{000..146}}.tar"
        ) from error
    strange = [address for address in addresses if not address.lower().split("?")[0].endswith(".tar")]
    if strange:
        raise UserError(f"--data names {strange[0]}, which does not end in .tar; remote data must be uncompressed tars")
    return _tar_source(addresses, options, remote_folder)


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


def _table(data: str, options: SourceOptions) -> Source:
    from extract.sources.huggingface import open_table

    return open_table(data, options.split, options.image_column, options.label_column)
