"""A child process in which each of many small works may take ten seconds and two gigabytes, and is named if it takes more.

The time is the kernel's alarm, which ends the child also within a library's loop; the memory is that of addresses, so
that what is asked for and never touched counts, too.
"""

import json
import mmap
import os
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS, BYTES = 10.0, 2 * 10**9
_BEYOND = 4
"""Times BYTES, where the system itself refuses."""


def run_each(count: int, work: Callable[[int], str], *, seconds: float = SECONDS, most: int = BYTES) -> list[str]:
    """What `work` says of each number below `count`, all in one child of this process.

    Raises:
        AssertionError: a number took longer or more memory, or ended the child; it is named.
    """
    at, (reader, writer) = mmap.mmap(-1, 8), os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(count, work, at, writer, seconds, most)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    number, code = int.from_bytes(at[:8], "little"), os.waitstatus_to_exitcode(status)
    assert code != -signal.SIGALRM, f"number {number} took more than {seconds:g} s"
    assert code == 0, f"number {number} ended the process by {code}: {answer.decode(errors='replace')}"
    said: list[str] = json.loads(answer)
    return said


def _be_child(count: int, work: Callable[[int], str], at: mmap.mmap, writer: int, seconds: float, most: int) -> None:
    code, said = 1, []
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        before = _address_bytes("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (before + _BEYOND * most, resource.RLIM_INFINITY))
        for number in range(count):
            at[:8] = number.to_bytes(8, "little")
            signal.setitimer(signal.ITIMER_REAL, seconds)
            said.append(work(number))
            signal.setitimer(signal.ITIMER_REAL, 0)
            taken = _address_bytes("VmPeak") - before
            assert taken < most, f"{taken / 1e9:.1f} GB were asked for, {most / 1e9:.1f} are allowed"
        answer, code = json.dumps(said), 0
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
