"""Small stores and short runs: DiT-Ti/2 on 4×8×8 latents, a few milliseconds per step."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from pipeline.latents.manifest import LatentSpec
from pipeline.latents.writer import StoreDescription, finish_store, write_shard
from tests.families import kill_family
from tests.forked import Forked, ranks
from train.__main__ import main
from train.data import BatchReader

ROOT = Path(__file__).parents[2]
QUICK = ["--model", "DiT-Ti/2", "--batch-size", "8", "--log-every", "1", "--sample-every", "0", "--no-tensorboard"]
VAE = {
    "name": "nobody/knows",
    "class": "AutoencoderKL",
    "sha256": "5" * 64,
    "scaling_factor": 0.5,
    "shift_factor": None,
}


def make_store(
    folder,
    *,
    samples=50,
    classes=4,
    shape=(4, 8, 8),
    shards=2,
    seed=0,
    labels=None,
    vae=VAE,
    views=("center", "center-hflip"),
    kind="moments",
):
    """A finished store of random latents."""
    draws = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    values = channels * (2 if kind == "moments" else 1)
    bounds = [samples * k // shards for k in range(shards + 1)]
    given = [k % max(classes, 1) if classes else -1 for k in range(samples)] if labels is None else labels
    for shard, (first, last) in enumerate(itertools.pairwise(bounds)):
        latents = torch.randn(last - first, len(views), values, height, width, generator=draws).half()
        keys = [f"{k}.png" for k in range(first, last)]
        write_shard(
            folder, "train", shard, "safetensors", latents, given[first:last], range(first, last), keys, kind=kind
        )
    spec = LatentSpec(kind=kind, channels=channels, height=height, width=width, dtype="float16", downsample=8)
    description = StoreDescription(
        split="train",
        shard_format="safetensors",
        latent=spec,
        views=views,
        image={"size": 8 * height, "crop": "adm-center"},
        vae=vae,
        classes=[f"class {k}" for k in range(classes)],
        class_ids=[f"n{k:04d}" for k in range(classes)],
        seed=0,
    )
    assert finish_store(folder, description, shards=shards) is not None
    return folder


def read_batches(latents, order, shard, **options):
    """A reader of a run's batches on the CPU, from the first one on, both views of a sample in turn."""
    device = torch.device("cpu")
    return BatchReader(latents, order, shard, views=np.arange(2), seed=0, first=0, device=device, **options)


def train(store, out, *flags, **sizes):
    """A run in this process; its exit status."""
    return main(command(store, out, *flags, **sizes)[2:])


def command(store, out, *flags, steps=12, depth=2):
    """The words of a run, of two of the preset's blocks; with a depth of None it has all of them."""
    blocks = [] if depth is None else ["--depth", str(depth)]
    words = ["-m", "train", "--latents", str(store), "--out", str(out), "--steps", str(steps)]
    return [*words, *QUICK, *blocks, *flags]


def environment(**extra):
    """One thread per process, as in this one, and the checkout importable from anywhere."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"} | extra


def torchrun(store, out, *flags, processes=2, **sizes):
    """The words of a run in several real processes."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--module"]
    return [*words, *command(store, out, *flags, **sizes)[1:]]


def launch(store, out, *flags, processes=2, **sizes):
    """A run in real processes under torchrun."""
    words = torchrun(store, out, *flags, processes=processes, **sizes)
    return subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@contextlib.contextmanager
def start(store, out, *flags, **sizes):
    """A run in a process of its own, which the test goes on to disturb; never left behind."""
    with fork(*command(store, out, *flags, **sizes)[2:]) as process:
        yield process


def fork(*flags, before="", **variables):
    """`dit-train` with these flags in a process of its own."""
    return Forked("train", *flags, environment=environment(**variables), where=ROOT, before=before)


def launch_forked(store, out, *flags, processes=2, **sizes):
    """(statuses, standard errors) of a run in real processes that find each other as those of torchrun do."""
    words = command(store, out, *flags, **sizes)[2:]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(fork(*words, **variables)) for variables in ranks(processes)]
        said = [process.communicate()[1] for process in started]
        return [process.returncode for process in started], said


@contextlib.contextmanager
def running(words):
    """A process whose stderr the test reads; killed, with all that it started, if the test has not ended it."""
    process = subprocess.Popen(words, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.returncode is None:
            kill_family(process)


def wait_for(condition, seconds=300):
    """Until something is so, or the test fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def lines(run):
    """metrics.jsonl."""
    path = Path(run) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


DETERMINED = (
    "step",
    "loss",
    "mse",
    "vb",
    "loss_q0",
    "loss_q1",
    "loss_q2",
    "loss_q3",
    "grad_norm",
    "lr",
    "skipped_steps",
)


def history(run):
    """Everything logged that may not depend on when and where it was computed."""
    return [{name: line[name] for name in DETERMINED} for line in lines(run)]


def tensors(run, step):
    """Every tensor of a checkpoint: weights, averages, optimizer."""
    folder = Path(run) / "checkpoints" / f"step-{step:07d}"
    return {
        f"{path.stem}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_run(one, other, step):
    """Bit-equal weights, averages, optimizer state and logged numbers."""
    first, second = tensors(one, step), tensors(other, step)
    assert first.keys() == second.keys()
    assert {name for name in first if not torch.equal(first[name], second[name])} == set()
    assert history(one) == history(other)


def checkpoints(run):
    return sorted(path.name for path in (Path(run) / "checkpoints").iterdir())


def poison(folder, rows):
    """Make some samples' latents NaN behind the store's back (first shard only, both views)."""
    path = min(Path(folder).glob("*.safetensors"))
    header = int.from_bytes(path.read_bytes()[:8], "little")
    entry = json.loads(path.read_bytes()[8 : 8 + header])["moments"]
    row_bytes = (entry["data_offsets"][1] - entry["data_offsets"][0]) // entry["shape"][0]
    with path.open("r+b") as file:
        for row in rows:
            file.seek(8 + header + entry["data_offsets"][0] + row * row_bytes)
            file.write(b"\x00\x7e" * (row_bytes // 2))


def assert_close_histories(one, other, *, relative=1e-5):
    """The same draws and data: every logged loss equal but for rounding."""
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert (first["step"], first["lr"], first["skipped_steps"]) == (
            second["step"],
            second["lr"],
            second["skipped_steps"],
        )
        for name in ("loss", "mse", "loss_q0", "loss_q1", "loss_q2", "loss_q3"):
            a, b = first[name], second[name]
            assert (a is None) == (b is None), (name, first, second)
            assert a is None or abs(a - b) <= relative * abs(a), (name, first["step"], a, b)
