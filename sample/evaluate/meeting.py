"""Where processes that were started together wait for each other before they part for good."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import Launch


@contextmanager
def meeting(place: Launch) -> Iterator[Callable[[], None]]:
    """Give a function that returns when every process has called it as often; with one process, at once.

    A process group is needed only here: afterwards the processes share their work through files, so that none
    waits in a collective for one that has died or is long done.

    Raises:
        UserError: the variables of a launcher are incomplete, or the processes do not find each other.
    """
    if place.world_size == 1:
        yield lambda: None
        return
    import torch.distributed

    try:
        torch.distributed.init_process_group("gloo", rank=place.rank, world_size=place.world_size)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the {place.world_size} processes do not find each other ({error}); "
            f"start them with torchrun or accelerate launch, or unset RANK and WORLD_SIZE for one process"
        ) from error

    def meet() -> None:
        try:
            torch.distributed.barrier()
        except RuntimeError as error:  # another process has ended, and has said why
            raise SystemExit(2) from error

    try:
        yield meet
    finally:
        torch.distributed.destroy_process_group()
