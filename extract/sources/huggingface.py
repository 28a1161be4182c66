"""Images in a Hugging Face data set: from the Hub, or a local folder of parquet or arrow files.

Nothing in the data set is executed: no loading script, only its tables.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from extract.sources.folders import gone
from extract.sources.labels import AS_GIVEN, Labels, numbered_labels, plain_name
from extract.sources.listing import UNLABELLED, Listing, Source, UnreadableInputError, sorted_listing
from extract.sources.pages import LEAVE_OUT
from extract.sources.tables import (
    LABEL_COLUMNS,
    PATH_COLUMNS,
    check_contents,
    check_table,
    leads_to_file,
    refuse_missing,
)
from pipeline.classes import synsets_of
from pipeline.hub import offline_if_unreachable
from pipeline.runtime.console import printable, say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import MOST_IMAGE_BYTES, read_regular, shortened, typed
from pipeline.runtime.units import size

_BASE64_IMAGES = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")  # as JPEG, PNG, WebP and GIF begin
_SHORTEST_BASE64 = 64
_BINARY, _TEXT = frozenset({"binary", "large_binary"}), frozenset({"string", "large_string"})
_SPLIT_NAME = re.compile(r"(train|test|val|valid|validation|dev|eval)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableSource(Source):
    """The rows of a data set."""

    name: str
    table: Any
    """A `datasets.Dataset` whose image column is not decoded."""
    image_column: str
    label_column: str | None
    folders: tuple[Path, ...] = ()
    """Where paths in the table may begin."""
    is_flat: bool = False
    """Whether labels are left out (--layout flat)."""

    @property
    def description(self) -> str:
        columns = f"image {self.image_column!r}, label {self.label_column!r}"
        return f"data set {self.name} ({len(self.table):,} rows; {columns})"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"image-column": self.image_column, "label-column": self.label_column}

    @property
    def identity(self) -> str:
        return f"table\n{self.name}\n{self.is_flat}"

    def inputs(self) -> Listing:
        count = len(self.table)
        if not count:
            raise UserError(f"{self.name} has no rows; choose another --split")
        width = len(str(count - 1))
        labels = self._labels()
        notes = []
        missing = int(sum(label == UNLABELLED for label in labels.values))
        if labels.class_ids and missing:
            notes = [f"{missing} of {count} rows carry no label"]
        if self.label_column is None and not self.is_flat:
            notes = [f"{self.name} has no label column that could be told (--label-column NAME): unlabelled"]
        return sorted_listing(
            [f"{row:0{width}d}" for row in range(count)],
            labels.values,
            class_ids=labels.class_ids,
            notes=notes,
            labels_from=f"column {self.label_column!r}" if labels.class_ids else "",
            order=labels.order,
        )

    def _labels(self) -> Labels:
        if self.label_column is None:
            return Labels(values=[UNLABELLED] * len(self.table))
        column = self.table.select_columns([self.label_column]).with_format("arrow")[:][self.label_column]
        try:
            column = column.to_pylist()
        except (ValueError, OverflowError) as error:  # texts that are no Unicode, times before and after Python's
            raise UserError(
                f"column {self.label_column!r} of {self.name} cannot be read ({printable(str(error)[:200])}); choose "
                f"another --label-column, or read it without labels by --layout flat"
            ) from error
        names = getattr(self.table.features[self.label_column], "names", None)
        if names is None:
            return numbered_labels(column, f"column {self.label_column!r} of {self.name}")
        labels = [UNLABELLED if label is None else max(int(label), UNLABELLED) for label in column]
        if not all(isinstance(name, str) for name in names):
            raise UserError(f"column {self.label_column!r} of {self.name} names a class by what is no text; mend it")
        stripped = [plain_name(name) for name in names]
        names = stripped if len(set(stripped)) == len(names) else names
        if max(labels, default=0) >= len(names):
            raise UserError(
                f"column {self.label_column!r} of {self.name} has the label {max(labels)}, but names {len(names)} "
                f"classes; choose another --label-column, or read it without labels by --layout flat"
            )
        return Labels(values=labels, class_ids=synsets_of(names) or tuple(names), order=AS_GIVEN)

    def read(self, listing: Listing, index: int) -> bytes:
        del listing
        try:
            value = self.table[index][self.image_column]
        except (ValueError, OverflowError) as error:  # of pyarrow's, too
            raise UnreadableInputError(f"its row cannot be read ({printable(str(error)[:200])})") from error
        if isinstance(value, dict):
            if value.get("bytes") is not None:
                return bytes(value["bytes"])
            value = value.get("path")
        if isinstance(value, bytes):
            return value
        if value is None:
            raise UnreadableInputError("the row has no image")
        if not isinstance(value, str) or "\0" in value:
            raise UnreadableInputError(f"the row's image is {shortened(value)}, which is neither bytes nor a path")
        if (written := _from_base64(value)) is not None:
            return written
        places = [folder / value for folder in self.folders]
        value = next((place for place in places if leads_to_file(place)), places[0] if places else Path(value))
        try:
            return read_regular(value, most=MOST_IMAGE_BYTES)
        except UserError as error:
            raise UnreadableInputError(str(error)) from error
        except FileNotFoundError as error:
            raise UserError(gone(value)) from error
        except OSError as error:
            raise UnreadableInputError(f"cannot be opened: {error.strerror}") from error


def open_table(
    data: str,
    split: str,
    image_column: str | None,
    label_column: str | None,
    *,
    files: Sequence[Path] = (),
    anyway: bool = False,
    is_flat: bool = False,
    are_alone: bool = True,
) -> TableSource:
    """The data set `hf:OWNER/NAME[:CONFIG]`, or a local folder of parquet or arrow files.

    Args:
        data: its name or folder.
        split: which part of it.
        image_column: the column of images, where it is not to be found.
        label_column: the same of labels.
        files: the tables in the folder that may be data.
        anyway: read what is there where files are missing.
        is_flat: leave labels out.
        are_alone: whether no images and no stores of ours lie beside the tables, which `datasets` would take for data.

    Raises:
        UserError: it is not there, cannot be read, has no such split or column, or more than one could be meant.
    """
    import datasets

    try:
        if data.startswith("hf:"):
            name, _, config = data.removeprefix("hf:").partition(":")
            with offline_if_unreachable() as answers:
                try:
                    table = _copied(datasets.load_dataset_builder(name, config or None), split)
                except Exception as error:  # many kinds
                    if answers or isinstance(error, UserError):
                        raise
                    raise UserError(
                        f"{data} cannot be opened as a data set: it is not in the local cache, and the Hub cannot be "
                        f"reached; check the name, go online once, or give local files"
                    ) from error
        else:
            name = Path(data).name
            table = _local(Path(data), split, files, anyway=anyway, are_alone=are_alone)
    except UserError as error:
        if not data.startswith("hf:") or str(error).startswith(data):
            raise
        raise UserError(f"{data}: {str(error).removesuffix(LEAVE_OUT)}") from error
    except Exception as error:  # the Hub's client and the table readers raise many kinds
        reason = printable(" ".join(str(error).split())[:300])
        raise UserError(f"{data} cannot be opened as a data set with split {split!r}: {reason}") from error
    image = _image_column(table.features, image_column, data)
    if not _can_hold_images(table.features[image]):
        raise UserError(
            f"column {printable(image)!r} of {data} is {shortened(table.features[image])}, but images are bytes, "
            f"paths, or both in a struct; choose one by --image-column NAME"
        )
    label = None if is_flat else _label_column(table.features, label_column, data)
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    return TableSource(
        name=name,
        table=table.select_columns([image, *([label] if label else [])]),
        image_column=image,
        label_column=label,
        is_flat=is_flat,
        folders=() if data.startswith("hf:") else tuple(dict.fromkeys([Path(data), *(file.parent for file in files)])),
    )


class _Splits(msgspec.Struct, frozen=True):
    splits: tuple[str, ...] = ()


def _local(folder: Path, split: str, files: Sequence[Path], *, anyway: bool, are_alone: bool) -> Any:
    import datasets

    if (folder / "dataset_dict.json").is_file():
        path = folder / "dataset_dict.json"
        told = typed(read_json(path), _Splits, f"{path} is damaged", advice="fetch the data set again")
        splits = [name for name in told.splits if name]
        if split not in splits:
            raise UserError(f"{folder} holds the splits {', '.join(splits)}; choose one by --split")
        return _from_disk(folder / split, files, anyway=anyway)
    if (folder / "state.json").is_file():
        return _from_disk(folder, files, anyway=anyway)
    for path in files:
        check_table(path)
    begins = re.compile(rf"{re.escape(split)}(?![A-Za-z0-9])")
    of_split = [path for path in files if begins.match(path.name) or path.parent.name == split]
    if (note := refuse_missing(of_split or files, anyway=anyway)) is not None:
        say(note)
    held = sum(path.stat().st_size for path in of_split or files)
    say(
        f"the tables ({held / 1e6:,.1f} MB) are copied as Arrow files into {datasets.config.HF_DATASETS_CACHE}, once; "
        "HF_DATASETS_CACHE names another place"
    )
    plain = [path for path in files if path.parent == folder and path.suffix == ".parquet"]
    if plain and not any(_SPLIT_NAME.match(path.name) for path in plain):
        return _copied(_of_files("parquet", plain), "train")
    everything = [*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]
    parquet = [path for path in of_split if path.suffix == ".parquet"]
    is_told_by_name = bool(parquet) and len({path.parent for path in parquet}) == 1
    if not are_alone and not is_told_by_name:
        if not of_split and any(_SPLIT_NAME.match(path.name) for path in files):
            raise UserError(f"{folder} holds no table of the split {split}, but {files[0].name}; choose by --split")
        kind = (of_split or files)[0].suffix
        return _copied(_of_files(kind[1:], [path for path in of_split or files if path.suffix == kind]), "train")
    if not is_told_by_name or (len(files) == len(everything) and are_alone):
        try:
            return _copied(datasets.load_dataset_builder(str(folder)), split)
        except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError):
            if not is_told_by_name:
                raise
    say(f"reading {len(parquet)} files of the split {split} in {parquet[0].parent} alone")
    return _copied(_of_files("parquet", parquet), "train")


def _copied(builder: Any, split: str) -> Any:
    """The tables as `datasets` copies them, once: looked through first, as it takes a part of a table at once.

    What lies on the Hub is in its cache by then, where the builder finds it again.
    """
    import datasets

    if not (Path(builder.cache_dir) / datasets.config.DATASET_INFO_FILENAME).exists():
        fetched = datasets.DownloadManager(base_path=builder.base_path).download(dict(builder.config.data_files or {}))
        for path in dict.fromkeys(Path(file) for files in fetched.values() for file in files):
            check_table(path, builder.name)
            check_contents(path, builder.name)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _of_files(kind: str, files: Sequence[Path]) -> Any:
    """The builder of tables of a kind, without those that lie beside them."""
    import datasets

    return datasets.load_dataset_builder(kind, data_files=[str(path) for path in files])


class _DataFile(msgspec.Struct, frozen=True):
    filename: Annotated[str, msgspec.Meta(pattern=r"^[^/\0]+\Z")]


class _State(msgspec.Struct, frozen=True):
    data_files: tuple[_DataFile, ...] = msgspec.field(name="_data_files")


def _from_disk(folder: Path, files: Sequence[Path], *, anyway: bool) -> Any:
    """What `save_to_disk` left in a folder; with `anyway` those of its files that are there.

    All of it is at hand at once: mapped into memory as it is, or unpacked.
    """
    import datasets

    from pipeline.runtime.devices import machine_bytes

    there = sorted(file for file in files if file.parent == folder and file.name.startswith("data-"))
    if (note := refuse_missing(there, anyway=anyway)) is not None:
        say(note)
    else:
        path = folder / "state.json"
        state = typed(read_json(path), _State, f"{path} is damaged", advice="fetch the data set again")
        there = [folder / file.filename for file in state.data_files]
    for path in there:
        check_table(path)
    if (unpacked := sum(check_contents(path, "arrow") for path in there)) > machine_bytes():
        raise UserError(
            f"{folder} unpacks to {size(unpacked)}, more than this machine's memory; save the data set without "
            f"compression, or as parquet"
        )
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in there])


def _can_hold_images(kind: Any) -> bool:
    import datasets

    if isinstance(kind, dict):
        path = kind.get("path")
        return _dtype(kind.get("bytes")) in _BINARY and (path is None or _dtype(path) in {*_TEXT, "null"})
    return isinstance(kind, datasets.Image) or _dtype(kind) in _BINARY | _TEXT


def _dtype(kind: Any) -> str | None:
    return getattr(kind, "dtype", None)


def _from_base64(text: str) -> bytes | None:
    """The image that a text is in base64, as tables that came from JSON have them; None for a path."""
    plain = "".join(re.sub(r"^data:image/[\w.+-]+;base64,", "", text).split())
    if not plain.startswith(_BASE64_IMAGES) or len(plain) < _SHORTEST_BASE64:
        return None
    try:
        return base64.b64decode(plain, validate=True)
    except ValueError:
        return None


def _image_column(features: Any, wanted: str | None, data: str) -> str:
    import datasets

    if wanted is not None:
        return _known_column(features, wanted, "--image-column", data)
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    images = images or [name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind]
    images = images or [n for n, k in features.items() if getattr(k, "dtype", None) in {"binary", "large_binary"}]
    images = images or [n for n in PATH_COLUMNS if n in features and getattr(features[n], "dtype", "") == "string"][:1]
    if len(images) != 1:
        found = f"{len(images)} image columns ({', '.join(images)})" if images else "no image column"
        raise UserError(f"{data} has {found} among {', '.join(features)}; choose one by --image-column NAME")
    return images[0]


def _label_column(features: Any, wanted: str | None, data: str) -> str | None:
    import datasets

    if wanted is not None:
        return _known_column(features, wanted, "--label-column", data)
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    named = [name for name in labels or features if name in LABEL_COLUMNS]
    if len(labels) > 1 and len(named) != 1:
        raise UserError(f"{data} has {len(labels)} label columns ({', '.join(labels)}); choose one by --label-column")
    return (named or labels or [None])[0]


def _known_column(features: Any, wanted: str, flag: str, data: str) -> str:
    if wanted not in features:
        raise UserError(f"{flag} {wanted}: {data} has no such column, only {', '.join(features)}")
    return wanted
