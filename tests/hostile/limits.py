"""A child process in which each of many small works may take ten seconds and two gigabytes, and is named if it takes more.

The time is the kernel's alarm, which ends the child also within a library's loop; the memory is that of addresses, so
that what is asked for and never touched counts, too.
"""

import gc
import json
import mmap
import os
import resource
import signal
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

SECONDS, BYTES = 10.0, 2 * 10**9
_BEYOND = 4
"""Times BYTES, where the system itself refuses."""


class BeyondLimitError(BaseException):
    """Nothing to go on after: what was taken stays in the process's record."""


def run_each(numbers: int, work: Callable[[int], str], *, seconds: float = SECONDS, most: int = BYTES) -> list[str]:
    """What `work` says of each number below `numbers`, all in one child of this process; raises as `run_limited`."""
    said: list[str] = run_limited(
        lambda limited: [limited(lambda number=number: work(number)) for number in range(numbers)],
        seconds=seconds,
        most=most,
    )
    return said


def run_limited(body: Callable[[Callable[..., Any]], Any], *, seconds: float = SECONDS, most: int = BYTES) -> Any:
    """What `body` returns, as JSON, of a child of this process; it calls what it is given with each of its small works.

    Raises:
        AssertionError: a work took longer or more memory, or ended the child, or `body` failed; the number of the work
            is named.
    """
    at, (reader, writer) = mmap.mmap(-1, 8), os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(body, at, writer, seconds, most)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    number, code = int.from_bytes(at[:8], "little"), os.waitstatus_to_exitcode(status)
    assert code != -signal.SIGALRM, f"number {number} took more than {seconds:g} s"
    assert code == 0, f"number {number} ended the process by {code}: {answer.decode(errors='replace')}"
    return json.loads(answer)


def _be_child(body: Callable[[Callable[..., Any]], Any], at: mmap.mmap, writer: int, seconds: float, most: int) -> None:
    gc.freeze()
    code, calls, before = 1, count(), _address_bytes("VmSize")

    def limited(work: Callable[[], Any]) -> Any:
        at[:8] = next(calls).to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if (taken := _address_bytes("VmPeak") - before) >= most:
                raise BeyondLimitError(f"{taken / 1e9:.1f} GB were asked for, {most / 1e9:.1f} are allowed")

    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (before + _BEYOND * most, resource.RLIM_INFINITY))
        answer, code = json.dumps(body(limited)), 0
    except BaseException:  # noqa: BLE001 -- pytest must not go on in the child
        answer = traceback.format_exc()
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(answer.encode())
    os._exit(code)


def _address_bytes(name: str) -> int:
    """Of this process: VmSize now, or the most there has been, VmPeak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
