"""Which process of how many this is, how it is asked to stop, how it ends and waits. No torch: this comes first."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from pipeline.runtime.errors import UserError

# A signal so soon after the first is the same one, passed on by a launcher or sent to every process of a job.
SAME_SECONDS = 2.0
_END_SECONDS = 4.0
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Where this process stands among those started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    reason: str = "no launcher"
    """How the answer was found, for people to read."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """This process's place, from the variables that torchrun and `accelerate launch` set.

    Raises:
        UserError: the variables contradict each other.
    """
    if "WORLD_SIZE" not in environment or "RANK" not in environment:
        return Launch()
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers ({error}); unset them") from error
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} does not fit WORLD_SIZE={world_size}; start with a launcher or unset both")
    return Launch(rank=rank, world_size=world_size, local_rank=local_rank, reason="RANK and WORLD_SIZE of a launcher")


class Interrupted(BaseException):
    """A signal asks to end at once."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def stop_signals() -> set[int]:
    """The signals that ask to stop; SIGHUP, unless whoever started this ignores it, as nohup does."""
    hang_up = set() if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else {signal.SIGHUP}
    return {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} | hang_up


class StopRequest:
    """Notes SIGTERM, Ctrl-C, SIGUSR1 or SIGHUP instead of dying, so that work can be finished and saved first.

    A second one interrupts at once. Handlers are restored when the block ends.

        with StopRequest() as stop:
            while not stop.signal: …
        return stop.exit_status
    """

    def __init__(self, *, repeat_after_seconds: float = 0.0) -> None:
        """Wait for a signal.

        Args:
            repeat_after_seconds: a Ctrl-C sooner than this after the first is the same one. Launchers pass on to their
                processes what the terminal has sent to all of them already.
        """
        self.signal: int | None = None
        self._repeat_after_seconds = repeat_after_seconds
        self._noted_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._noted_at = number, now
        elif number == signal.SIGINT and now - self._noted_at >= self._repeat_after_seconds:
            raise KeyboardInterrupt
        elif number != signal.SIGINT and now - self._noted_at >= SAME_SECONDS:
            raise Interrupted(number)

    @property
    def exit_status(self) -> int:
        """128 + signal, as schedulers that requeue expect; 0 if none came."""
        return 0 if self.signal is None else 128 + self.signal


@contextlib.contextmanager
def second_signal_ends() -> Iterator[None]:
    """Let a second signal end this process within 5 s, also where its main thread waits in a library.

    Python runs a signal's handler between two of its own steps, so a read from a dead network disk, or an exchange
    with a process that is gone, would never hear of it. The number goes through a pipe to a thread that does.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_end_late, args=(reader, stop_signals()), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join(_LOOK_SECONDS)  # not for long: after a second signal it stays until the process ends


def _end_late(reader: int, numbers: set[int]) -> None:
    """End the process some seconds after the second signal; without one, return when the pipe is closed.

    That the command has ended meanwhile changes nothing: its process may still wait for a thread that waits.
    """
    first = 0.0
    while data := os.read(reader, 1):
        now = time.monotonic()
        if data[0] in numbers and not first:
            first = now
        elif data[0] in numbers and now - first >= SAME_SECONDS:
            time.sleep(_END_SECONDS)
            with contextlib.suppress(OSError):
                os.write(2, f"ended by a second {signal.Signals(data[0]).name} while it waited\n".encode())
            os._exit(128 + data[0])
    os.close(reader)


def in_process_group() -> bool:
    """Whether this process exchanges tensors with others."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    return int(distributed.get_world_size()) > 1


def end_in_group(status: int) -> NoReturn:
    """End after an error that was said, without waiting for the others: what they wait for is cut off."""
    from torch.distributed.distributed_c10d import _abort_process_group

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    aborting = threading.Thread(target=_abort_process_group, daemon=True)  # NCCL's may take its time, too
    with contextlib.suppress(RuntimeError):
        aborting.start()
        aborting.join(_END_SECONDS)
    os._exit(status)


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait for the others' part of a product spin a little and then sleep; before torch is loaded.

    GNU's OpenMP spins for milliseconds, which beside other programs takes the time of just those that are waited for:
    see `python -m benchmarks --parts waiting`. What the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment.keys():
        environment.update(GOMP_SPINCOUNT="10000", KMP_BLOCKTIME="1")  # rounds; Intel's runtime counts milliseconds


def keep_freed_memory() -> None:
    """Let glibc keep what a step on a CPU frees for the next one, instead of handing pages back and faulting them in.

    Training B/4 on 2 cores: up to 50,000 page faults and 0.1 of 0.9 s a step otherwise. Other allocators go without.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        system = ctypes.CDLL(None)
        system.mallopt(trim_threshold, 2**31 - 1)
        system.mallopt(mmap_threshold, 32 << 20)
