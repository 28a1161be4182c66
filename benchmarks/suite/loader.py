"""The loader alone, warm and cold: gathering by batch against one .npy file per sample."""

import contextlib
import io
from functools import partial

from benchmarks.loader import BATCH, SHAPE, WANTED, Data, drop_from_cache, gather, load_each, make
from benchmarks.report import Row
from benchmarks.suite.setting import Setting
from benchmarks.timing import rates, ratios, seconds_of


def measure(setting: Setting) -> list[Row]:
    """One row per state of the page cache."""
    samples = 512 if setting.quick else 8192 if setting.on_gpu else 4096
    data = Data(folder=setting.folder / "loader", samples=samples)
    data.folder.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        make(data)
    readers = {"ours": partial(gather, data, "safetensors"), "plain": partial(load_each, data)}
    shape = "×".join(map(str, SHAPE))
    rows = []
    for state, wanted in WANTED.items():
        times: dict[str, list[float]] = {name: [] for name in readers}
        for number in range(7 + 1):
            for name in sorted(readers, reverse=number % 2 == 0):
                if state == "cold":
                    drop_from_cache(data.files)
                seconds = seconds_of(partial(readers[name], number))
                if number:  # the first round warms up
                    times[name].append(seconds)
        rows.append(
            Row(
                what=f"{samples:,} samples of {shape} float16 in random order, batches of {BATCH}, {state}",
                unit="samples/s",
                ours=rates(times["ours"], samples),
                plain=rates(times["plain"], samples),
                ratio=ratios(times),
                wanted_ratio=None if setting.quick else wanted,
            )
        )
    return rows
