"""The loader and the shard plan at 100 million simulated samples, measured by a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Row
from benchmarks.scale import BATCH, MOST_BYTES, MOST_SECONDS, SAMPLES
from benchmarks.suite.setting import Setting
from benchmarks.timing import spread

ROOT = Path(__file__).parents[2]


def measure(setting: Setting) -> list[Row]:
    """Start-up, batches and memory."""
    out = setting.folder / "scale.json"
    samples = SAMPLES // 1000 if setting.quick else SAMPLES
    words = [sys.executable, "-m", "benchmarks.scale", "--samples", str(samples), "--folder", str(setting.folder)]
    subprocess.run([*words, "--json", str(out)], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text())
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
