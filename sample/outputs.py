"""Finished images as a file a user opens: a labelled grid, a folder of PNGs, an ADM `.npz`, raw latents.

Each writer takes the parts of the result once, in order, and holds one of them at a time (the grid holds all of its
cells); equal parts give equal bytes: no time, no host and no order of a folder's listing goes in.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.image_grid import grid, save_png
from pipeline.runtime.files import explained_writes, replacing, sha256_of
from pipeline.runtime.gate import Count, Passed

Parts = Iterable[NDArray[Any]]
Labels = NDArray[np.int64]
ClassName = Callable[[int], str]
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
_PNG_WRITERS = 4
_IMAGE = re.compile(r"\d{6,}\.png")


def write_npz(path: Path, images: Parts, labels: Labels, *, pixels: tuple[int, int]) -> dict[str, Any]:
    """`arr_0` images uint8 [N, H, W, 3] and `arr_1` labels int64 [N], stored uncompressed, as ADM's tools read them."""
    with replacing(path) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            _store_array(archive, "arr_0", "|u1", (len(labels), *pixels, 3), images)
            _store_array(archive, "arr_1", "<i8", (len(labels),), [labels])
        return _describe_file(temporary, path)


def _store_array(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], parts: Parts) -> None:
    entry = zipfile.ZipInfo(f"{name}.npy", date_time=_ZIP_EPOCH)
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    with archive.open(entry, "w", force_zip64=True) as file:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        _write_parts(file, dtype, parts)


def write_latents(path: Path, latents: Parts, labels: Labels, *, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Safetensors: `latents` float32 [N, C, h, w], unscaled as the VAE's decoder takes them, and `label` int64 [N]."""
    fields = {"latents": ("F32", "<f4", (len(labels), *shape)), "label": ("I64", "<i8", (len(labels),))}
    header: dict[str, Any] = {}
    offset = 0
    for name, (kind, dtype, size) in fields.items():
        end = offset + int(np.dtype(dtype).itemsize * np.prod(size, dtype=np.int64))
        header[name] = {"dtype": kind, "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            _write_parts(file, "<f4", latents)
            _write_parts(file, "<i8", [labels])
        return _describe_file(temporary, path)


def _write_parts(file: IO[bytes], dtype: str, parts: Parts) -> None:
    for part in parts:
        file.write(np.ascontiguousarray(part, dtype=dtype).data)


def _describe_file(written: Path, final: Path) -> dict[str, Any]:
    return {"file": final.name, "bytes": written.stat().st_size, "sha256": sha256_of(written)}


def png_names(labels: Labels, folder_name: ClassName) -> list[str]:
    """What the images of a folder are called, relative to it."""
    return [Path(folder_name(int(label)), f"{index:06d}.png").as_posix() for index, label in enumerate(labels)]


def is_image_name(name: str) -> bool:
    """Whether a file of this relative path may be one of those images."""
    parts = name.split("/")
    return _IMAGE.fullmatch(parts[-1]) is not None and len(parts) <= 2


def fill_folder(out: Path, images: Parts, labels: Labels, *, folder_name: ClassName) -> dict[str, Any]:
    """`CLASS/INDEX.png` in a fresh folder that the caller publishes; images without a class have no CLASS/."""
    names = png_names(labels, folder_name)
    lines: list[str] = []
    with explained_writes(out), ThreadPoolExecutor(_PNG_WRITERS) as pool:
        for folder in {(out / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
        for part in images:
            batch = names[len(lines) : len(lines) + len(part)]
            lines += pool.map(_write_png, (out / name for name in batch), part, batch)
    return {"folder": out.name, "files": len(lines), "sha256": digest_of_lines(lines)}


def _write_png(path: Path, image: NDArray[np.uint8], name: str) -> str:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    path.write_bytes(buffer.getvalue())
    return f"{name} {hashlib.sha256(buffer.getvalue()).hexdigest()}\n"


def digest_of_lines(lines: Iterable[str]) -> str:
    """The SHA-256 over the sorted lines `NAME SHA256` of a folder's images."""
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Output(Passed):
    """What a sidecar says of an output: a file of so many bytes, or a folder of so many."""

    file: str | None = None
    bytes: Count | None = None
    files: Count | None = None
    sha256: str | None = None


def is_intact(path: Path, description: Output) -> bool:
    """Whether an output still is what its sidecar says, byte for byte."""
    if description.file is not None:
        same_size = path.is_file() and path.stat().st_size == description.bytes
        return same_size and sha256_of(path) == description.sha256
    files = sorted(path.rglob("*.png")) if path.is_dir() else []
    if len(files) != description.files:
        return False
    lines = (f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n" for file in files)
    return digest_of_lines(lines) == description.sha256


def write_grid(
    path: Path, images: Parts, labels: Labels, *, class_name: ClassName, columns: int | None
) -> dict[str, Any]:
    """The picture that `draw_grid` makes."""
    save_png(path, draw_grid(images, labels, class_name=class_name, columns=columns))
    return _describe_file(path, path)


def draw_grid(images: Parts, labels: Labels, *, class_name: ClassName, columns: int | None) -> Image.Image:
    """One picture: rows by class with `columns` images each; without `columns` a square, sorted by class."""
    cells = np.concatenate(list(images))
    if columns is not None:
        row_labels = [class_name(int(label)) for label in labels[::columns]]
        return grid(cells, columns=columns, row_labels=row_labels)
    order = np.argsort(labels, kind="stable")
    captions = [class_name(int(label)) for label in labels[order]] if labels.min() >= 0 else None
    side = int(np.ceil(np.sqrt(len(cells))))
    return grid(cells[order], columns=side, captions=captions)


def write_strip(path: Path, frames: NDArray[np.uint8], *, row_labels: list[str], captions: list[str]) -> dict[str, Any]:
    """The reverse process from left to right: `frames` [row, moment, H, W, 3], one caption per moment."""
    rows, moments = frames.shape[:2]
    cells = frames.reshape(rows * moments, *frames.shape[2:])
    picture = grid(cells, columns=moments, row_labels=row_labels, captions=captions * rows)
    save_png(path, picture)
    return _describe_file(path, path)
