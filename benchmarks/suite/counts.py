"""What does not depend on the machine: operations and host reads per step, graphs per compiled block."""

import numpy as np
import torch

from benchmarks.dispatch import Recorder, graph_breaks, recorded
from benchmarks.report import Row
from benchmarks.sample import Race, our_side
from benchmarks.stores import write_store
from benchmarks.suite.setting import Setting
from benchmarks.timing import spread
from benchmarks.train import our_step
from pipeline.dit import DiT
from pipeline.vae import load_vae

MODEL = "DiT-Ti/2"


def measure(setting: Setting) -> list[Row]:
    """Counted on the CPU with a tiny network of six blocks; every DiT asks for the same per block and per step."""
    write_store(setting.folder / "store", samples=16, side=8)
    with our_step(MODEL, setting.folder, 4) as step:
        for _ in range(2):  # the first one logs
            step()
        training = recorded(step)
    reverse = [reverse_process(steps) for steps in (2, 3)]
    block = DiT.from_preset(MODEL, input_size=8).blocks[0]
    _, breaks = graph_breaks(block, torch.zeros(1, 16, 128), torch.zeros(1, 128))
    return [
        _count("host reads in a training step that logs nothing", training.waits.total(), at_most=0),
        _count(
            "host reads in a step of guided sampling", reverse[1].waits.total() - reverse[0].waits.total(), at_most=0
        ),
        _count("graph breaks in a compiled block", breaks, at_most=0),
        _count(f"operations in an eager training step, {MODEL}", training.operations.total()),
        _count(
            f"operations in an eager step of guided sampling, {MODEL}",
            reverse[1].operations.total() - reverse[0].operations.total(),
        ),
    ]


def reverse_process(steps: int) -> Recorder:
    """What sampling one batch in so many steps does."""
    race = Race(model=MODEL, batch_size=1, steps=steps, rounds=1, device="cpu", compiled=False)
    generator = our_side(DiT.from_preset(MODEL, input_size=8), load_vae("demo"), race)
    generator._workers = 1  # in this thread, where it can be watched
    return recorded(lambda: generator.latents(0, np.zeros(1, dtype=np.int64)))


def _count(what: str, value: int, *, at_most: float | None = None) -> Row:
    return Row(what=what, unit="", ours=spread([float(value)]), wanted_at_most=at_most)
