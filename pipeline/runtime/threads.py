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

CPU_LANE = 8  # larger lanes are no faster on a core
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


def finite_rows(x: Tensor) -> Tensor:
    """Whether every value of a row is finite, [N]."""
    return torch.isfinite(x).flatten(1).all(1)
