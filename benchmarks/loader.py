"""The loader alone: our store in both shard formats and plain `webdataset`, each against one .npy file per sample.

The same latents, [8, 32, 32] float16, one view per sample drawn at random from two, in random order, batches of 256.
Interleaved rounds; warm (everything in the page cache) and cold (dropped from it before every round). One process, no
workers.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import Setting
from benchmarks.report import Pieces, Row
from benchmarks.stores import finish_random_store, latent_spec
from benchmarks.timing import rates, ratios, seconds_of
from pipeline import randomness
from pipeline.latents import LatentStore
from pipeline.latents.names import FORMATS
from pipeline.latents.writer import write_shard

BATCH = 256
VIEWS = ("center", "center-hflip")
SHAPE = (8, 32, 32)
OURS = "safetensors shards"
WANTED = {"warm": 8.0, "cold": 3.0}

Reader = Callable[[int], int]
"""Reads an epoch in the order of a round's number; gives how many samples it read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The same samples in every form."""

    folder: Path
    samples: int

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples, views) of one epoch."""
        draws = np.random.default_rng(number)
        return draws.permutation(self.samples).astype(np.int64), draws.integers(0, len(VIEWS), self.samples)


def pieces(setting: Setting) -> Pieces:
    """One row per way of reading and state of the page cache."""
    return {state: partial(_read, state, setting) for state in WANTED}


def _read(state: str, setting: Setting) -> list[Row]:
    samples = 512 if setting.quick else 8192 if setting.on_gpu else 4096
    data = Data(folder=setting.folder / "loader", samples=samples)
    if not data.folder.exists():
        data.folder.mkdir()
        make(data)
    readers: dict[str, Reader] = {
        "plain": partial(load_each, data),
        OURS: partial(gather, data, "safetensors"),
        "WebDataset tars": partial(gather, data, "webdataset"),
        "tars streamed by plain webdataset": partial(stream, data),
    }
    return _rows(data, readers, state, setting)


def _rows(data: Data, readers: dict[str, Reader], state: str, setting: Setting) -> list[Row]:
    times: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(7 + 1):
        for name in readers if number % 2 else reversed(readers):
            if state == "cold":
                drop_from_cache(data.files)
            seconds = seconds_of(partial(readers[name], number))
            if number:  # the first round warms up
                times[name].append(seconds)
    shape = "×".join(map(str, SHAPE))
    return [
        Row(
            what=f"{name}, {data.samples:,} samples of {shape} float16 in random order, batches of {BATCH}, {state}",
            unit="samples/s",
            ours=rates(times[name], data.samples),
            plain=rates(times["plain"], data.samples),
            ratio=ratios({"plain": times["plain"], "ours": times[name]}),
            wanted_ratio=None if setting.quick or name != OURS else WANTED[state],
        )
        for name in readers
        if name != "plain"
    ]


def make(data: Data) -> None:
    """Write the samples in every form."""
    per_shard = max(256, data.samples // 4)
    shards = range(-(-data.samples // per_shard))
    for shard in shards:
        first = shard * per_shard
        indices = np.arange(first, min(data.samples, first + per_shard))
        shape = (len(indices), len(VIEWS), *SHAPE)
        latents = randomness.normal(shape, 0, "benchmark latents", shard).half()
        for shard_format in FORMATS:
            folder = data.folder / shard_format
            folder.mkdir(exist_ok=True)
            write_shard(
                folder, "train", shard, shard_format, latents, indices % 1000, indices, [str(i) for i in indices]
            )
        for index, views in zip(indices.tolist(), latents.numpy(), strict=True):
            for view, array in enumerate(views):
                path = data.folder / f"npy-{view}" / f"{index}.npy"
                path.parent.mkdir(exist_ok=True)
                np.save(path, array)
    np.save(data.folder / "labels.npy", np.arange(data.samples) % 1000)
    for shard_format in FORMATS:
        finish_random_store(data.folder / shard_format, latent_spec(SHAPE[-1]), VIEWS, shard_format, shards=len(shards))
    os.sync()


def drop_from_cache(files: list[Path]) -> None:
    """Make the kernel forget the files' contents (they are on the disk already)."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def batches_of(data: Data, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(samples, views) of each batch of one epoch."""
    samples, views = data.order(number)
    for start in range(0, data.samples, BATCH):
        yield samples[start : start + BATCH], views[start : start + BATCH]


@cache
def opened(folder: Path) -> tuple[LatentStore, torch.Tensor]:
    """A store and the buffer that its batches go to, as a training run keeps them for all epochs."""
    return LatentStore(folder), torch.empty((BATCH, *SHAPE), dtype=torch.float16)


def gather(data: Data, shard_format: str, number: int) -> int:
    """Our store: one sorted read per batch into one buffer."""
    store, buffer = opened(data.folder / shard_format)
    for samples, views in batches_of(data, number):
        store.gather(samples, views, out=buffer[: len(samples)])
    return data.samples


def load_each(data: Data, number: int) -> int:
    """The field's way: np.load for every sample, then a stack. Labels are in memory."""
    labels = np.load(data.folder / "labels.npy")
    for samples, views in batches_of(data, number):
        arrays = [
            np.load(data.folder / f"npy-{view}" / f"{sample}.npy")
            for sample, view in zip(samples.tolist(), views.tolist(), strict=True)
        ]
        torch.stack([torch.from_numpy(array) for array in arrays])
        torch.from_numpy(labels[samples])
    return data.samples


def stream(data: Data, number: int) -> int:
    """Plain webdataset over our tars, shuffled in its window of 1,000, both views decoded."""
    import webdataset

    tars = [str(path) for path in sorted((data.folder / "webdataset").glob("*.tar"))]
    dataset = webdataset.WebDataset(tars, shardshuffle=False, seed=number).shuffle(1000).decode()
    count = 0
    for moments, labels in dataset.to_tuple("moments.npy", "cls").batched(BATCH):
        count += len(torch.from_numpy(moments)[:, 0].contiguous())
        torch.as_tensor(labels)
    return count
