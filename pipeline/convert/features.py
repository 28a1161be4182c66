"""Features as fast-DiT and its forks write them: one `.npy` per image.

    FOLDER/imagenet256_features/0.npy …   [1, C, H, W], one draw of the posterior, scaled (Stable Diffusion: × 0.18215)
    FOLDER/imagenet256_labels/0.npy …     [1] whole number

Such files hold one latent per image and no spread, so the store's kind is "point", and it can be flipped no more: what
was drawn and flipped when the features were made stays so. The scale is divided out, because stores hold unscaled
latents. Nothing in the files says which VAE made them; say it, or `find_vae` cannot compare fingerprints later.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.convert.imports import import_latents
from pipeline.convert.source import CROP, FINGERPRINT, Rows, Source, as_views, reading
from pipeline.runtime.arrays import load_npy
from pipeline.runtime.console import progress
from pipeline.runtime.errors import UserError
from pipeline.vae import STABLE_DIFFUSION


def listed(folder: Path) -> Source:
    """The features in the folder of that kind, with the labels beside it."""
    pairs = [
        (path, path.with_name(path.name.removesuffix("_features") + "_labels"))
        for path in (sorted(folder.glob("*_features")) if folder.is_dir() else [])
        if path.is_dir()
    ]
    if len(pairs) != 1:
        found = f"{len(pairs)} of them ({', '.join(path.name for path, _ in pairs)})" if pairs else "none"
        raise UserError(
            f"{folder} must hold one folder named *_features, beside it one named *_labels, with a .npy per image in "
            f"each, as fast-DiT writes them; found {found}"
        )
    features, labels = pairs[0]
    names, label_names = _names(features), set(_names(labels))
    alone = [name for name in names if name not in label_names] or sorted(label_names - set(names))
    if alone or not names:
        what = f"{alone[0]} (and {len(alone) - 1} others) is in one of them only" if alone else "there is no .npy"
        raise UserError(f"{features} and {labels} must hold the same names, one per image, but {what}")
    _, channels, height, width = as_views(_load(features / names[0]), features / names[0], views=1).shape
    return Source(
        origin=features.name,
        names=names,
        prefix=f"{features.name}/",
        labels=_labels(labels, names),
        kind="point",
        shape=(channels, height, width),
        rows=partial(_rows, features, names, (1, channels, height, width)),
        unscaled=_divided,
        vae=STABLE_DIFFUSION,
        overrides={},
        channels=4,
        unknown=(FINGERPRINT, CROP, "which images were flipped"),
    )


def _names(folder: Path) -> list[str]:
    """The .npy files, 2 before 10."""
    names = [path.name for path in folder.glob("*.npy")]
    return sorted(names, key=lambda name: (not name[:-4].isdecimal(), name.zfill(24), name))


def _labels(folder: Path, names: Sequence[str]) -> NDArray[np.int64]:
    """Every label, in the order of the names."""
    labels = np.empty(len(names), dtype=np.int64)
    with progress(len(names), unit="labels", description="reading") as bar:
        for number, name in enumerate(names):
            value = _load(folder / name)
            if value.size != 1 or not np.issubdtype(value.dtype, np.integer):
                raise UserError(f"{folder / name} holds {value.dtype} {value.shape}, not one whole number")
            labels[number] = value.item()
            bar.update(1)
    return labels


def _rows(folder: Path, names: Sequence[str], shape: tuple[int, ...], indices: NDArray[np.int64]) -> list[NDArray[Any]]:
    paths = [folder / names[index] for index in indices]
    return [as_views(_load(path), path, views=1, like=shape) for path in paths]


def _load(path: Path) -> NDArray[Any]:
    with reading(path, "a .npy array", "mend or remove it and its partner"):
        return load_npy(path)


def _divided(rows: Rows, vae: Mapping[str, Any]) -> Rows:
    """z = x / scale + shift."""
    scale, shift = (np.asarray(vae[key] or 0.0, dtype=np.float32) for key in ("scaling_factor", "shift_factor"))
    return rows / scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)


import_numpy_features = partial(import_latents, layout="fast-dit")
"""A store of kind "point" from such a folder, under the name that this had before there were other layouts."""
