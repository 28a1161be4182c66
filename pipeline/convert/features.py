"""Other people's features as a latent store: one `.npy` per image, as fast-DiT and its forks write them.

    FOLDER/imagenet256_features/0.npy …   [1, C, H, W], one draw of the posterior, scaled (Stable Diffusion: × 0.18215)
    FOLDER/imagenet256_labels/0.npy …     [1] whole number

Such files hold one latent per image and no spread, so the store's kind is "point", and it can be flipped no more: what
was drawn and flipped when the features were made stays so. The scale is divided out, because stores hold unscaled
latents. Nothing in the files says which VAE made them; say it, or `find_vae` cannot compare fingerprints later.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.classes import imagenet_classes
from pipeline.latents.manifest import LatentSpec, Manifest
from pipeline.latents.names import MANIFEST_FILE, WORK_FOLDER
from pipeline.latents.writer import (
    DTYPES,
    StoreDescription,
    finish_store,
    read_record,
    store_files,
    unstorable_rows,
    write_shard,
)
from pipeline.randomness import Permutation
from pipeline.runtime.console import progress
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes, make_folder, read_json, remove_folder
from pipeline.runtime.publish import claimed, making, sweep, work_folder_of
from pipeline.vae import STABLE_DIFFUSION

_DOWNSAMPLE = 8
_LOOKED_AT = 64
_CHANNELS = 4
"""Of Stable Diffusion's latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Features:
    """A folder of features, listed."""

    folder: Path
    label_folder: Path
    names: tuple[str, ...]
    """File names, in the order of their numbers; the same in both folders."""
    shape: tuple[int, int, int]
    """[channels, height, width]."""

    def latents(self, indices: NDArray[np.int64], vae: Mapping[str, Any], dtype: str) -> Tensor:
        """Unscaled points [n, 1, C, H, W] in the store's dtype: z = x / scale + shift."""
        arrays = [_load(self.folder / self.names[index]) for index in indices]
        wrong = [index for index, array in zip(indices, arrays, strict=True) if _shape_of(array) != self.shape]
        if wrong:
            raise UserError(
                f"{self.folder / self.names[wrong[0]]} is not [1, {', '.join(map(str, self.shape))}] like the first "
                f"file, and so {len(wrong) - 1} others near it; remove or mend what does not belong there"
            )
        empty = np.empty((0, *self.shape), dtype=np.float32)
        scaled = np.concatenate([empty, *(array.reshape(1, *self.shape).astype(np.float32) for array in arrays)])
        scale, shift = (np.asarray(vae[key] or 0.0, dtype=np.float32) for key in ("scaling_factor", "shift_factor"))
        unscaled = scaled / scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
        latents = torch.from_numpy(unscaled)[:, None]
        bad = unstorable_rows(latents, dtype)
        if len(bad):
            raise UserError(
                f"{self.folder / self.names[indices[bad[0]]]} (and {len(bad) - 1} others near it) holds values that "
                f"are not finite in {dtype}; mend or remove it and its label"
            )
        return latents.to(DTYPES[dtype])

    def fingerprint(self) -> str:
        """A hash over the bytes of a few of the files, which other features under the same names do not share."""
        few = Permutation(len(self.names), 0, "fingerprint of features")
        digest = hashlib.sha256()
        for index in few[np.arange(min(_LOOKED_AT, len(self.names)), dtype=np.int64)]:
            digest.update(_load(self.folder / self.names[index]).tobytes())
        return digest.hexdigest()

    def labels(self) -> NDArray[np.int64]:
        """Every label, in the order of the names."""
        labels = np.empty(len(self.names), dtype=np.int64)
        with progress(len(self.names), unit="labels", description="reading") as bar:
            for number, name in enumerate(self.names):
                value = _load(self.label_folder / name)
                if value.size != 1 or not np.issubdtype(value.dtype, np.integer):
                    raise UserError(
                        f"{self.label_folder / name} holds {value.dtype} {value.shape}, not one whole number"
                    )
                labels[number] = value.item()
                bar.update(1)
        return labels


def import_numpy_features(
    folder: str | Path,
    out: str | Path,
    *,
    vae: Mapping[str, Any] = STABLE_DIFFUSION,
    downsample: int = _DOWNSAMPLE,
    channels: int | None = None,
    class_names: Sequence[str] | None = None,
    split: str = "train",
    shard_format: str = "safetensors",
    store_dtype: str = "float16",
    samples_per_shard: int = 4096,
    seed: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """The manifest of a version-1 store of kind "point" made from `*_features/*.npy` and `*_labels/*.npy`.

    Running it again continues where it stopped.

    Args:
        folder: what holds the two folders.
        out: the store.
        vae: the VAE that made the features, as `Vae.describe` gives it; its scaling_factor is divided out.
        downsample: pixels along one side of a latent cell.
        channels: of the VAE's latents, where known; Stable Diffusion's are.
        class_names: readable names, index = label; ImageNet's if the folders are named after it and more than half of
            its thousand labels lie in range, else the numbers.
        overwrite: begin anew, where an earlier import left a store; it stays whole until the new one is.

    Raises:
        UserError: the folders are not there or do not fit together, a file is damaged, or `out` holds something else.
    """
    features = _list(Path(folder))
    _check_channels(features, vae, channels)
    out = Path(out).absolute()
    labels = features.labels()
    class_ids, classes = _classes(features, labels, class_names)
    _, height, width = features.shape
    settings = [features.names, features.shape, dict(vae), split, shard_format, store_dtype, samples_per_shard, seed]
    contents = [features.folder.name, features.fingerprint(), labels.tolist(), class_ids, classes]
    plan = hashlib.sha256(json.dumps([*settings, *contents]).encode()).hexdigest()
    description = StoreDescription(
        split=split,
        shard_format=shard_format,
        latent=LatentSpec(
            kind="point",
            channels=features.shape[0],
            height=height,
            width=width,
            dtype=store_dtype,
            downsample=downsample,
        ),
        views=["center"],
        image={"size": height * downsample, "crop": "adm-center"},
        vae=vae,
        classes=classes,
        class_ids=class_ids,
        seed=seed,
        plan=plan,
    )
    sweep(out)
    _check_out(out, split)
    order = Permutation(len(labels), seed, "extract-order")[np.arange(len(labels), dtype=np.int64)]
    parts = [order[start : start + samples_per_shard] for start in range(0, len(order), samples_per_shard)]
    with (
        explained_writes(out),
        _folder_for(out, overwrite=overwrite) as place,
        progress(len(order), unit="samples", description="importing") as bar,
    ):
        for shard, indices in enumerate(parts):
            if read_record(place, split, shard, plan=plan) is None:
                latents = features.latents(indices, vae, store_dtype)
                keys = [f"{features.folder.name}/{features.names[index]}" for index in indices]
                write_shard(
                    place, split, shard, shard_format, latents, labels[indices], indices, keys, kind="point", plan=plan
                )
            bar.update(len(indices))
        manifest = finish_store(place, description, shards=len(parts))
    assert manifest is not None
    return manifest


@contextmanager
def _folder_for(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Where this process alone makes the store.

    That is in place, so that an import goes on after a kill; or, where a store is to be replaced, out of sight until
    the new one is whole.
    """
    if overwrite:
        with making(out, overwrite=True) as stage:
            place = stage.place(out)
            make_folder(place)
            yield place
    else:
        with claimed(work_folder_of(out)):
            remove_folder(out / WORK_FOLDER)  # of a killed one
            make_folder(out)
            yield out


def _list(folder: Path) -> _Features:
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
    shape = _shape_of(_load(features / names[0]))
    if shape is None:
        raise UserError(f"{features / names[0]} is no latent of shape [1, channels, height, width]; check the folder")
    return _Features(folder=features, label_folder=labels, names=tuple(names), shape=shape)


def _names(folder: Path) -> list[str]:
    """The .npy files, 2 before 10."""
    names = [path.name for path in folder.glob("*.npy")]
    return sorted(names, key=lambda name: (not name[:-4].isdecimal(), name.zfill(24), name))


def _load(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as a .npy array ({error}); mend or remove it and its partner"
        ) from error


def _shape_of(array: NDArray[Any]) -> tuple[int, int, int] | None:
    shape = array.shape[1:] if array.ndim == 4 and array.shape[0] == 1 else array.shape
    if len(shape) != 3 or not np.issubdtype(array.dtype, np.floating):
        return None
    channels, height, width = shape
    return channels, height, width


def _classes(
    features: _Features, labels: NDArray[np.int64], names: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """(class ids, readable names)."""
    count = int(labels.max()) + 1
    if labels.min() < 0 or (names is not None and len(names) < count):
        known = "" if names is None else f", and {len(names)} names were given"
        raise UserError(f"the labels lie in {labels.min()} … {count - 1}{known}; every label needs a class")
    if names is not None:
        return [str(label) for label in range(len(names))], list(names)
    imagenet = imagenet_classes()
    # fast-DiT writes `imagenet256_features` whatever the data: labels must say it too.
    if features.folder.name.lower().startswith("imagenet") and len(imagenet) // 2 < count <= len(imagenet):
        return [row.synset for row in imagenet], [row.names for row in imagenet]
    return [str(label) for label in range(count)], [str(label) for label in range(count)]


def _check_channels(features: _Features, vae: Mapping[str, Any], channels: int | None) -> None:
    """Raise UserError unless the features have as many channels as the VAE's latents, where that is known."""
    expected = _CHANNELS if channels is None and vae is STABLE_DIFFUSION else channels
    if expected is not None and features.shape[0] != expected:
        moments = ", its means and log-variances, of which no store of points can be made" * (
            features.shape[0] == 2 * expected
        )
        raise UserError(
            f"{features.folder} holds features of {features.shape[0]} channels, but {vae['name']} has latents of "
            f"{expected}{moments}; give the VAE that made them by --vae, or write one draw an image"
        )


def _check_out(out: Path, split: str) -> None:
    """Raise UserError unless the folder is free, or holds what an earlier import left, whole or not."""
    ours = {path.name for path in store_files(out, split=split)} | {WORK_FOLDER}
    others = sorted(path.name for path in out.iterdir() if path.name not in ours) if out.is_dir() else []
    if others:
        raise UserError(f"{out} holds other things ({', '.join(others[:3])}); name an empty or a new folder")
    manifest = read_json(out / MANIFEST_FILE) if (out / MANIFEST_FILE).is_file() else {}
    if "extraction" in manifest or (out / WORK_FOLDER / "settings.json").exists():
        raise UserError(f"{out} holds a store that dit-extract made, so it is not replaced; choose another folder")
