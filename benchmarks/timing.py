"""Time and memory of works that are compared: in turns, medians, spread.

Two works take turns, A B, B A, A B, …, so that a machine that slows down favours neither, and each round gives one
ratio. What is compared is the median of those ratios; the spread of the same round after round is the noise.
"""

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

Work = Callable[[], object]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    least: float
    greatest: float
    count: int

    def scaled(self, factor: float) -> "Spread":
        """The same in another unit."""
        return Spread(
            median=self.median * factor, least=self.least * factor, greatest=self.greatest * factor, count=self.count
        )


def spread(values: Sequence[float]) -> Spread:
    """The median of some measurements, the least and the greatest."""
    return Spread(median=statistics.median(values), least=min(values), greatest=max(values), count=len(values))


def rates(seconds: Sequence[float], amount: float) -> Spread:
    """How much per second, where each measurement took that long for `amount`."""
    return spread([amount / taken for taken in seconds])


def ratios(times: Mapping[str, Sequence[float]], *, per_plain: float = 1.0, per_ours: float = 1.0) -> Spread:
    """How many times as fast "ours" is as "plain", round by round.

    Args:
        per_plain: how much one call of "plain" does; with `per_ours`, for works of different sizes.
    """
    pairs = zip(times["plain"], times["ours"], strict=True)
    return spread([(plain / per_plain) / (ours / per_ours) for plain, ours in pairs])


def finish(device: torch.device) -> None:
    """Return when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Work, device: torch.device = CPU, *, calls: int = 1) -> float:
    """Wall-clock seconds per call, with all that the device still has to do at the end."""
    finish(device)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    finish(device)
    return (time.perf_counter() - started) / calls


def device_seconds_of(work: Work, device: torch.device = CPU, *, calls: int = 1) -> float:
    """Seconds per call as the device counts them between two events; on a CPU the wall clock's."""
    if device.type != "cuda":
        return seconds_of(work, device, calls=calls)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    finish(device)
    began.record()
    for _ in range(calls):
        work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000 / calls


def interleaved(
    works: Mapping[str, Work],
    *,
    rounds: int,
    device: torch.device = CPU,
    warm_ups: int = 1,
    calls: int = 1,
    hand_over: bool = False,
    clock: Callable[..., float] = seconds_of,
) -> dict[str, list[float]]:
    """Seconds per call of each work, one entry per round; the first `warm_ups` rounds do not count.

    Args:
        hand_over: begin every turn with the memory of the turn before given back and one call that does not count,
            for works that do not fit beside each other.
        clock: `seconds_of` or `device_seconds_of`.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-warm_ups, rounds):
        for name in list(works) if number % 2 == 0 else reversed(list(works)):
            if hand_over:
                release(device)
                works[name]()
            seconds = clock(works[name], device, calls=calls)
            if number >= 0:
                taken[name].append(seconds)
    return taken


def release(device: torch.device) -> None:
    """Give memory that nothing uses back: to the driver, or to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(build: Callable[[], AbstractContextManager[Work]], device: torch.device = CPU) -> int | None:
    """The most memory that building a work and calling it three times takes, beyond what was taken before.

    On a GPU as PyTorch's allocator counts it; on a CPU the resident memory, which Linux lets a process reset (None
    where it does not). So the state that a work keeps (weights, optimizer, averages) counts for it.
    """
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        except OSError:
            return None
        before = resident_bytes("VmRSS")
    with build() as work:
        for _ in range(3):
            work()
        finish(device)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")
    release(device)
    return peak - before


def resident_bytes(name: str = "VmHWM") -> int:
    """Memory of this process as the system counts it: VmRSS is what it has now, VmHWM the most it has had.

    `getrusage` would not do: what it gives a fresh process begins at its parent's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
