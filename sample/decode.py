"""Latents to pixels: in lanes of one size, beside the next batch's reverse process on a GPU, refused if not finite."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.errors import UserError
from pipeline.runtime.threads import CPU_MICRO_BATCH, ParallelMap, finite_rows
from pipeline.vae import Vae, to_bytes
from pipeline.vae_lanes import DECODED_PX, at_once


def decode_lane(device: torch.device, *, pixels: int) -> int:
    """How many images of so many pixels are decoded at once: eight on a CPU, elsewhere what fills the same memory."""
    return CPU_MICRO_BATCH if device.type == "cpu" else at_once(DECODED_PX, pixels)


def decode_in_lanes(vae: Vae, latents: Tensor, *, size: int, in_lanes: ParallelMap) -> tuple[Tensor, Tensor]:
    """(whether each row is finite [N], images uint8 [N, H, W, 3]) of raw latents, both on the CPU.

    A decoder's rounding depends on the size of its batch, so every lane has `size` rows: the last one is filled up.
    """

    def lane(part: Tensor) -> tuple[Tensor, Tensor]:
        padding = part[-1:].expand(size - len(part), *part.shape[1:])
        values = vae.decode_values(torch.cat([part, padding]))[: len(part)]
        images = to_bytes(values)
        # Both in one copy, as a GPU's host waits for each.
        sent = torch.cat([images.flatten(1), finite_rows(values)[:, None]], dim=1).cpu()
        return sent[:, -1].bool(), sent[:, :-1].view(images.shape)

    finite, images = zip(*in_lanes(lane, latents.split(size)), strict=True)
    return torch.cat(finite), torch.cat(images)


class NotFiniteError(UserError):
    """Values of some rows of a batch are not finite."""

    def __init__(self, what: str, rows: list[int]) -> None:
        super().__init__(f"{what} of rows {rows} of a batch are not finite")
        self.what = what
        self.rows = rows


def check_finite(finite: Tensor, what: str) -> None:
    """Raise NotFiniteError unless every row of a batch is finite, as [N] truth values tell."""
    rows = (~finite).nonzero().flatten().tolist()
    if rows:
        raise NotFiniteError(what, rows)


class Overlap:
    """Runs one piece of work beside the main thread; the next piece waits for the one before."""

    def __init__(self, *, enabled: bool) -> None:
        """With `enabled` False every piece is run at once, where threads would only compete for the same cores."""
        self._pool = ThreadPoolExecutor(1) if enabled else None
        self._running: Future[Any] | None = None

    def run(self, work: Callable[[], None]) -> None:
        self.wait()
        if self._pool is None:
            work()
        else:
            self._running = self._pool.submit(work)

    def wait(self) -> None:
        """Return when the last piece is done; its exception is raised here."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Return when nothing runs any more, whatever became of it."""
        if self._pool is not None:
            self._pool.shutdown()


@contextlib.contextmanager
def overlapping(*, enabled: bool) -> Iterator[Overlap]:
    """An `Overlap` whose last piece is done when the block ends, also by an error, which then comes out."""
    overlap = Overlap(enabled=enabled)
    try:
        yield overlap
        overlap.wait()
    finally:
        overlap.close()
