"""What a piece of work asks PyTorch to do, counted: the same on every machine, so a test can hold it.

A host read is an operation whose result Python needs before it can go on, `.item()` above all. On a GPU it waits until
everything before it is computed, so a training step must have none.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
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
