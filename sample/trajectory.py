"""Moments of the reverse process, kept while it runs, and drawn as a strip."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.diffusion.denoiser import on_host


class LaneWatcher(Protocol):
    """Looks at one run of a sampler, in the thread that it runs in."""

    def watched(self, denoise: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The same function; its input may be remembered."""

    def on_step(self, k: int, total: int, x_start: Tensor) -> None:
        """Step k of `total` is made; x_start [rows, C, h, w] is where the network expects it to end."""

    def end(self, x: Tensor) -> None:
        """The result [rows, C, h, w]; all latents are in the network's scale."""


class Watcher(Protocol):
    """Looks at a batch on its way."""

    def lane(self, start: int, count: int) -> LaneWatcher | None:
        """What looks at rows start … start + count − 1, past the end of the batch its last one again; None: nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """One image at one moment, as latents [C, h, w] in the network's scale."""

    k: int
    """Which moment, counted from the noisy end."""
    t: float
    """Time as the network is told it, 1000 (noise) to 0 (data)."""
    x_t: Tensor
    """Where the process stands."""
    x_start: Tensor
    """Where the network expects it to end."""


class Watch:
    """Keeps moments of some rows of one batch: evenly spaced ones, then the end."""

    def __init__(self, moments: int, rows: Sequence[int]) -> None:
        """Watch `moments` moments of the given rows of the batch."""
        self.moments = moments
        self.rows = list(rows)
        self._kept: dict[int, list[Moment]] = {row: [] for row in self.rows}
        self._lock = threading.Lock()

    def lane(self, start: int, count: int) -> "LaneWatch | None":
        """What watches rows start … start + count − 1, if any of them is asked for."""
        rows = [row for row in self.rows if start <= row < start + count]
        return LaneWatch(self, start, rows) if rows else None

    def keep(self, row: int, moment: Moment) -> None:
        """Add a moment of one row; rows are filled from several threads."""
        with self._lock:
            self._kept[row].append(moment)

    def of_row(self, row: int) -> list[Moment]:
        """One row's moments, from noise to data."""
        return sorted(self._kept[row], key=lambda moment: moment.k)

    def is_kept(self, k: int, total: int) -> bool:
        """Whether step k of `total` is one of the evenly spaced moments before the end."""
        before_end = self.moments - 1
        return k in {round(i * total / before_end) for i in range(before_end)}


class LaneWatch:
    """Looks at one run of a sampler for a `Watch`."""

    def __init__(self, watch: Watch, start: int, rows: Sequence[int]) -> None:
        """Look at the given rows of the batch, in a lane that begins at row `start`."""
        self._watch = watch
        self._start = start
        self._rows = rows
        self._input: tuple[Tensor, Tensor] | None = None

    def watched(self, denoise: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The same function, its input remembered until the step is over."""

        def watched(x_t: Tensor, t: Tensor) -> Tensor:
            self._input = (x_t, t)
            return denoise(x_t, t)

        return watched

    def on_step(self, k: int, total: int, x_start: Tensor) -> None:
        """Keep this step if its turn has come."""
        if self._input is not None and self._watch.is_kept(k, total):
            x_t, t = self._input
            self._keep(k, float(on_host(t)[0]), x_t, x_start)

    def end(self, x: Tensor) -> None:
        """Keep the result."""
        self._keep(1_000_000_000, 0.0, x, x)

    def _keep(self, k: int, t: float, x_t: Tensor, x_start: Tensor) -> None:
        for row in self._rows:
            here = row - self._start
            self._watch.keep(row, Moment(k=k, t=t, x_t=x_t[here].cpu(), x_start=x_start[here].cpu()))


def strip_latents(watch: Watch) -> Tensor:
    """Latents [2 · rows, moments, C, h, w]: per row where the process stood, then where it was expected to end."""
    strips = []
    for row in watch.rows:
        moments = watch.of_row(row)
        strips += [torch.stack([m.x_t for m in moments]), torch.stack([m.x_start for m in moments])]
    return torch.stack(strips)
