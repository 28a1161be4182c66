"""Other people's latents as a latent store, whatever their layout: cut into shards, written, continued, finished.

The order of samples, the unit of work and what happens after a kill are those of extraction: samples are permuted by
the seed, a shard without its record is not there, and whoever runs the command again goes on.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.classes import imagenet_classes, readable_names
from pipeline.convert.layouts import LAYOUTS, find_layout
from pipeline.convert.source import MOST_CLASSES, Source
from pipeline.latents.manifest import LatentSpec, Manifest
from pipeline.latents.names import MANIFEST_FILE, WORK_FOLDER
from pipeline.latents.store_files import store_files
from pipeline.latents.writer import (
    DTYPES,
    StoreDescription,
    finish_store,
    read_record,
    unstorable_rows,
    write_shard,
)
from pipeline.randomness import Permutation
from pipeline.runtime.console import progress
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes, make_folder, read_json, remove_folder
from pipeline.runtime.gate import typed
from pipeline.runtime.publish import claimed, making, sweep, work_folder_of

_LOOKED_AT = 64
_FIRST_LAYOUT = "fast-dit"
"""Its stores and plans are older than the others and stay as they were: they name no layout."""


def import_latents(
    path: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    vae: Mapping[str, Any] | None = None,
    downsample: int | None = None,
    channels: int | None = None,
    class_names: Sequence[str] | None = None,
    split: str = "train",
    shard_format: str = "safetensors",
    store_dtype: str = "float16",
    samples_per_shard: int = 4096,
    seed: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """The manifest of a version-1 store made from latents that another project saved.

    Running it again continues where it stopped.

    Args:
        path: the folder or file that holds them.
        out: the store.
        layout: a key of LAYOUTS; the first that the path looks like where it is None.
        vae: the VAE that made them, as `Vae.describe` gives it; else the one of the project's own script.
        downsample: pixels along one side of a cell of that VAE.
        channels: of its latents, where known.
        class_names: readable names, index = label; else those of the files, or ImageNet's if a folder is named after
            it and more than half of its thousand labels lie in range, else the numbers.
        overwrite: begin anew, where an earlier import left a store; it stays whole until the new one is.

    Raises:
        UserError: the files are not there or do not fit together, one is damaged, or `out` holds something else.
    """
    path, out = Path(path), Path(out).absolute()
    layout = layout or find_layout(path)
    source = LAYOUTS[layout].listed(path)
    known_vae = {**(source.vae if vae is None else vae), **source.overrides}
    _check_channels(path, source, known_vae, source.channels if vae is None else channels)
    downsample = downsample or source.downsample
    class_ids, classes = _classes(source, class_names)
    settings = [source.names, source.shape, known_vae, split, shard_format, store_dtype, samples_per_shard, seed]
    contents = [source.origin, _fingerprint(source), source.labels.tolist(), class_ids, classes]
    told: dict[str, Any] = {}
    if layout != _FIRST_LAYOUT:
        told = {"import": {"layout": layout, "unknown": list(source.unknown)}}
        contents += [layout, source.kind, source.views, downsample]
    plan = hashlib.sha256(json.dumps([*settings, *contents]).encode()).hexdigest()
    description = StoreDescription(
        split=split,
        shard_format=shard_format,
        latent=_spec(source, store_dtype, downsample),
        views=source.views,
        image={"size": source.shape[1] * downsample, "crop": "adm-center"},
        vae=known_vae,
        classes=classes,
        class_ids=class_ids,
        seed=seed,
        plan=plan,
        extra=told,
    )
    sweep(out)
    _check_out(out, split)
    with explained_writes(out), _folder_for(out, overwrite=overwrite) as place:
        shards = _write_shards(place, path, source, description, samples_per_shard)
        manifest = finish_store(place, description, shards=shards)
    assert manifest is not None
    return manifest


def _write_shards(place: Path, path: Path, source: Source, store: StoreDescription, samples_per_shard: int) -> int:
    """Write the shards that are not there yet; gives how many the store has."""
    order = Permutation(len(source.labels), store.seed, "extract-order")[np.arange(len(source.labels), dtype=np.int64)]
    parts = [order[start : start + samples_per_shard] for start in range(0, len(order), samples_per_shard)]
    with progress(len(order), unit="samples", description="importing") as bar:
        for shard, indices in enumerate(parts):
            if read_record(place, store.split, shard, plan=store.plan) is None:
                write_shard(
                    place,
                    store.split,
                    shard,
                    store.shard_format,
                    _latents(source, indices, store.vae, store.latent.dtype, path),
                    source.labels[indices],
                    indices,
                    _keys(source, indices),
                    kind=source.kind,
                    plan=store.plan,
                )
            bar.update(len(indices))
    return len(parts)


def _spec(source: Source, dtype: str, downsample: int) -> LatentSpec:
    channels, height, width = source.shape
    return LatentSpec(
        kind=source.kind, channels=channels, height=height, width=width, dtype=dtype, downsample=downsample
    )


def _latents(source: Source, indices: NDArray[np.int64], vae: Mapping[str, Any], dtype: str, path: Path) -> Tensor:
    """Unscaled latents [n, views, values, H, W] in the store's dtype."""
    rows = np.stack([row.astype(np.float32, copy=False) for row in source.rows(indices)])
    latents = torch.from_numpy(source.unscaled(rows, vae))
    bad = unstorable_rows(latents, dtype)
    if len(bad):
        key = _keys(source, indices[bad[:1]])[0]
        raise UserError(
            f"{path}: {key} (and {len(bad) - 1} others near it) holds values that are not finite in {dtype}; mend or "
            f"remove it and its label"
        )
    return latents.to(DTYPES[dtype])


def _keys(source: Source, indices: NDArray[np.int64]) -> list[str]:
    return [f"{source.prefix}{source.names[index]}" for index in indices]


def _fingerprint(source: Source) -> str:
    """A hash over the bytes of a few samples, which other latents under the same names do not share."""
    few = Permutation(len(source.names), 0, "fingerprint of features")
    digest = hashlib.sha256()
    for row in source.rows(few[np.arange(min(_LOOKED_AT, len(source.names)), dtype=np.int64)]):
        digest.update(row.tobytes())
    return digest.hexdigest()


def _classes(source: Source, names: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """(class ids, readable names); none of unlabelled latents."""
    labels = source.labels
    if names is None and bool((labels == -1).all()):
        return [], []
    count = max(int(labels.max()) + 1, len(source.class_ids))
    if labels.min() < 0 or count > MOST_CLASSES or (names is not None and len(names) < count):
        known = "" if names is None else f", and {len(names)} names were given"
        raise UserError(f"the labels lie in {labels.min()} … {count - 1}{known}; every label needs a class")
    if names is not None:
        return [str(label) for label in range(len(names))], list(names)
    if source.class_ids:
        return list(source.class_ids), list(readable_names(source.class_ids))
    imagenet = imagenet_classes()
    # fast-DiT writes `imagenet256_features` whatever the data: labels must say it too.
    if source.origin.lower().startswith("imagenet") and len(imagenet) // 2 < count <= len(imagenet):
        return [row.synset for row in imagenet], [row.names for row in imagenet]
    return [str(label) for label in range(count)], [str(label) for label in range(count)]


def _check_channels(path: Path, source: Source, vae: Mapping[str, Any], expected: int | None) -> None:
    """Raise UserError unless the latents have as many channels as the VAE's, where that is known."""
    channels = source.shape[0]
    if expected is not None and channels != expected:
        is_moments = source.kind == "point" and channels == 2 * expected
        moments = ", its means and log-variances, of which no store of points can be made" * is_moments
        raise UserError(
            f"{path} holds features of {channels} channels, but {vae['name']} has latents of {expected}{moments}; give "
            f"the VAE that made them by --vae" + (", or write one draw an image" if source.kind == "point" else "")
        )


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


class _MadeBy(msgspec.Struct, frozen=True):
    """What of a store's manifest tells who made it."""

    extraction: dict[str, Any] | None = None


def _check_out(out: Path, split: str) -> None:
    """Raise UserError unless the folder is free, or holds what an earlier import left, whole or not."""
    ours = {path.name for path in store_files(out, split=split)} | {WORK_FOLDER}
    others = sorted(path.name for path in out.iterdir() if path.name not in ours) if out.is_dir() else []
    if others:
        raise UserError(f"{out} holds other things ({', '.join(others[:3])}); name an empty or a new folder")
    made_by = None
    if (manifest := out / MANIFEST_FILE).is_file():
        refusal = f"{manifest} is damaged"
        made_by = typed(read_json(manifest), _MadeBy, refusal, advice="choose another folder").extraction
    if made_by is not None or (out / WORK_FOLDER / "settings.json").exists():
        raise UserError(f"{out} holds a store that dit-extract made, so it is not replaced; choose another folder")
