"""Images in a Hugging Face data set: from the Hub, or a local folder of parquet or arrow files.

Nothing in the data set is executed: no loading script, only its tables.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.sources.folders import gone
from extract.sources.listing import UNLABELLED, Listing, UnreadableInputError, sorted_listing
from extract.sources.tars import numbered_labels
from pipeline.classes import synsets_of
from pipeline.hub import offline_if_unreachable
from pipeline.runtime.errors import UserError

_SPLIT_NAME = re.compile(r"(train|test|val|valid|validation|dev|eval)\b", re.IGNORECASE)
_LABEL_NAMES = ("label", "labels", "cls", "class")


@dataclass(frozen=True, kw_only=True, slots=True)
class TableSource:
    """The rows of a data set."""

    name: str
    table: Any
    """A `datasets.Dataset` whose image column is not decoded."""
    image_column: str
    label_column: str | None

    @property
    def description(self) -> str:
        columns = f"image {self.image_column!r}, label {self.label_column!r}"
        return f"data set {self.name} ({len(self.table):,} rows; {columns})"

    @property
    def is_remote(self) -> bool:
        return False

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"image-column": self.image_column, "label-column": self.label_column}

    @property
    def as_served(self) -> None:
        return None

    @property
    def identity(self) -> str:
        return f"table\n{self.name}"

    def inputs(self) -> Listing:
        count = len(self.table)
        if not count:
            raise UserError(f"{self.name} has no rows; choose another --split")
        width = len(str(count - 1))
        labels, class_ids, notes = self._labels()
        return sorted_listing([f"{row:0{width}d}" for row in range(count)], labels, class_ids=class_ids, notes=notes)

    def _labels(self) -> tuple[Sequence[int], tuple[str, ...], list[str]]:
        if self.label_column is None:
            note = f"{self.name} has no label column that could be told (--label-column NAME): unlabelled"
            return [UNLABELLED] * len(self.table), (), [note]
        column = self.table.select_columns([self.label_column]).with_format("arrow")[:][self.label_column].to_pylist()
        names = getattr(self.table.features[self.label_column], "names", None)
        if names is None:
            labels, class_ids = numbered_labels(column)
            return labels, class_ids, []
        labels = [UNLABELLED if label is None else max(int(label), UNLABELLED) for label in column]
        return labels, synsets_of(names) or tuple(names), []

    def read(self, listing: Listing, index: int) -> bytes:
        del listing
        value = self.table[index][self.image_column]
        if isinstance(value, dict):
            if value.get("bytes") is not None:
                return bytes(value["bytes"])
            value = value.get("path")
        if isinstance(value, bytes):
            return value
        if value is None:
            raise UnreadableInputError("the row has no image")
        try:
            return Path(value).read_bytes()
        except FileNotFoundError as error:
            raise UserError(gone(value)) from error
        except OSError as error:
            raise UnreadableInputError(f"cannot be opened: {error.strerror}") from error


def open_table(data: str, split: str, image_column: str | None, label_column: str | None) -> TableSource:
    """The data set `hf:OWNER/NAME[:CONFIG]`, or a local folder of parquet or arrow files.

    Raises:
        UserError: it is not there, cannot be read, has no such split or column, or more than one could be meant.
    """
    import datasets

    try:
        if data.startswith("hf:"):
            name, _, config = data.removeprefix("hf:").partition(":")
            with offline_if_unreachable() as answers:
                try:
                    table = datasets.load_dataset(name, config or None, split=split)
                except Exception as error:  # many kinds
                    if answers:
                        raise
                    raise UserError(
                        f"{data} cannot be opened as a data set: it is not in the local cache, and the Hub cannot be "
                        f"reached; check the name, go online once, or give local files"
                    ) from error
        else:
            name = Path(data).name
            table = _local(Path(data), split)
    except UserError:
        raise
    except Exception as error:  # the Hub's client and the table readers raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{data} cannot be opened as a data set with split {split!r}: {reason}") from error
    image = _image_column(table.features, image_column, data)
    label = _label_column(table.features, label_column, data)
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    return TableSource(
        name=name,
        table=table.select_columns([image, *([label] if label else [])]),
        image_column=image,
        label_column=label,
    )


def holds_tables(folder: Path) -> bool:
    """Whether a folder is a data set: parquet or arrow files in it or one folder below."""
    return any(next(folder.glob(f"{depth}*.{kind}"), None) for depth in ("", "*/") for kind in ("parquet", "arrow"))


def _local(folder: Path, split: str) -> Any:
    import datasets

    if (folder / "state.json").is_file():
        return datasets.load_from_disk(str(folder))
    files = sorted(str(path) for path in folder.glob("*.parquet"))
    if files and not any(_SPLIT_NAME.match(Path(file).name) for file in files):
        return datasets.load_dataset("parquet", data_files=files, split="train")
    return datasets.load_dataset(str(folder), split=split)


def _image_column(features: Any, wanted: str | None, data: str) -> str:
    import datasets

    if wanted is not None:
        return _known_column(features, wanted, "--image-column", data)
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    images = images or [name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind]
    images = images or [n for n, k in features.items() if getattr(k, "dtype", None) in {"binary", "large_binary"}]
    if len(images) != 1:
        found = f"{len(images)} image columns ({', '.join(images)})" if images else "no image column"
        raise UserError(f"{data} has {found} among {', '.join(features)}; choose one by --image-column NAME")
    return images[0]


def _label_column(features: Any, wanted: str | None, data: str) -> str | None:
    import datasets

    if wanted is not None:
        return _known_column(features, wanted, "--label-column", data)
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    named = [name for name in labels or features if name in _LABEL_NAMES]
    if len(labels) > 1 and len(named) != 1:
        raise UserError(f"{data} has {len(labels)} label columns ({', '.join(labels)}); choose one by --label-column")
    return (named or labels or [None])[0]


def _known_column(features: Any, wanted: str, flag: str, data: str) -> str:
    if wanted not in features:
        raise UserError(f"{flag} {wanted}: {data} has no such column, only {', '.join(features)}")
    return wanted
