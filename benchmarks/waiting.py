"""How long threads should spin before they sleep, where a product's parts wait for one another: steps/s of training.

    python -m benchmarks.waiting [--seconds N] [--rounds N] [--busy 0,2,4]
    python -m benchmarks --parts waiting          shorter, one round

A thread that spins starts sooner and takes the time of other programs, of just those that it waits for among them. Each
candidate is set before torch is loaded, so each measurement is a process of its own; candidates take turns, beside
none, two and four processes that only count. The step is the demo's: DiT-Ti/2, batches of 64, on as many threads as
there are cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.machine import Setting
    from benchmarks.report import Pieces, Row

CANDIDATES: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"spin {rounds}": {"GOMP_SPINCOUNT": str(rounds)} for rounds in (300, 3000, 10_000, 30_000)},
}
BUSY = (0, 2, 4)
SIDE = 8
SET = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
CHOSEN = "spin 10000"
"""What `bound_spinning` sets."""
Rates = dict[str, list[float]]
"""Steps per second by candidate, one per round."""


def main() -> int:
    """Print the table, with each rate's ratio to the default beside as many busy processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of steps in each measurement (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each candidate (default 3)")
    parser.add_argument("--busy", default=",".join(map(str, BUSY)), help="numbers of busy processes (default 0,2,4)")
    parser.add_argument("--steps-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps_in is not None:
        print(steps_per_second(arguments.steps_in, arguments.seconds))
        return 0
    for count in (int(number) for number in arguments.busy.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), count, seconds=arguments.seconds, rounds=arguments.rounds)
        print("\n".join(table(found, count)), flush=True)
    return 0


def pieces(setting: "Setting") -> "Pieces":
    """One row per number of busy processes; a GPU's steps do not wait so."""
    if setting.on_gpu:
        return {}
    return {f"{count} busy": partial(_row, setting, count) for count in ((0,) if setting.quick else BUSY)}


def _row(setting: "Setting", count: int) -> "list[Row]":
    from benchmarks.report import Row
    from benchmarks.timing import spread

    folder = setting.folder / f"waiting-{count}"
    folder.mkdir()
    found = measure(folder, count, seconds=0.5 if setting.quick else 3.0, rounds=1)
    print("\n".join(table(found, count)), flush=True)
    ours, plain = found[CHOSEN], found["default"]
    return [
        Row(
            what=f"training steps of DiT-Ti/2, batch 64, beside {count} busy processes; plain is OpenMP's default",
            unit="steps/s",
            ours=spread(ours),
            plain=spread(plain),
            ratio=spread([mine / its for mine, its in zip(ours, plain, strict=True)]),
            more=found,
        )
    ]


def measure(folder: Path, count: int, *, seconds: float, rounds: int) -> Rates:
    """The rates of every candidate beside so many busy processes."""
    from benchmarks.train import write_data

    write_data(folder, SIDE)
    found: Rates = {name: [] for name in CANDIDATES}
    for number in range(rounds):
        names = list(CANDIDATES)
        for name in names if number % 2 == 0 else reversed(names):
            with busy_processes(count):
                found[name].append(_in_a_process(folder, name, seconds))
    return found


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that take all the time they get."""
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # none outlives this one
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _in_a_process(folder: Path, name: str, seconds: float) -> float:
    environment = {key: value for key, value in os.environ.items() if key not in SET}
    environment |= CANDIDATES[name] | {"ACCELERATE_USE_CPU": "true"}
    words = [sys.executable, "-m", "benchmarks.waiting", "--steps-in", str(folder), "--seconds", str(seconds)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measurement of {name!r} failed: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def steps_per_second(folder: Path, seconds: float) -> float:
    """Training steps per second in this process."""
    import torch

    from benchmarks.train import our_step

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with our_step("DiT-Ti/2", folder, 64) as step:
        for _ in range(3):
            step()
        started = time.perf_counter()
        steps = 0
        while (took := time.perf_counter() - started) < seconds:
            step()
            steps += 1
    return steps / took


def table(found: Rates, count: int) -> list[str]:
    """One line per candidate: the median rate and its ratio to the default's."""
    default = statistics.median(found["default"])
    lines = [f"beside {count} busy processes: steps/s (× the default)"]
    for name, rates in found.items():
        rate = statistics.median(rates)
        lines.append(f"  {name:<12} {rate:6.2f} ({rate / default:.2f} ×)")
    return lines


if __name__ == "__main__":
    sys.exit(main())
