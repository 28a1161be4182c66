"""What 100 million samples cost the loader and the shard plan: `python -m benchmarks.scale [--samples N]`.

The store is simulated: as many shards as there would be, of their true sizes and with true headers, but their latents
are holes in the files, so that it takes 100 MB of disk instead of 1.6 TB. Everything that is measured is what
`dit-train` and `dit-extract` run: the manifest, the data order, gathering by batch, the plan of the shards. Memory is
the whole process's, PyTorch included, so a process of its own measures it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stores import simulate_store
from benchmarks.timing import resident_bytes, seconds_of
from extract.plan import Plan
from pipeline.latents import LatentStore
from train.data import BatchShard, DataOrder

SAMPLES = 100_000_000
BATCH = 256
MOST_BYTES, MOST_SECONDS = 2e9, 10.0


def main() -> int:
    """Exit status 0 if memory and start-up are within bounds, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"simulated samples (default {SAMPLES})")
    parser.add_argument("--batches", type=int, default=40, help="batches of 256 to gather (default 40)")
    parser.add_argument("--folder", type=Path, help="where to put the store (default the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(Path(folder) / "store", arguments.samples, arguments.batches)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0 if found["peak_bytes"] <= MOST_BYTES and found["start_seconds"] <= MOST_SECONDS else 1


def measure(folder: Path, samples: int, batches: int) -> dict[str, Any]:
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


if __name__ == "__main__":
    sys.exit(main())
