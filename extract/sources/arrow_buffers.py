"""What the buffers of an Arrow file claim to unpack to, told by its messages before any is unpacked.

Compressed (LZ4 or zstd), a buffer begins with eight bytes for its size unpacked, which are taken as memory at once.
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from extract.sources.pages import LEAVE_OUT, most_at_once
from pipeline.runtime.errors import UserError
from pipeline.runtime.units import size

_MAGIC: Final = b"ARROW1"
"""At both ends of a file that has a footer; other files are streams of messages."""
_OLD_MARK: Final = b"ARROW:experimental_compression"
_STORED: Final = -1
"""In place of a size: the buffer follows as it is."""
_BATCH_IN_DICTIONARY, _BUFFERS, _COMPRESSION = 1, 2, 3
_HEADER_TYPE, _HEADER = 1, 2
_DICTIONARY, _RECORDS = 2, 3
_DICTIONARIES_OF_FILE, _RECORDS_OF_FILE = 2, 3
_BUFFER: Final = struct.Struct("<qq")
"""Where it is in the message's body, and its bytes."""
_BLOCK: Final = struct.Struct("<qi4xq")
"""Where a message is in the file, the bytes of its metadata, and those of its body."""


def check_buffers(path: Path) -> int:
    """Compare what compressed buffers claim with their bytes in the file, and every batch with itself.

    Gives how many bytes are unpacked where the whole file is read at once.

    Raises:
        UserError: those of a batch claim more at once than pages of a parquet may, or its dictionaries do.
        ValueError, EOFError, pyarrow.ArrowException: the file is damaged.
    """
    import pyarrow as pa

    unpacked = 0
    with pa.memory_map(str(path)) as source:
        has_footer = source.read(len(_MAGIC)) == _MAGIC
        source.seek(0)
        for message in _of_file(source) if has_footer else pa.ipc.MessageReader.open_stream(source):
            claims, held = _claims(message), 0 if message.body is None else message.body.size
            if min(claims, default=0) < 0:
                raise ValueError("a buffer in it claims less than nothing")
            _refuse_more(path, sum(claims), held)
            unpacked += sum(claims)
        source.seek(0)
        for batch in _batches(source, has_footer=has_footer):
            batch.validate(full=True)  # else a value may lie outside of the file, and reading it ends the process
            decoded = decoded_bytes(batch)
            _refuse_more(path, decoded, batch.nbytes)
            unpacked += decoded
    return unpacked


def _refuse_more(path: Path, claimed: int, held: int) -> None:
    if claimed > most_at_once(held):
        raise UserError(
            f"{path}: its buffers claim {size(claimed)} unpacked at once, of {held:,} bytes in the file, where "
            f"{size(most_at_once(held))} is the most; write it with smaller batches or without compression{LEAVE_OUT}"
        )


def decoded_bytes(batch: Any) -> int:
    """What the columns of a batch that have a dictionary take with a value in each row, as `datasets` reads them.

    Raises:
        ValueError, pyarrow.ArrowException: a dictionary is of lists or the like, or within a column.
    """
    import pyarrow as pa
    from pyarrow import compute

    decoded = 0
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            kind = column.type.value_type
            if pa.types.is_primitive(kind):
                decoded += len(column) * kind.bit_width // 8
            else:
                lengths = compute.cast(compute.binary_length(column.dictionary), pa.int64())
                decoded += compute.sum(lengths.take(column.indices)).as_py() or 0
        elif "dictionary<" in str(column.type):
            raise ValueError("a dictionary within a column is not read")
    return decoded


def _batches(source: Any, *, has_footer: bool) -> Iterator[Any]:
    import pyarrow as pa

    if not has_footer:
        yield from pa.ipc.open_stream(source)
        return
    file = pa.ipc.open_file(source)
    yield from (file.get_batch(number) for number in range(file.num_record_batches))


def _of_file(source: Any) -> Iterator[Any]:
    """The messages that the footer of a file names."""
    import pyarrow as pa

    pa.ipc.open_file(source)  # whose footer is looked through by this
    end = source.size() - len(_MAGIC) - 4
    source.seek(end)
    begin = end - int.from_bytes(source.read(4), "little")
    source.seek(begin)
    footer = source.read(end - begin)
    root = _number(footer, 0)
    for kind in (_DICTIONARIES_OF_FILE, _RECORDS_OF_FILE):
        places = [place for place, _, _ in _structs(footer, root, kind, _BLOCK)]
        if places != sorted(set(places)):
            raise ValueError("its footer names a part twice, or not in order")
        for place in places:
            source.seek(place)
            yield pa.ipc.read_message(source)


def _claims(message: Any) -> Sequence[int]:
    """What each compressed buffer of a message claims to have unpacked."""
    data = message.metadata.to_pybytes()
    root = _number(data, 0)
    kind, header = _field(data, root, _HEADER_TYPE), _table(data, root, _HEADER)
    if not kind or data[kind] not in {_DICTIONARY, _RECORDS}:
        return []
    batch = _table(data, header, _BATCH_IN_DICTIONARY) if data[kind] == _DICTIONARY else header
    if not _field(data, batch, _COMPRESSION) and _OLD_MARK not in data:
        return []
    body = memoryview(message.body)
    first = (body[at : at + 8] for at, held in _structs(data, batch, _BUFFERS, _BUFFER) if held > 0)
    claims = [int.from_bytes(number, "little", signed=True) for number in first]
    return [claim for claim in claims if claim != _STORED]


# ---- FlatBuffers: a table begins with its distance from a list of where its fields lie in it


def _number(data: bytes, at: int, kind: str = "<I") -> int:
    try:
        return int(struct.unpack_from(kind, data, at)[0])
    except struct.error as error:
        raise ValueError("a message in it is none") from error


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a table lies; 0 where it has none."""
    listed, place = table - _number(data, table, "<i"), 4 + 2 * number
    offset = _number(data, listed + place, "<H") if place < _number(data, listed, "<H") else 0
    return table + offset if offset else 0


def _table(data: bytes, table: int, number: int) -> int:
    """What a field of a table leads to."""
    field = _field(data, table, number)
    return field + _number(data, field) if field else 0


def _structs(data: bytes, table: int, number: int, kind: struct.Struct) -> Iterator[tuple[int, ...]]:
    """The structs in a list that a field of a table leads to."""
    if start := _table(data, table, number):
        try:
            yield from kind.iter_unpack(data[start + 4 : start + 4 + kind.size * _number(data, start)])
        except struct.error as error:
            raise ValueError("a list in it is cut off") from error
