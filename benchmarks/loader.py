"""How fast are batches read? Run `python -m benchmarks.loader [--quick] [--json FILE]`.

The same latents, [8, 32, 32] float16, one view per sample drawn at random from two, in random order, batches of 256:
gathered from our store in both shard formats, loaded from one .npy file per sample and view as most projects of the
field keep them, and streamed by plain `webdataset` from our tars. Interleaved rounds; warm (everything in the page
cache) and cold (dropped from it before every round). One process, no workers.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from pipeline import randomness
from pipeline.latents import LatentSpec, LatentStore
from pipeline.latents.writer import StoreDescription, finish_store, write_shard

BATCH = 256
VIEWS = ("center", "center-hflip")
SHAPE = (8, 32, 32)
PLAIN = "one .npy per sample"
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


def main() -> int:
    """Exit status 0 if the ratios to the per-sample loop are what we promise, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,048 samples and 3 rounds")
    parser.add_argument("--samples", type=int, default=8192, help="samples (default 8192; 64 KiB of disk each)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--folder", type=Path, help="where to put the data (default the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    samples, rounds = (2048, 3) if arguments.quick else (arguments.samples, arguments.rounds)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        data = Data(folder=Path(folder), samples=samples)
        make(data)
        result = {state: measure(data, rounds, state) for state in WANTED}
    report = {"samples": samples, "rounds": rounds, "batch": BATCH, "shape": list(SHAPE), "torch": torch.__version__}
    report |= {"cpus": os.cpu_count(), **result}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    reached = all(result[state]["ratios"]["safetensors"]["median"] >= wanted for state, wanted in WANTED.items())
    return 0 if reached else 1


def make(data: Data) -> None:
    """Write the samples in every form."""
    per_shard = max(256, data.samples // 4)
    shards = range(-(-data.samples // per_shard))
    for shard in shards:
        first = shard * per_shard
        indices = np.arange(first, min(data.samples, first + per_shard))
        shape = (len(indices), len(VIEWS), *SHAPE)
        latents = randomness.normal(shape, 0, "benchmark latents", shard).half()
        for shard_format in ("safetensors", "webdataset"):
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
    channels, height, width = SHAPE
    latent = LatentSpec(
        kind="moments", channels=channels // 2, height=height, width=width, dtype="float16", downsample=8
    )
    for shard_format in ("safetensors", "webdataset"):
        description = StoreDescription(
            split="train",
            shard_format=shard_format,
            latent=latent,
            views=VIEWS,
            image={"size": 8 * height, "crop": "adm-center"},
            vae={"name": "none", "class": "none", "sha256": "", "scaling_factor": 1.0, "shift_factor": None},
            classes=[str(label) for label in range(1000)],
            class_ids=[str(label) for label in range(1000)],
            seed=0,
        )
        finish_store(data.folder / shard_format, description, shards=len(shards))
    os.sync()


def measure(data: Data, rounds: int, state: str) -> dict[str, dict[str, dict[str, float]]]:
    """Samples per second and ratios to the .npy loop, as medians over interleaved rounds with their spread.

    The same per second of CPU time: that hardly changes on a machine that is busy with other things.
    """
    readers: dict[str, Reader] = {
        "safetensors": partial(gather, data, "safetensors"),
        "webdataset tars": partial(gather, data, "webdataset"),
        PLAIN: partial(load_each, data),
        "plain webdataset": partial(stream, data),
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    cpu_rates: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        names = list(readers) if number % 2 else list(reversed(readers))
        for name in names:
            if state == "cold":
                drop_from_cache(data.files)
            wall, cpu = time.perf_counter(), time.process_time()
            count = readers[name](number)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number:  # the first round warms up
                rates[name].append(count / wall)
                cpu_rates[name].append(count / cpu)
    ratios = {name: [a / b for a, b in zip(values, rates[PLAIN], strict=True)] for name, values in rates.items()}
    print(f"{state}: {data.samples} samples, batches of {BATCH}, {rounds} interleaved rounds")
    for name in readers:
        rate, ratio, per_cpu = spread(rates[name]), spread(ratios[name]), spread(cpu_rates[name])
        wanted = f"; at least {WANTED[state]:g} wanted" if name == "safetensors" else ""
        print(
            f"  {name:<20} {rate['median']:>9,.0f} samples/s {ratio['median']:6.2f}× the .npy loop "
            f"({ratio['min']:.2f} … {ratio['max']:.2f}{wanted}), {per_cpu['median']:>9,.0f} per second of CPU time",
            flush=True,
        )
    return {
        key: {name: spread(values) for name, values in table.items()}
        for key, table in (("rates", rates), ("ratios", ratios), ("rates_per_cpu_second", cpu_rates))
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


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


if __name__ == "__main__":
    sys.exit(main())
