"""Which parquet and arrow files hold images, told by their schemas alone."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.hub import POINTER_ADVICE, is_pointer
from pipeline.runtime.errors import UserError

PATH_COLUMNS = ("image", "image_path", "img_path", "file_name", "filename", "file", "path", "filepath", "file_path")
LABEL_COLUMNS = ("label", "labels", "cls", "class")
_LOOKED_AT = 100
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.parquet|\.arrow)")


def holds_images(folder: Path, files: Sequence[Path], chosen: str | None) -> bool:
    """Whether the tables in a folder are a data set of images, and not a list beside one.

    Args:
        folder: where they are.
        files: the tables.
        chosen: what --image-column says.

    Raises:
        UserError: a table cannot be read.
    """
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return True
    schemas = [_schema(path) for path in files[:3]]
    return any(
        schema is not None and (chosen in schema.names or image_columns(schema) or _path_column(schema, files[0]))
        for schema in schemas
    )


def has_embedded(files: Sequence[Path]) -> bool:
    """Whether tables hold the images themselves, rather than paths to them."""
    return any(schema is not None and image_columns(schema) for schema in map(_schema, files[:3]))


def image_columns(schema: Any) -> list[str]:
    """The columns that hold encoded images: structs with bytes, and binary columns."""
    from pyarrow import types as kinds

    structs = [field.name for field in schema if kinds.is_struct(field.type) and _has_bytes(field.type)]
    return structs or [
        field.name for field in schema if kinds.is_binary(field.type) or kinds.is_large_binary(field.type)
    ]


def _path_column(schema: Any, file: Path) -> str | None:
    """A column of paths, where a column of labels stands beside it: else it is a list about files that folders name."""
    labelled = any(name in schema.names for name in LABEL_COLUMNS)
    names = [name for name in PATH_COLUMNS if name in schema.names] if labelled else []
    return next((name for name in names if _leads_to_file(file, name)), None)


def _leads_to_file(file: Path, column: str) -> bool:
    from pyarrow import parquet

    if file.suffix != ".parquet":
        return False
    batch = next(parquet.ParquetFile(file).iter_batches(_LOOKED_AT, columns=[column]), None)
    values = batch[0].to_pylist() if batch is not None else []
    return any(isinstance(value, str) and (file.parent / value).is_file() for value in values)


def _has_bytes(kind: Any) -> bool:
    return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))


def _schema(path: Path) -> Any:
    """The table's schema; None for an arrow file that is no table on its own."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            return parquet.read_schema(path)
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_stream(source).schema
    except (pa.ArrowException, OSError) as error:
        if path.suffix == ".arrow":
            return None
        what = POINTER_ADVICE if is_pointer(path) else f"cannot be read as parquet ({error}); fetch it again"
        raise UserError(f"{path} {what}, or leave it out by --ignore") from error


def refuse_missing(files: Sequence[Path], *, anyway: bool) -> str | None:
    """A line about numbered files (`train-00000-of-00002.parquet`) that are not all there, or None.

    Raises:
        UserError: some are missing, and nobody said that this is meant.
    """
    there: dict[tuple[str, int, str], set[int]] = {}
    for path in files:
        if found := _NUMBERED.fullmatch(path.name):
            there.setdefault((str(path.parent / found[1]), int(found[3]), found[4]), set()).add(int(found[2]))
    missing = [
        f"{Path(stem).name}-{number:05d}-of-{count:05d}{suffix}"
        for (stem, count, suffix), numbers in sorted(there.items())
        for number in range(count)
        if number not in numbers
    ]
    if not missing:
        return None
    count = f"{len(missing)} files of the data set are" if len(missing) > 1 else "1 file of the data set is"
    sentence = f"{count} missing ({', '.join(missing[:3])}{', …' if missing[3:] else ''})"
    if not anyway:
        raise UserError(f"{sentence} in {files[0].parent}; fetch what is missing, or read what is there by --anyway")
    return sentence
