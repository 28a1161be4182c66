"""Run by test_writer.py: writers that are killed at random moments, several at once, until the store is finished.

    python killed_writers.py FOLDER ROUNDS WRITERS SEED

Makes FOLDER/FORMAT-straight and FOLDER/FORMAT-killed for both shard formats. The libraries are loaded once; every
writer is a fork of this process. Prints one JSON object.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from pipeline.latents import LatentSpec, LatentStore, shards
from pipeline.latents.writer import StoreDescription, finish_store, missing_shards, read_record, write_shard
from pipeline.randomness import normal

SHARDS = 12


def write_store(folder, shard_format, order):
    """What any writer does: make what is missing, in an order of its own, and finish if nothing is."""
    for shard in order:
        if read_record(folder, "train", shard, plan="plan") is None:
            count = 20 + shard
            write_shard(
                folder,
                "train",
                shard,
                shard_format,
                normal((count, 2, 8, 8, 8), 0, "killed", shard).half(),
                [shard] * count,
                range(1000 * shard, 1000 * shard + count),
                [f"{shard}/{row}" for row in range(count)],
                plan="plan",
            )
    description = StoreDescription(
        split="train",
        shard_format=shard_format,
        latent=LatentSpec(kind="moments", channels=4, height=8, width=8, dtype="float16", downsample=8),
        views=["center", "center-hflip"],
        image={"size": 64, "crop": "adm-center"},
        vae={"name": "demo", "class": "AutoencoderKL", "sha256": "", "scaling_factor": 1.0, "shift_factor": None},
        classes=[str(label) for label in range(SHARDS)],
        class_ids=[str(label) for label in range(SHARDS)],
        seed=0,
        plan="plan",
    )
    finish_store(folder, description, shards=SHARDS)


def start(folder, shard_format, order):
    process = os.fork()
    if process == 0:
        try:
            write_store(folder, shard_format, order)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - a fork never returns
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return process


def broken_promises(folder):
    """What looks finished and is not."""
    found = []
    for shard in range(SHARDS):
        path = folder / f"train-{shard:05d}.json"
        if path.exists():
            record = json.loads(path.read_bytes())
            if hashlib.sha256((folder / record["file"]).read_bytes()).hexdigest() != record["sha256"]:
                found.append(f"{path.name} describes another shard")
    if (folder / "manifest.json").exists() and missing_shards(folder, "train", SHARDS):
        found.append("a manifest without all shards")
    return found


def run(folder, shard_format, rounds, writers, draws):
    """Kill all writers at a random moment, in so many rounds, then let one finish.

    A fast machine finishes the store before any kill: then the round begins anew, with a shorter wait.
    """
    folder.mkdir(parents=True)
    broken, killed, longest_wait = [], 0, 0.12
    while rounds > 0:
        orders = [draws.sample(range(SHARDS), SHARDS) for _ in range(writers)]
        processes = [start(folder, shard_format, order) for order in orders]
        time.sleep(draws.uniform(0, longest_wait))
        caught = 0
        for process in processes:
            os.kill(process, signal.SIGKILL)
            caught += os.waitpid(process, 0)[1] == signal.SIGKILL
        broken += broken_promises(folder)
        killed, rounds = killed + caught, rounds - bool(caught)
        if not caught:
            longest_wait /= 2
            shutil.rmtree(folder)
            folder.mkdir()
    _, status = os.waitpid(start(folder, shard_format, range(SHARDS)), 0)
    return {"broken": broken, "killed": killed, "status": status}


def read_in_a_fork(folder):
    """The exit status of a fork that reads with a store that its parent has used, threads and all."""
    shards._NO_WAIT = 0  # as on a file system that cannot tell what is cached: everything is read by threads
    store = LatentStore(folder)
    expected, _ = store[:]
    process = os.fork()
    if process == 0:
        os._exit(0 if torch.equal(store[:][0], expected) else 1)
    return os.waitpid(process, 0)[1]


def main():
    folder, (rounds, writers, seed) = Path(sys.argv[1]), map(int, sys.argv[2:])
    torch.set_num_threads(1)
    draws = random.Random(seed)
    report = {}
    for shard_format in ("safetensors", "webdataset"):
        report[f"{shard_format}-straight"] = run(folder / f"{shard_format}-straight", shard_format, 0, 0, draws)
        report[f"{shard_format}-killed"] = run(folder / f"{shard_format}-killed", shard_format, rounds, writers, draws)
    forked = read_in_a_fork(folder / "safetensors-straight")
    print(json.dumps({"stores": report, "forked": forked}))


if __name__ == "__main__":
    main()
