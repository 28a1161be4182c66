"""A batch in lanes: pieces of one size that a CPU computes on one thread each, as many at once as it has cores.

A matrix product or a convolution that is split over two threads can differ in its last bit from one on a single thread.
With lanes no sum is ever split by the number of cores, so results do not depend on it; it is faster, too.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.vae import Vae, to_bytes

CPU_LANE = 8  # larger lanes are no faster on a core
GPU_DECODE_BATCH = 16
InLanes = Callable[..., Iterator[Any]]
"""`map`, or one that works in parallel."""


@contextmanager
def one_thread_each(device: torch.device, *, workers: int | None = None) -> Iterator[InLanes]:
    """A `map` over lanes: on a CPU in parallel with one thread each, elsewhere one after the other.

    Args:
        workers: lanes at once on a CPU; one per thread that PyTorch has, if not said.
    """
    if device.type != "cpu":
        yield map
        return
    threads = torch.get_num_threads()
    workers = workers or threads
    torch.set_num_threads(1)
    try:
        if workers == 1:
            yield map
            return
        with ThreadPoolExecutor(workers) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


def decode_in_lanes(vae: Vae, latents: Tensor, *, size: int, in_lanes: InLanes) -> tuple[Tensor, Tensor]:
    """(whether each row is finite [N], images uint8 [N, H, W, 3]) of raw latents, both on the CPU.

    A decoder's rounding depends on the size of its batch, so every lane has `size` rows: the last one is filled up.
    """

    def lane(part: Tensor) -> tuple[Tensor, Tensor]:
        padding = part[-1:].expand(size - len(part), *part.shape[1:])
        values = vae.decode_values(torch.cat([part, padding]))[: len(part)]
        return finite_rows(values).cpu(), to_bytes(values)

    finite, images = zip(*in_lanes(lane, latents.split(size)), strict=True)
    return torch.cat(finite), torch.cat(images)


def finite_rows(x: Tensor) -> Tensor:
    """Whether every value of a row is finite, [N]."""
    return torch.isfinite(x).flatten(1).all(1)
