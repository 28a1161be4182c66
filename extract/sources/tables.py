"""Which parquet and arrow files hold images, told by their schemas alone."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from extract.sources.arrow_buffers import check_buffers, decoded_bytes
from extract.sources.pages import LEAVE_OUT, check_pages
from pipeline.hub import POINTER_ADVICE, is_pointer
from pipeline.runtime.console import printable
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import check_regular
from pipeline.runtime.units import size

PATH_COLUMNS = ("image", "image_path", "img_path", "file_name", "filename", "file", "path", "filepath", "file_path")
LABEL_COLUMNS = ("label", "labels", "cls", "class")
_KINDS = ("parquet", "arrow")
_LOOKED_AT = 100
_MOST_ROWS_PER_BYTE = 1032
"""Each row has an image or a path; this much a deflated stream holds at most."""
_ROWS_AT_ONCE = 4
_MOST_AT_ONCE = 1 << 30
"""Bytes of so many rows, unpacked; an image's as a file may have as many."""
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.parquet|\.arrow)")


class _Columns(NamedTuple):
    names: list[str]
    images: list[str]
    """Those that hold encoded images."""

    @classmethod
    def of(cls, schema: Any) -> "_Columns":
        return cls(schema.names, _image_columns(schema))


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
    return any(
        columns.images or chosen in columns.names or _path_column(columns.names, files[0])
        for columns in map(_columns, files[:3])
    )


def has_embedded(files: Sequence[Path]) -> bool:
    """Whether tables hold the images themselves, rather than paths to them."""
    return any(columns.images for columns in map(_columns, files[:3]))


def _image_columns(schema: Any) -> list[str]:
    """The columns that hold encoded images: structs with bytes, and binary columns."""
    from pyarrow import types as kinds

    structs = [field.name for field in schema if kinds.is_struct(field.type) and _has_bytes(field.type)]
    return structs or [
        field.name for field in schema if kinds.is_binary(field.type) or kinds.is_large_binary(field.type)
    ]


def _path_column(columns: Sequence[str], file: Path) -> str | None:
    """A column of paths, where a column of labels stands beside it: else it is a list about files that folders name."""
    labelled = any(name in columns for name in LABEL_COLUMNS)
    names = [name for name in PATH_COLUMNS if name in columns] if labelled else []
    return next((name for name in names if _leads_to_file(file, name)), None)


def _leads_to_file(file: Path, column: str) -> bool:
    from pyarrow import parquet

    if file.suffix != ".parquet":
        return False
    with _told(file, "parquet"), parquet.ParquetFile(file) as table:
        check_pages(file, parts=1)
        first = range(min(1, table.num_row_groups))
        batch = next(table.iter_batches(_LOOKED_AT, row_groups=first, columns=[column]), None)
        values = batch[0].to_pylist() if batch is not None else []
    return any(isinstance(value, str) and leads_to_file(file.parent / value) for value in values)


def leads_to_file(path: Path) -> bool:
    """Whether a regular file is there; of no path that a system refuses."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _has_bytes(kind: Any) -> bool:
    return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))


def check_table(path: Path, kind: str | None = None) -> None:
    """Compare what a parquet file says at its end with its bytes and this machine's memory, before a page is read.

    Args:
        path: the table.
        kind: "parquet", whatever its name; None where that tells.

    Raises:
        UserError: it is no regular file, no parquet, or claims what cannot be in it.
    """
    from pyarrow import parquet

    from pipeline.runtime.devices import machine_bytes

    check_regular(path)
    if _kind(path, kind) != "parquet":
        return
    with _told(path, "parquet"):
        footer, held = parquet.read_metadata(path), path.stat().st_size
        # Nothing is asked of a part's columns: of damaged ones pyarrow ends the process (a C++ exception goes through).
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    rows, most = footer.num_rows, machine_bytes()
    fault = None
    if rows < 0 or rows != sum(group.num_rows for group in groups) or any(group.num_rows < 0 for group in groups):
        fault = f"it claims {rows:,} rows, and its parts others"
    elif rows > held * _MOST_ROWS_PER_BYTE:
        fault = f"it claims {rows:,} rows in {held:,} bytes"
    elif any(group.total_byte_size < 0 or group.total_byte_size > most for group in groups):
        fault = f"a part of it claims more at once than the {size(most)} that this machine has, or less than nothing"
    if fault is not None:
        raise UserError(f"{path} is damaged: {fault}; fetch it again{LEAVE_OUT}")


def _kind(path: Path, known: str | None) -> str:
    return known if known in _KINDS else path.suffix[1:]


def check_contents(path: Path, kind: str | None = None) -> int:
    """Unpack a table a few rows or a batch at a time, before whoever reads it takes a part, or all, at once.

    What pages hold unpacked is told by nothing else: a thousand bytes can be a gigabyte, and a value that a dictionary
    has once stands in any number of rows. Gives how many bytes an arrow file unpacks to where it is read at once.

    Args:
        path: the table.
        kind: as in `check_table`; "arrow", too.

    Raises:
        UserError: some rows, or a part, are larger unpacked than an image or this machine's memory, or cannot be read.
    """
    kind = _kind(path, kind)
    if kind == "arrow":
        with _told(path, kind):
            return check_buffers(path)
    if kind == "parquet":
        _check_rows(path)
    return 0


def _check_rows(path: Path) -> None:
    from pyarrow import parquet

    from pipeline.runtime.devices import machine_bytes

    with _told(path, "parquet"), parquet.ParquetFile(path) as file:
        check_pages(path)
        for group in range(file.num_row_groups):
            whole = 0
            for rows in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], use_threads=False):
                held = rows.nbytes + decoded_bytes(rows)
                whole += held
                for taken, most, what in ((held, _MOST_AT_ONCE, "few rows"), (whole, machine_bytes(), "a part")):
                    if taken > most:
                        raise UserError(
                            f"{path} holds {size(taken)} and more in {what} once it is unpacked, where {size(most)} is "
                            f"the most; write it with smaller images or parts{LEAVE_OUT}"
                        )


@contextlib.contextmanager
def _told(path: Path, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError, EOFError) as error:
        reason = printable(" ".join(str(error).split())[:300])
        what = POINTER_ADVICE if is_pointer(path) else f"cannot be read as {kind} ({reason}); fetch it again"
        raise UserError(f"{path} {what}{LEAVE_OUT}") from error


def _columns(path: Path) -> _Columns:
    """The table's columns; none of an arrow file that is no table on its own."""
    import pyarrow as pa
    from pyarrow import parquet

    check_table(path)
    if path.suffix == ".parquet":
        with _told(path, "parquet"):
            return _Columns.of(parquet.read_schema(path))
    try:
        with pa.memory_map(str(path)) as source:
            return _Columns.of(pa.ipc.open_stream(source).schema)
    except (pa.ArrowException, OSError, ValueError):  # names that are no Unicode, the file's too
        return _Columns([], [])


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
