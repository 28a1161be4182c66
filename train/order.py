"""Which samples make which batch: a pure function of (seed, position), so that resuming costs nothing.

The stream of positions is endless: epoch e covers positions [e·N, (e+1)·N) and is its own permutation of all N
samples. Batch b covers positions [b·G, (b+1)·G), across an epoch's edge if it falls there, so every batch is full
and every sample comes exactly once per epoch, whatever the processes, the accumulation, or the point of resuming.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.randomness import Permutation, generator

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which part of every global batch this process computes, in how many micro-batches."""

    batch_size: int
    """Samples of the global batch."""
    rank: int = 0
    processes: int = 1
    accumulation: int = 1
    """Micro-batches per process."""

    def __post_init__(self) -> None:
        parts = self.processes * self.accumulation
        if self.batch_size % parts:
            lower = self.batch_size // parts * parts
            raise UserError(
                f"--batch-size {self.batch_size} does not divide among {self.processes} processes × "
                f"--grad-accumulation {self.accumulation}; use {f'{lower} or ' if lower else ''}{lower + parts}"
            )

    @property
    def local_size(self) -> int:
        """Samples per process and step."""
        return self.batch_size // self.processes

    @property
    def micro_size(self) -> int:
        """Samples per process and micro-batch."""
        return self.local_size // self.accumulation

    @property
    def rows(self) -> slice:
        """This process's rows of the global batch."""
        return slice(self.rank * self.local_size, (self.rank + 1) * self.local_size)

    def micro_rows(self, part: int) -> slice:
        """The rows of one micro-batch within this process's share."""
        return slice(part * self.micro_size, (part + 1) * self.micro_size)


RUN_ROWS, WINDOW_RUNS = 16, 64


class DataOrder:
    """The endless stream of sample indices: a fresh keyed permutation of the training samples per epoch.

    "scattered" permutes all of them. "runs" cuts the store into runs of 16 neighbours, permutes the runs, and then the
    samples within each window of 64 runs (1,024 samples): a disk reads 16 samples in one place within a few batches.
    The store's own order is random, so its batches are nearly as mixed.
    """

    def __init__(
        self, samples: int, seed: int, *, held_out: int = 0, order: Literal["scattered", "runs"] = "scattered"
    ) -> None:
        """Order `samples` of a store, without the `held_out` that the same seed always sets aside."""
        self.samples = samples - held_out
        self._in_runs = order == "runs"
        self._seed = seed
        self._held_out = held_out
        self._split = Permutation(samples, seed, "held-out split") if held_out else None
        self._kept: dict[tuple[str | int, ...], Permutation] = {}
        if self.samples < 1:
            raise UserError(
                f"of {samples} samples {held_out} are held out and none is left to train on; lower --validation-share"
            )

    def indices(self, positions: Indices) -> Indices:
        """The store's indices at the given positions of the endless stream."""
        epochs, within = np.divmod(positions, self.samples)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            arranged = self._arranged_in_runs if self._in_runs else self._scattered
            result[chosen] = arranged(int(epoch), within[chosen])
        return result if self._split is None else self._split[result + self._held_out]

    def batch(self, number: int, share: Share) -> Indices:
        """The indices of one process's rows of global batch `number`."""
        first = number * share.batch_size
        return self.indices(np.arange(first + share.rows.start, first + share.rows.stop, dtype=np.int64))

    def held_out(self, count: int) -> Indices:
        """The first `count` of the samples that training never sees."""
        if self._split is None:
            return np.empty(0, dtype=np.int64)
        return self._split[np.arange(min(count, self._held_out), dtype=np.int64)]

    def _scattered(self, epoch: int, within: Indices) -> Indices:
        return self._permutation("data order", self.samples, epoch)[within]

    def _arranged_in_runs(self, epoch: int, within: Indices) -> Indices:
        """Position → its window → a place in the window → a run and a row of it; what fills no run comes last."""
        whole, window = self.samples // RUN_ROWS * RUN_ROWS, RUN_ROWS * WINDOW_RUNS
        result = np.empty_like(within)
        for first in np.unique(np.where(within < whole, within // window * window, whole)).tolist():
            last = min(first + window, whole) if first < whole else self.samples
            chosen = (within >= first) & (within < last)
            place = self._permutation("window", last - first, epoch, first)[within[chosen] - first]
            if first < whole:
                runs = self._permutation("runs", whole // RUN_ROWS, epoch)[(first + place) // RUN_ROWS]
                result[chosen] = runs * RUN_ROWS + place % RUN_ROWS
            else:
                result[chosen] = whole + place
        return result

    def _permutation(self, purpose: str, length: int, *numbers: int) -> Permutation:
        key: tuple[str | int, ...] = (purpose, *numbers)
        if key not in self._kept:
            if len(self._kept) > 8:
                self._kept.clear()
            self._kept[key] = Permutation(length, self._seed, purpose, *numbers)
        return self._kept[key]


def draw_views(candidates: Indices, number: int, share: Share, seed: int) -> Indices:
    """Which of the store's views each of this process's samples is seen in, uniform over the candidates."""
    import torch

    drawn = torch.randint(len(candidates), (share.batch_size,), generator=generator(seed, "view", number))
    return candidates[drawn.numpy()[share.rows]]
