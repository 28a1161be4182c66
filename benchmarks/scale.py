"""What 100 million samples cost the loader and the shard plan.

The store is simulated: as many shards as there would be, of their true sizes and with true headers, but their latents
are holes in the files, so that it takes 100 MB of disk instead of 1.6 TB. Everything that is measured is what
`dit-train` and `dit-extract` run: the manifest, the data order, gathering by batch, the plan of the shards. Memory is
the whole process's, PyTorch included, so a process of its own measures it.
"""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import Setting
from benchmarks.report import Pieces, Row
from benchmarks.stores import simulate_store
from benchmarks.timing import resident_bytes, seconds_of, spread
from extract.plan import Plan
from pipeline.latents import LatentStore
from train.data import BatchShard, DataOrder

SAMPLES = 100_000_000
BATCH = 256
BATCHES = 40
MOST_BYTES, MOST_SECONDS = 2e9, 10.0


def pieces(setting: Setting) -> Pieces:
    """Start-up, batches and memory."""
    return {"scale": lambda: measure(setting)}


def measure(setting: Setting) -> list[Row]:
    """Start-up, batches and memory, in a process that has nothing else in its memory."""
    samples = SAMPLES // 1000 if setting.quick else SAMPLES
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        found = other.submit(cost_of, setting.folder / "scale", samples, BATCHES).result()
    what = f"{samples:,} samples in {found['shards']:,} shards"
    first = spread([found["first_batches_seconds"]])
    steady = spread([found["steady_batches_seconds"]])
    return [
        Row(
            what=f"{what}: open the store, make the data order, gather the first batch",
            unit="s",
            ours=spread([found["start_seconds"]]),
            wanted_at_most=MOST_SECONDS,
            more=found,
        ),
        Row(what=f"{what}: a batch of {BATCH} while shards are opened for the first time", unit="s", ours=first),
        Row(what=f"{what}: a batch of {BATCH} once every shard was opened", unit="s", ours=steady),
        Row(
            what=f"{what}: indices of a batch at position 10¹² of the data order",
            unit="s",
            ours=spread([found["order_seconds"][str(10**12)]]),
        ),
        Row(
            what=f"{what}: plan the shards and list the first one's {found['plan_rows_per_shard']:,.0f} inputs",
            unit="s",
            ours=spread([found["plan_seconds"]]),
        ),
        Row(
            what=f"{what}: most memory of the whole process",
            unit="GB",
            ours=spread([found["peak_bytes"] / 1e9]),
            wanted_at_most=MOST_BYTES / 1e9,
            note=f"{found['imports_bytes'] / 1e9:.2f} GB of it imports",
        ),
    ]


def cost_of(folder: Path, samples: int, batches: int) -> dict[str, Any]:
    """Seconds and bytes of starting up, of batches early and late, and of planning shards."""
    imports = resident_bytes()
    started = time.perf_counter()
    shards = len(simulate_store(folder, samples=samples).shards)
    simulated = time.perf_counter() - started

    started = time.perf_counter()
    store = LatentStore(folder)
    order, shard = DataOrder(len(store), seed=0), BatchShard(batch_size=BATCH)
    gather(store, order, shard, 0)
    start_seconds = time.perf_counter() - started

    first = [seconds_of(partial(gather, store, order, shard, n)) for n in range(1, batches + 1)]
    started = time.perf_counter()
    ends = np.cumsum([shard.samples for shard in store.manifest.shards]) - 1
    for part in np.array_split(ends, max(1, shards // 2000)):
        store.gather(part)
    touched = time.perf_counter() - started
    steady = [seconds_of(partial(gather, store, order, shard, n)) for n in range(10**6, 10**6 + batches)]
    orders = [seconds_of(partial(order.batch, n, shard)) for n in (1, 10**6, 10**9, 10**12)]
    store.close()
    return {
        "samples": samples,
        "shards": shards,
        "batch": BATCH,
        "simulation_seconds": simulated,
        "start_seconds": start_seconds,
        "first_batches_seconds": statistics.median(first),
        "touch_every_shard_seconds": touched,
        "steady_batches_seconds": statistics.median(steady),
        "order_seconds": {str(n): taken for n, taken in zip((1, 10**6, 10**9, 10**12), orders, strict=True)},
        **plan_cost(samples),
        "imports_bytes": imports,
        "peak_bytes": resident_bytes(),
    }


def gather(store: LatentStore, order: DataOrder, shard: BatchShard, number: int) -> None:
    """One whole batch, as the trainer's reader makes it."""
    store.gather(order.batch(number, shard))


def plan_cost(samples: int) -> dict[str, float]:
    """Seconds to make the plan and to list one shard's inputs, the first one's and the last one's."""
    started = time.perf_counter()
    plan = Plan(inputs=samples, seed=0, samples_per_shard=4096)
    first = plan.rows(0)
    made = time.perf_counter() - started
    last = seconds_of(lambda: plan.rows(plan.shards - 1))
    return {"plan_seconds": made, "plan_last_shard_seconds": last, "plan_rows_per_shard": float(len(first))}
