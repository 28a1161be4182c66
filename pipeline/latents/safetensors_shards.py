"""Shards as safetensors: `index` [N], `label` [N], `moments` [N, V, 2C, H, W] (or `latent` [N, V, C, H, W]).

The header is written and parsed here rather than by the library, because the offsets of the rows are needed and because
the bytes must not change with the library's version. Any safetensors reader opens the file.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.latents.shards import Column, Layout, RowType, ShardFile
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import parse_json

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_LARGEST_HEADER = 1 << 20


def pieces(
    rows: NDArray[np.uint8], labels: NDArray[np.int64], indices: NDArray[np.int64], row: RowType
) -> Iterator[bytes | memoryview]:
    """The shard's bytes, piece by piece, from each sample's bytes [N, row.bytes]."""
    yield header(_tensors(len(rows), row))
    yield indices.astype("<i8").tobytes()
    yield labels.astype("<i8").tobytes()
    if rows.size:
        yield np.ascontiguousarray(rows).data.cast("B")


Described = tuple[str, str, tuple[int, ...], int]
"""(name, dtype as safetensors calls it, shape, bytes) of a tensor."""


def header(tensors: Sequence[Described]) -> bytes:
    """The beginning of a file that holds these tensors one after the other."""
    entries: dict[str, Any] = {}
    end = 0
    for name, dtype, shape, length in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensors(samples: int, row: RowType) -> list[Described]:
    return [
        ("index", "I64", (samples,), 8 * samples),
        ("label", "I64", (samples,), 8 * samples),
        (row.tensor, DTYPES[row.dtype], (samples, *row.shape), row.bytes * samples),
    ]


def read_layout(file: ShardFile, samples: int, row: RowType) -> Layout:
    """Where the rows stand.

    Raises:
        UserError: the header is damaged, or does not hold the tensors that the manifest promises.
    """
    starts = starts_of(file, _tensors(samples, row))
    return Layout(
        latents=Column(start=starts[row.tensor], stride=row.bytes, bytes=row.bytes),
        labels=Column(start=starts["label"], stride=8, bytes=8),
        indices=Column(start=starts["index"], stride=8, bytes=8),
    )


def starts_of(file: ShardFile, tensors: Sequence[Described]) -> dict[str, int]:
    """The byte at which each of the tensors begins.

    Raises:
        UserError: the header is damaged, or does not hold just these tensors so.
    """
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else _LARGEST_HEADER + 1
    if length > min(_LARGEST_HEADER, file.size - 8):
        raise UserError(f"{file.path} is no safetensors file: its header cannot be {length} bytes long; extract again")
    entries = parse_json(
        bytes(file.read(8, length)), f"the header of {file.path}", advice="restore it or extract again"
    )
    try:
        starts = {
            name: 8 + length + _start(entries[name], dtype, shape, bytes_, file.size - 8 - length)
            for name, dtype, shape, bytes_ in tensors
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file.path} does not hold what the manifest promises ({error}); "
            "it is damaged or of another store, restore it or extract again"
        ) from error
    return starts


def _start(entry: Any, dtype: str, shape: tuple[int, ...], length: int, size: int) -> int:
    start, end = entry["data_offsets"]
    if entry["dtype"] != dtype or tuple(entry["shape"]) != shape:
        raise ValueError(f"found {entry['dtype']} {entry['shape']}, expected {dtype} {list(shape)}")
    if not (isinstance(start, int) and isinstance(end, int) and start >= 0 and end <= size and end - start == length):
        raise ValueError(f"data_offsets {entry['data_offsets']} do not fit {math.prod(shape)} values")
    return start


def decode_integers(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The labels or indices in the bytes [n, 8] of their column."""
    return np.ascontiguousarray(data).view("<i8").reshape(-1).astype(np.int64)
