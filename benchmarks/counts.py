"""What no machine changes, so that a test can hold it: operations and host reads per step, graphs per compiled block.

A host read is an operation whose result Python needs before it can go on, `.item()` above all. On a GPU it waits until
everything before it is computed, so a training step must have none.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import Setting
from benchmarks.report import Pieces, Row
from benchmarks.sample import Race, our_side
from benchmarks.stores import write_store
from benchmarks.timing import spread
from benchmarks.train import our_step
from pipeline.dit import DiT
from pipeline.vae import load_vae

ROOT = Path(__file__).parents[1]
MODEL = "DiT-Ti/2"
_aten = torch.ops.aten
HOST_READS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten._unique2.default,
}
CPU_ONLY_READS = {"pipeline/dit/model.py _checked", "pipeline/checkpoint/averages.py update"}
"""Host reads that are behind a question for the CPU: the range of the labels, and whether a step is skipped."""


class Recorder(TorchDispatchMode):
    """Counts operations (those that compute or copy, not views) and host reads while the block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.host_reads: Counter[str] = Counter()
        """By the place in this project that asks, as "pipeline/checkpoint/averages.py update"."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not function.is_view:
            self.operations[str(function)] += 1
        if function in HOST_READS:
            self.host_reads[_asking_place()] += 1
        return function(*args, **(kwargs or {}))

    @property
    def waits(self) -> Counter[str]:
        """The host reads that a GPU would meet too."""
        return Counter({place: count for place, count in self.host_reads.items() if place not in CPU_ONLY_READS})


def recorded(work: Callable[[], object]) -> Recorder:
    """What one call does."""
    with Recorder() as recorder:
        work()
    return recorder


def _asking_place() -> str:
    """The innermost function of this project, outside this file, that led here."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside this project"


def graph_breaks(module: torch.nn.Module, *inputs: torch.Tensor) -> tuple[int, int]:
    """(graphs, breaks between them) that torch.compile makes of a module; 1 and 0 is all in one piece."""
    torch.compiler.reset()
    found = torch._dynamo.explain(module)(*inputs)
    torch.compiler.reset()
    return found.graph_count, found.graph_break_count


def pieces(setting: Setting) -> Pieces:
    """All counts."""
    return {"counts": lambda: measure(setting)}


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
