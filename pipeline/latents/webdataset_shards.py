"""Shards as tars that plain `webdataset` reads: per sample KEY.cls and KEY.moments.npy (or KEY.latent.npy).

USTAR headers with an integer time of 0, so that no member needs a PAX header and every sample takes the same number of
bytes: the tar is then an array of rows at known offsets. KEY is the sample's index with leading zeros.
webdataset writes the tars (65 µs more for a sample of 32 kB than by hand, with the same bytes; encoding takes
thousands). It does not read or check them here: it reads a tar only from its beginning, whole, at 10,900 samples/s in
random order where reads at offsets give 310,000 (docs/store.md), and does not tell where a damaged sample is.
NumPy has no bfloat16: such a member has the type `<V2`, and its values are read with `array.view(uint16)`.
"""

import io
import re
import tarfile
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.latents.shards import Column, Layout, RowType, ShardFile
from pipeline.runtime.errors import UserError

_BLOCK = 512
_END = 2 * _BLOCK
_RECORD = 10240
_KEY_DIGITS = 10
_LABEL_BYTES = 20  # more digits than an int64 has
_LABEL_AT = _BLOCK
_ARRAY_AT = 3 * _BLOCK
_DESCRIPTIONS = {"float16": "<f2", "bfloat16": "<V2", "float32": "<f4"}
_CARD = """---
configs:
- config_name: default
  data_files:
  - split: "{name}"
    path: "{split}-*.tar"
---

# A latent store

Images as a VAE encoded them, for training diffusion transformers. `manifest.json` says of which VAE they are, in which
scale, views and classes; the tars hold `KEY.cls` and `KEY.moments.npy` (or `KEY.latent.npy`) of every sample.

The lines above tell the Hugging Face Hub and `datasets.load_dataset("FOLDER")` that the tars are the data, not the
records beside them.
"""


def pieces(
    rows: NDArray[np.uint8], labels: NDArray[np.int64], indices: NDArray[np.int64], row: RowType
) -> Iterator[bytes | memoryview]:
    """The shard's bytes, piece by piece, from each sample's bytes [N, row.bytes]."""
    from webdataset.writer import TarWriter

    header, buffer = _array_header(row), io.BytesIO()
    with TarWriter(buffer, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
        for data, label, index in zip(rows, labels.tolist(), indices.tolist(), strict=True):
            key = f"{index:0{_KEY_DIGITS}d}"
            tar.write({"__key__": key, "cls": str(label).encode(), f"{row.tensor}.npy": header + data.tobytes()})
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


def dataset_card(split: str) -> bytes:
    """A README.md by which the Hub and `datasets` take the tars for the data, where they would take the records."""
    return _CARD.format(name=re.sub(r"\W", "_", split), split=split).encode()


def _array_header(row: RowType) -> bytes:
    """The .npy header, version 1.0, padded so that the values begin at a multiple of 64."""
    text = f"{{'descr': '{_DESCRIPTIONS[row.dtype]}', 'fortran_order': False, 'shape': {row.shape}, }}"
    length = -(-(10 + len(text) + 1) // 64) * 64 - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


def _stride(row: RowType) -> int:
    return _ARRAY_AT + -(-(len(_array_header(row)) + row.bytes) // _BLOCK) * _BLOCK


def _total(used: int) -> int:
    return -(-(used + _END) // _RECORD) * _RECORD


def read_layout(file: ShardFile, samples: int, row: RowType) -> Layout:
    """Where the rows stand, derived from the first sample's headers and checked against the last one's.

    Raises:
        UserError: the tar is damaged, was made by another program, or does not hold what the manifest promises.
    """
    stride = _stride(row)
    if file.size != _total(samples * stride):
        raise UserError(
            f"{file.path} has {file.size} bytes, but {samples} samples of {stride} take {_total(samples * stride)}; "
            "it is damaged or was packed by another program, restore it or extract again"
        )
    array_bytes = len(_array_header(row)) + row.bytes
    for number in sorted({0, samples - 1}) if samples else ():
        fault = _row_fault(bytes(file.read(number * stride, _ARRAY_AT + len(_array_header(row)))), row, array_bytes)
        if fault:
            raise UserError(f"{file.path}, row {number}, {fault}; it is damaged, restore it or extract again")
    return Layout(
        latents=Column(start=_ARRAY_AT + len(_array_header(row)), stride=stride, bytes=row.bytes),
        labels=Column(start=_LABEL_AT, stride=stride, bytes=_LABEL_BYTES),
        indices=Column(start=0, stride=stride, bytes=_KEY_DIGITS),
    )


def _row_fault(data: bytes, row: RowType, array_bytes: int) -> str | None:
    try:
        label = tarfile.TarInfo.frombuf(data[:_BLOCK], "utf-8", "strict")
        array = tarfile.TarInfo.frombuf(data[2 * _BLOCK : _ARRAY_AT], "utf-8", "strict")
        stream = io.BytesIO(data[_ARRAY_AT:])
        version = np.lib.format.read_magic(stream)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (tarfile.HeaderError, ValueError, UnicodeDecodeError) as error:
        return f"has a header that cannot be read ({error})"
    key = label.name.removesuffix(".cls")
    if array.name != f"{key}.{row.tensor}.npy" or len(key) != _KEY_DIGITS or not key.isdecimal():
        return f"holds {label.name} and {array.name} instead of KEY.cls and KEY.{row.tensor}.npy"
    if array.size != array_bytes or label.size > _LABEL_BYTES:
        return f"holds members of {label.size} and {array.size} bytes, expected {array_bytes} for the latter"
    if version != (1, 0) or is_fortran or shape != row.shape or dtype != np.dtype(_DESCRIPTIONS[row.dtype]):
        return f"holds an array {dtype} {shape}, expected {row.dtype} {row.shape}"
    return None


def decode_integers(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The labels or indices in the bytes [n, width] of their column: decimal digits, then zero bytes.

    Raises:
        ValueError: they are no number.
    """
    width, texts = data.shape[1], data.tobytes()
    starts = range(0, len(texts), width)
    return np.array([int(texts[start : start + width].rstrip(b"\0")) for start in starts], dtype=np.int64)
