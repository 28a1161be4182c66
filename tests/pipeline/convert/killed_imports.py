"""Imports in forks of a small process, killed at random moments and begun again; what is left is told as JSON.

python killed_imports.py FOLDER ROUNDS SEED LAYOUT …
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from pipeline.convert.imports import import_latents
from tests.pipeline.convert.foreign import make


def start(source, out):
    process = os.fork()
    if process == 0:
        try:
            import_latents(source, out, samples_per_shard=1)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - a fork never returns
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return process


def main():
    folder, rounds, draws = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    report = {}
    for layout in sys.argv[4:]:
        source, out = make(layout, folder / layout).path, folder / layout / "killed"
        begun = time.monotonic()
        os.waitpid(start(source, folder / layout / "straight"), 0)  # here nothing runs that a fork would not take along
        took, caught = time.monotonic() - begun, 0
        for _ in range(rounds):
            process = start(source, out)
            time.sleep(draws.uniform(0, took / rounds))  # so that several of them fall into the work
            os.kill(process, signal.SIGKILL)
            caught += os.waitpid(process, 0)[1] == signal.SIGKILL
        _, status = os.waitpid(start(source, out), 0)
        report[layout] = {"killed": caught, "status": status}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
