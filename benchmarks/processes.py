"""Two processes on one device: extraction shared out through files, against one process alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.extract import make_images
from benchmarks.machine import Setting
from benchmarks.report import Pieces, Row
from benchmarks.timing import rates, ratios
from pipeline.runtime.errors import UserError

ROOT = Path(__file__).parents[1]


def pieces(setting: Setting) -> Pieces:
    """The commands themselves, each started anew, on the demo VAE."""
    return {"extraction by two": lambda: extraction(setting)}


def extraction(setting: Setting) -> list[Row]:
    """Images per second of one and of two processes, and that both made the same store."""
    count = 2048 if setting.on_gpu else 8 if setting.quick else 64
    data = make_images(setting.folder / "images", count, (320, 256) if setting.on_gpu else (96, 80))
    side = "256" if setting.on_gpu else "64"
    words = ["extract", "--data", data, "--vae", "demo", "--image-size", side, "--device", setting.device.type]
    words += ["--samples-per-shard", max(1, count // 8)]
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for turn in range(setting.rounds(3)):
        for name, processes in (("plain", 1), ("ours", 2)):
            out = setting.folder / f"{name}-{turn}"
            times[name].append(_seconds([*map(str, words), "--out", str(out)], processes))
    stores = [json.loads((setting.folder / f"{name}-0" / "manifest.json").read_text()) for name in times]
    if stores[0]["shards"] != stores[1]["shards"]:
        raise UserError("one process and two made different stores of the same images; compare their shards")
    return [
        Row(
            what=f"extract {count:,} images to {side} px with the demo VAE, two processes, start included",
            unit="images/s",
            ours=rates(times["ours"], count),
            plain=rates(times["plain"], count),
            ratio=ratios(times),
            note="“plain” is: one process",
        )
    ]


def _seconds(words: list[str], processes: int) -> float:
    """Wall-clock time of a command."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--module"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *(torchrun if processes > 1 else []), *words],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - started
