"""Moments as MAR's `main_cache.py` writes them: an .npz per image in folders of classes, both views in each.

    n01440764/n01440764_10026.JPEG.npz       moments, moments_flip: [2C, h, w] float32 each, mean then log-variance

Unscaled; MAR multiplies by 0.2325 when it trains. Labels are the positions of the sorted folder names, as its own
loader (torchvision's DatasetFolder) gives them.
"""

import os
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.convert.source import BOTH_VIEWS, FINGERPRINT, PIXELS, Source, as_views, reading
from pipeline.runtime.arrays import load_zipped
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import check_regular

_ARRAYS = ("moments.npy", "moments_flip.npy")
_KL16 = {
    "name": "kl16",
    "class": "AutoencoderKL",
    "sha256": None,
    "scaling_factor": 0.2325,
    "shift_factor": None,
}


def listed(folder: Path) -> Source:
    """The latents in the class folders."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
    files = [sorted(path.name for path in (folder / name).glob("*.npz")) for name in classes]
    empty = [name for name, inside in zip(classes, files, strict=True) if not inside]
    if empty or not classes:
        what = f"there is none in {empty[0]!r:.60} and {len(empty) - 1} others" if empty else "there are no folders"
        raise UserError(f"{folder} must hold a folder for each class, each with .npz files, but {what}; check --from")
    names = [f"{name}/{file}" for name, inside in zip(classes, files, strict=True) for file in inside]
    first = _load(folder, names[0])
    values, height, width = first.shape[1:]
    if values % 2:
        raise UserError(f"{folder / names[0]} has {values} values a cell, which are no moments; check --from")
    return Source(
        origin=folder.absolute().name,
        names=names,
        labels=np.repeat(np.arange(len(classes), dtype=np.int64), [len(inside) for inside in files]),
        class_ids=classes,
        kind="moments",
        views=BOTH_VIEWS,
        shape=(values // 2, height, width),
        rows=partial(_rows, folder, names, first.shape),
        unscaled=lambda rows, _: rows,
        vae=_KL16,
        overrides=PIXELS,
        channels=16,
        downsample=16,
        unknown=(FINGERPRINT,),
    )


def _rows(folder: Path, names: Sequence[str], shape: tuple[int, ...], indices: NDArray[np.int64]) -> list[NDArray[Any]]:
    return [_load(folder, names[index], like=shape) for index in indices]


def _load(folder: Path, name: str, *, like: tuple[int, ...] | None = None) -> NDArray[Any]:
    path = folder / name
    with reading(path, "an .npz of both views", "cache it again"):
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            views = [load_zipped(archive, member) for member in _ARRAYS]
    if views[0].shape != views[1].shape:
        raise UserError(f"the two views in {path} differ in shape; cache it again")
    return as_views(np.stack(views), path, views=2, like=like)
