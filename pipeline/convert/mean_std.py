"""Moments as EDM2's `dataset_tool.py encode` writes them, and REPA's tools, which grew out of it.

    dataset.json                             {"labels": [["00000/img-mean-std-00000000.npy", 6], …]}, or null
    00000/img-mean-std-00000000.npy …        [2C, h, w] float32: mean, then standard deviation; unscaled

in a folder or an uncompressed zip. A store holds log-variances: l = 2 ln(std). EDM2 gives its encoder pixels in
[0, 1], REPA in [−1, 1] as diffusers does; the files do not say which, and pictures depend on it.
"""

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeline.convert.source import CROP, FINGERPRINT, MOST_CLASSES, PIXELS, Rows, Source, as_views, reading
from pipeline.runtime.arrays import load_npy, load_zipped
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import check_length, check_regular, parse_json, read_regular, typed
from pipeline.vae import STABLE_DIFFUSION

_LOGVAR_RANGE = (-30.0, 20.0)
"""What readers clamp to; a standard deviation of 0 becomes the lower end."""
_JSON = "dataset.json"
_MSE = {**STABLE_DIFFUSION, "name": "stabilityai/sd-vae-ft-mse"}
# Of each channel of that VAE's latents of pixels in [0, 1] (the encoder's defaults in EDM2).
_EDM2_MEAN, _EDM2_STD = [5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]
_Load = Callable[[str], NDArray[Any]]


class _Labels(msgspec.Struct, frozen=True, kw_only=True):
    labels: list[tuple[str, Annotated[int, msgspec.Meta(ge=0, lt=MOST_CLASSES)]]] | None


def listed_repa(path: Path) -> Source:
    """The latents in REPA's folder `vae-sd`, or in the folder above it."""
    return _listed(path / "vae-sd" if (path / "vae-sd").is_dir() else path, _MSE, PIXELS)


def listed_edm2(path: Path) -> Source:
    """The latents in EDM2's zip or folder."""
    factors = {"scaling_factor": [1 / std for std in _EDM2_STD], "shift_factor": _EDM2_MEAN}
    return _listed(path, {**_MSE, **factors}, {"pixels": [0, 1]})


def _listed(path: Path, vae: Mapping[str, Any], overrides: Mapping[str, Any]) -> Source:
    names, data, load = _in_folder(path) if path.is_dir() else _zipped(path)
    if data is None:
        raise UserError(f"{path} has no {_JSON}, which tells the labels; fetch or encode it again")
    labels = _labels_of(names, data, f"{path}/{_JSON}")
    first = as_views(_load(load, path, names[0]), f"{path}/{names[0]}", views=1)
    values, height, width = first.shape[1:]
    if values % 2:
        raise UserError(
            f"{path}/{names[0]} has {values} values a cell, which are no means and deviations; check --from"
        )
    return Source(
        origin=path.name,
        names=names,
        labels=labels,
        kind="moments",
        shape=(values // 2, height, width),
        rows=partial(_rows, path, names, load, first.shape),
        unscaled=_with_logvar,
        vae=vae,
        overrides=overrides,
        channels=4,
        unknown=(FINGERPRINT, CROP),
    )


def _in_folder(folder: Path) -> tuple[list[str], bytes | None, _Load]:
    names = sorted(
        (Path(root) / file).relative_to(folder).as_posix()
        for root, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(".npy")
    )
    told = folder / _JSON
    return names, read_regular(told) if told.exists() else None, lambda name: load_npy(folder / name)


def _zipped(path: Path) -> tuple[list[str], bytes | None, _Load]:
    """Members are read in place under their names; nothing is unpacked, so no name in the zip becomes a path."""
    if not path.exists():
        raise UserError(f"{path} does not exist; check --from")
    check_regular(path)
    with reading(path, "a zip", "fetch or encode it again"):
        archive = zipfile.ZipFile(path)
        members = [member.filename for member in archive.infolist()]
        data = None
        if _JSON in members:
            check_length(archive.getinfo(_JSON).file_size, f"{path}/{_JSON}", advice="encode it again")
            data = archive.read(_JSON)
    if len(set(members)) < len(members):
        raise UserError(f"{path} holds a name twice; encode it again")
    names = sorted(name for name in members if name.lower().endswith(".npy"))
    return names, data, partial(load_zipped, archive)


def _labels_of(names: Sequence[str], data: bytes, where: str) -> NDArray[np.int64]:
    """The label of every name; −1 for all if the file gives none."""
    advice = "fetch or encode it again"
    told = typed(parse_json(data, where, advice=advice), _Labels, f"{where} tells no labels", advice=advice).labels
    odd = next((name for name in names if not name.isprintable()), None)
    if not names or odd is not None:
        what = "there is none (pictures go to dit-extract)" if odd is None else f"the name {odd!a:.60} is no text"
        raise UserError(f"{where} should stand beside an .npy for each image, but {what}; check --from")
    if told is None:
        return np.full(len(names), -1, dtype=np.int64)
    label_of = {name.replace("\\", "/"): label for name, label in told}
    missing = [name for name in names if name not in label_of]
    lost = sorted(set(label_of).difference(names)) if not missing else []
    if missing or lost:
        what = f"{missing[0]} and {len(missing) - 1:,} others have no label" if missing else ""
        what = what or f"{lost[0]!a} and {len(lost) - 1:,} others that it labels are not there"
        raise UserError(f"{where} and the .npy beside it do not fit together: {what[:200]}; fetch or encode them again")
    return np.array([label_of[name] for name in names], dtype=np.int64)


def _rows(
    path: Path, names: Sequence[str], load: _Load, shape: tuple[int, ...], indices: NDArray[np.int64]
) -> list[NDArray[Any]]:
    return [
        as_views(_load(load, path, names[index]), f"{path}/{names[index]}", views=1, like=shape) for index in indices
    ]


def _load(load: _Load, path: Path, name: str) -> NDArray[Any]:
    with reading(f"{path}/{name}", "a .npy array", "fetch or encode it again"):
        return load(name)


def _with_logvar(rows: Rows, _: Mapping[str, Any]) -> Rows:
    """Mean and log-variance; NaN for a deviation that is negative or infinite."""
    mean, std = np.split(rows, 2, axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        logvar = np.clip(2 * np.log(std), *_LOGVAR_RANGE)
    return np.concatenate([mean, np.where(np.isfinite(std), logvar, np.nan)], axis=2, dtype=np.float32)
