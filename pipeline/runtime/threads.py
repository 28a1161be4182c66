"""Work in threads: micro-batches on one thread each, so that results do not depend on the cores, and reading ahead.

A matrix product or a convolution that is split over two threads can differ in its last bit from one on a single thread.
With micro-batches of one size, as many at once as there are cores, no sum is ever split by their number; it is faster,
too, because nothing waits for the slowest of several threads after each product.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

CPU_MICRO_BATCH = 8  # larger ones are no faster on a core
ParallelMap = Callable[..., Iterator[Any]]
"""`map`, or one that works in parallel."""
Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def one_thread_each(device: torch.device, *, workers: int | None = None) -> Iterator[ParallelMap]:
    """A `map` over micro-batches: on a CPU in parallel with one thread each, elsewhere one after the other.

    Args:
        workers: micro-batches at once on a CPU; one per thread that PyTorch has, if not said.
    """
    if device.type != "cpu":
        yield map
        return
    workers = workers or torch.get_num_threads()
    with single_threaded():
        if workers == 1:
            yield map
            return
        with ThreadPoolExecutor(workers) as pool:
            yield pool.map


@contextmanager
def single_threaded() -> Iterator[None]:
    """PyTorch computes on the thread that asks, and on no other, while the block runs; in threads begun there too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def read_ahead(
    tasks: Iterable[Task], load: Callable[[Task], Result], *, workers: int, window: int
) -> Iterator[Iterator[tuple[Task, Result]]]:
    """Each task with its result, in order, while the next ones are loaded by `workers` threads.

    When a result is asked for, `window` tasks are under way or done, that one included. Leaving the block drops what
    has not begun. An exception of `load` appears when its turn comes.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
    try:
        yield _in_order(pool, iter(tasks), load, window)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, tasks: Iterator[Task], load: Callable[[Task], Result], window: int
) -> Iterator[tuple[Task, Result]]:
    pending: deque[tuple[Task, Future[Result]]] = deque()
    while True:
        pending.extend((task, pool.submit(load, task)) for task in islice(tasks, window - len(pending)))
        if not pending:
            return
        task, future = pending.popleft()
        yield task, future.result()


def finite_rows(x: Tensor) -> Tensor:
    """Whether every value of a row is finite, [N]."""
    return torch.isfinite(x).flatten(1).all(1)
