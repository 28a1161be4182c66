"""What the pages of a parquet file claim to unpack to, told by their headers before any is unpacked."""

import mmap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

from pipeline.runtime.console import printable
from pipeline.runtime.errors import UserError
from pipeline.runtime.units import size

LEAVE_OUT: Final = ", or leave it out by --ignore"
"""The end of what is said of a table among others."""
MOST_UNPACKED: Final = 1 << 29
"""Bytes that are unpacked at once, as one page of each column is; more only where the file has a part of them."""
_TIMES_HELD: Final = 4
_LONGEST_KEPT: Final = 200
_MOST_LISTED: Final = 1 << 20
"""Of anything in a footer: row groups, columns, parts of a name."""
_FOOTER_END: Final = 8
_DICTIONARY: Final = 2
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_VARINTS: Final = (4, 5, 6)
"""Types of Thrift's compact protocol."""


class _Page(NamedTuple):
    unpacked: int
    held: int
    """Bytes in the file."""
    is_dictionary: bool


def most_at_once(held: int) -> int:
    """Bytes that so many bytes of a file may unpack to at once."""
    return max(MOST_UNPACKED, _TIMES_HELD * held)


def check_pages(path: Path, *, parts: int | None = None) -> None:
    """Compare what pages claim to unpack to with their bytes in the file.

    A part is read with one page of each of its columns unpacked, and the columns' dictionaries.

    Args:
        parts: how many parts are looked at; None for all.

    Raises:
        UserError: those of a part claim more at once than 537 MB and four times their bytes.
        ValueError: a header or the file's end is damaged.
    """
    with path.open("rb") as file, closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
        end = len(data) - _FOOTER_END
        begin = end - int.from_bytes(data[end : end + 4], "little")
        if begin < 0:
            raise ValueError("its end does not lie in it")
        try:
            for part in _struct(data, begin)[0].get(4, ())[:parts]:
                _check_part(path, {_name(column): list(_pages(data, column, begin)) for column in part.get(1, ())})
        except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("a header in it is none") from error


def _check_part(path: Path, columns: dict[str, list[_Page]]) -> None:
    largest = {
        name: [
            max((page for page in pages if page.is_dictionary is kind), default=_Page(0, 0, kind))
            for kind in (False, True)
        ]
        for name, pages in columns.items()
    }
    unpacked, held = (sum(page[what] for pages in largest.values() for page in pages) for what in (0, 1))
    if unpacked > most_at_once(held):
        name = max(largest, key=lambda name: max(largest[name]))
        page = max(largest[name])
        raise UserError(
            f"{path}: a page of its column {printable(name)!r} claims {size(page.unpacked)} unpacked, of {page.held:,} "
            f"bytes in the file (with the other columns' {size(unpacked)}), where {size(MOST_UNPACKED)}, or "
            f"{_TIMES_HELD} times the file's bytes, are the most; write it with smaller pages{LEAVE_OUT}"
        )


def _name(column: dict[int, Any]) -> str:
    return ".".join(part.decode("utf-8", "replace") for part in column[3][3])


def _pages(data: mmap.mmap, column: dict[int, Any], most: int) -> Iterator[_Page]:
    """Those of a column's part, as long as it has values left, as readers go through them."""
    told = column[3]
    at, dictionary = told[9], told.get(11, 0)
    at = dictionary if 0 < dictionary < at else at
    end, left = at + told[7], told[5]
    while at < end and left > 0:
        header, body = _struct(data, at)
        unpacked, held, values = header[2], header[3], header.get(5, header.get(8, {})).get(1, 0)
        if min(at, unpacked, held, values) < 0 or body + held > most:
            raise ValueError(f"a page of its column {_name(column)!r} lies outside of the file, or has less than none")
        yield _Page(unpacked, held, header[1] == _DICTIONARY)
        at, left = body + held, left - values


def _struct(data: mmap.mmap, at: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct by number, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while data[at]:
        kind, step = data[at] & 15, data[at] >> 4
        at += 1
        if step:
            number += step
        else:
            number, at = _whole(data, at)
        if kind in {_TRUE, _FALSE}:
            fields[number] = kind == _TRUE
        else:
            fields[number], at = _value(data, at, kind)
    return fields, at + 1


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind in _VARINTS:
        return _whole(data, at)
    if kind == _STRUCT:
        return _struct(data, at)
    if kind in {_TRUE, _FALSE, _BYTE}:  # in lists
        return data[at], at + 1
    if kind == _DOUBLE:
        return None, at + 8
    if kind == _BINARY:
        length, at = _varint(data, at)
        return data[at : at + min(length, _LONGEST_KEPT)], at + length
    if kind not in {_LIST, _SET}:
        raise KeyError(kind)
    count, inner, at = data[at] >> 4, data[at] & 15, at + 1
    if count == 15:
        count, at = _varint(data, at)
    if count > _MOST_LISTED:
        raise KeyError(count)
    values = []
    for _ in range(count):
        value, at = _value(data, at, inner)
        values.append(value)
    return values, at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    number = shift = 0
    while data[at] > 127:
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if shift > 63:
            raise IndexError(at)
    return number | data[at] << shift, at + 1


def _whole(data: mmap.mmap, at: int) -> tuple[int, int]:
    number, at = _varint(data, at)
    return number >> 1 ^ -(number & 1), at
