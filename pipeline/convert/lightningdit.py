"""Latents as LightningDiT's `extract_features.py` writes them: shards of 10,000 images, both views, one draw of each.

    latents_rank00_shard000.safetensors …    latents, latents_flip [N, C, h, w], labels [N] int64
    latents_stats.pt                         mean, std [1, C, 1, 1], of 10,000 of the latents

Unscaled; LightningDiT feeds (z − mean) / std, which in a store's words is a shift and a scale for each channel.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from pipeline.checkpoint.weight_files import load_tensors
from pipeline.convert.source import BOTH_VIEWS, FINGERPRINT, PIXELS, Source, reading
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import check_regular

_VIEWS = ("latents", "latents_flip")
_FLOATS = {"F32", "F16", "BF16"}
_STATS = "latents_stats.pt"


class _Shard(NamedTuple):
    path: Path
    shape: tuple[int, ...]
    """[channels, height, width]"""
    labels: NDArray[np.int64]


def listed(folder: Path) -> Source:
    """The latents in the shards."""
    shards = [_open(path) for path in sorted(folder.glob("*.safetensors"))]
    if not shards:
        raise UserError(f"{folder} holds no .safetensors files; check --from")
    wrong = [shard.path.name for shard in shards if shard.shape != shards[0].shape]
    if wrong:
        raise UserError(f"the latents in {folder} differ in shape: {shards[0].path.name}, {wrong[0]}; check --from")
    channels, height, width = shards[0].shape
    starts = np.cumsum([0, *(len(shard.labels) for shard in shards)])
    return Source(
        origin=folder.absolute().name,
        names=[f"{shard.path.name}/{row}" for shard in shards for row in range(len(shard.labels))],
        labels=np.concatenate([shard.labels for shard in shards]),
        kind="point",
        views=BOTH_VIEWS,
        shape=(channels, height, width),
        rows=partial(_rows, [shard.path for shard in shards], starts),
        unscaled=lambda rows, _: rows,
        vae={"name": None, "class": "AutoencoderKL", "sha256": None},
        overrides={**_factors(folder / _STATS, channels), **PIXELS},
        channels=None,
        downsample=16,
        unknown=("the VAE", FINGERPRINT, "the images' names", "which images several processes saved twice"),
    )


def _open(path: Path) -> _Shard:
    """What a shard holds, by its header, and its labels."""
    check_regular(path)
    with reading(path, "LightningDiT's latents", "extract it again"), safe_open(path, framework="pt") as file:
        known = {name: file.get_slice(name) for name in (*_VIEWS, "labels")}
        kinds = {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in known.items()}
        (dtype, shape), flipped, (label_type, label_shape) = (kinds[name] for name in (*_VIEWS, "labels"))
        fits = flipped == (dtype, shape) and len(shape) == 4 and min(shape) > 0 and dtype in _FLOATS
        if not fits or label_type != "I64" or label_shape != shape[:1]:
            raise UserError(
                f"{path} must hold latents and latents_flip of one shape [N, channels, height, width] and labels "
                f"[N] of whole numbers, but holds {kinds}; extract it again"
            )
        return _Shard(path, shape[1:], file.get_tensor("labels").numpy())


def _factors(path: Path, channels: int) -> dict[str, Any]:
    """Scale and shift that do what LightningDiT does with its mean and spread."""
    if not path.exists():
        raise UserError(
            f"{path} is missing, which says the latents' mean and spread; LightningDiT writes it when it extracts or "
            f"first trains"
        )
    stats = load_tensors(path)
    mean, std = (stats[name].double().flatten() if name in stats else torch.empty(0) for name in ("mean", "std"))
    are_finite = bool(torch.isfinite(mean).all() and torch.isfinite(std).all())
    if not len(mean) == len(std) == channels or not are_finite or not bool((std > 0).all()):
        raise UserError(
            f"{path} must hold a mean and a spread above 0 for each of the {channels} channels; remove it and let "
            f"LightningDiT write it again"
        )
    return {"scaling_factor": (1 / std).tolist(), "shift_factor": mean.tolist()}


def _rows(paths: Sequence[Path], starts: NDArray[np.int64], indices: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Rows in the order of the indices; every shard is opened once."""
    found: dict[int, NDArray[Any]] = {}
    shard_of = np.searchsorted(starts, indices, side="right") - 1
    for shard in np.unique(shard_of):
        path = paths[shard]
        with reading(path, "LightningDiT's latents", "bring it back"), safe_open(path, framework="pt") as file:
            views = [file.get_slice(name) for name in _VIEWS]
            for index in indices[shard_of == shard]:
                row = int(index - starts[shard])
                found[int(index)] = torch.stack([view[row] for view in views]).float().numpy()
    return [found[int(index)] for index in indices]
