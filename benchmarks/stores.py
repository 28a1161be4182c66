"""Stores for benchmarks: small ones of random latents, and very large ones whose latents are holes on the disk."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline import randomness
from pipeline.latents import LatentSpec
from pipeline.latents.manifest import FORMAT, VERSION, Manifest, latent_json, make_manifest, write_manifest
from pipeline.latents.names import shard_name
from pipeline.latents.safetensors_shards import pieces
from pipeline.latents.shards import row_type
from pipeline.latents.writer import StoreDescription, finish_store, write_shard

CLASSES = 1000
VAE = {"name": "demo", "class": "AutoencoderKL", "sha256": "0" * 64, "scaling_factor": 0.18215, "shift_factor": None}


def latent_spec(side: int) -> LatentSpec:
    """Stable Diffusion's latents of images of 8 · side pixels, as dit-extract keeps them."""
    return LatentSpec(kind="moments", channels=4, height=side, width=side, dtype="float16", downsample=8)


def write_store(
    folder: Path, *, samples: int, side: int = 32, views: Sequence[str] = ("center",), shard_format: str = "safetensors"
) -> Tensor:
    """Write a one-shard store of random moments; gives them, [samples, views, 8, side, side]."""
    latent = latent_spec(side)
    moments = randomness.normal((samples, *latent.row_shape(len(views))), 0, "benchmark store").half()
    labels, keys = np.arange(samples) % CLASSES, [f"{k}.JPEG" for k in range(samples)]
    write_shard(folder, "train", 0, shard_format, moments, labels, np.arange(samples), keys)
    finish_random_store(folder, latent, views, shard_format, shards=1)
    return moments


def finish_random_store(
    folder: Path, latent: LatentSpec, views: Sequence[str], shard_format: str, *, shards: int
) -> None:
    """Write the manifest of a store whose shards are in place."""
    names = [str(label) for label in range(CLASSES)]
    description = StoreDescription(
        split="train",
        shard_format=shard_format,
        latent=latent,
        views=views,
        image={"size": latent.downsample * latent.height, "crop": "adm-center"},
        vae=VAE,
        classes=names,
        class_ids=names,
        seed=0,
    )
    assert finish_store(folder, description, shards=shards) is not None


def simulate_store(folder: Path, *, samples: int, samples_per_shard: int = 4096, side: int = 32) -> Manifest:
    """Write a store of any size that takes one disk block per shard: true headers and sizes, all values zero."""
    folder.mkdir(parents=True, exist_ok=True)
    latent = latent_spec(side)
    row = row_type(latent, views=1)
    counts = [min(samples_per_shard, samples - first) for first in range(0, samples, samples_per_shard)]
    headers = {}
    for count in set(counts):
        empty = np.empty((count, row.bytes), dtype=np.uint8)  # never touched, so it takes no memory
        no_labels = np.zeros(count, dtype=np.int64)
        headers[count] = bytes(next(iter(pieces(empty, no_labels, no_labels, row))))
    entries = []
    for number, count in enumerate(counts):
        path = folder / shard_name("train", number, "safetensors")
        size = len(headers[count]) + count * (row.bytes + 16)
        with path.open("wb") as file:
            file.write(headers[count])
            file.truncate(size)
        entries.append({"file": path.name, "samples": count, "bytes": size, "sha256": "0" * 64})
    values = {
        "format": FORMAT,
        "version": VERSION,
        "shard_format": "safetensors",
        "split": "train",
        "samples": samples,
        "skipped": 0,
        "classes": [str(label) for label in range(CLASSES)],
        "class_ids": [str(label) for label in range(CLASSES)],
        "image": {"size": 8 * side, "crop": "adm-center"},
        "views": ["center"],
        "latent": latent_json(latent),
        "vae": VAE,
        "statistics": {"mean": [0.0] * latent.channels, "std": [1.0] * latent.channels},
        "seed": 0,
        "shards": entries,
    }
    manifest = make_manifest(values)
    write_manifest(folder, manifest)
    return manifest
