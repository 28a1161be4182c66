"""Inputs read, decoded and cropped ahead of the encoder, by threads (Pillow and file reads release the interpreter)."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def read_ahead(
    tasks: Iterable[Task], load: Callable[[Task], Result], *, workers: int, window: int
) -> Iterator[Iterator[tuple[Task, Result]]]:
    """Each task with its result, in order, while the next `window` tasks are loaded by `workers` threads.

    Leaving the block drops what has not begun. An exception of `load` appears when its turn comes.
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
