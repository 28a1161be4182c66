"""What every part of the benchmarks is given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import Ceilings
from benchmarks.report import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where and how much to measure."""

    device: torch.device
    ceilings: Ceilings
    folder: Path
    """For files; removed at the end."""
    quick: bool
    """Only see that it runs: tiny sizes, whose figures mean nothing."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def rounds(self, usual: int) -> int:
        """Interleaved rounds."""
        return 2 if self.quick else usual


Part = Callable[[Setting], list[Row]]
