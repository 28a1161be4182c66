"""The preloaded library from Python: compiled, armed in this process, and its log read as points."""

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
MODES = ("kill", "half", "enospc", "enospc1", "eio", "eio1", "stop")
HIT = "!"


@dataclass(frozen=True, order=True)
class Point:
    """One call that changes something: its name in the log, and which of the calls of that name it is."""

    name: str
    occurrence: int = 1

    def __str__(self):
        return self.name if self.occurrence == 1 else f"{self.name} ({self.occurrence})"

    @property
    def call(self):
        return self.name.partition(" ")[0]

    @property
    def site(self):
        """The name without numbers and digests: points that one line of the source makes, or a few."""
        return re.sub(r"[0-9a-f]{8,}|\d+", "#", self.name)

    def suits(self, mode):
        if mode == "half":
            return self.call == "write"
        return self.call not in {"unlink", "rmdir"} or not mode.startswith("enospc")


def compiler():
    return shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")


def compile_shim(folder):
    """The library, compiled into a folder."""
    library = Path(folder) / "shim.so"
    subprocess.run([compiler(), "-O1", "-w", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def arm(folder, log, point=None, mode=""):
    """Name every call below the folder from now on, and do at the point what the mode says."""
    name, occurrence = (point.name, point.occurrence) if point else ("", 0)
    function = ctypes.CDLL(None).crash_arm
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_char_p]
    assert function(str(folder).encode(), str(log).encode(), name.encode(), occurrence, mode.encode()) == 1


def points_of(log):
    """Every point of a log, in its order."""
    seen, points = Counter(), []
    for name in Path(log).read_text().splitlines():
        if name != HIT:
            seen[name] += 1
            points.append(Point(name, seen[name]))
    return points


def reads_of(log):
    """(opened, moved) paths below the folder, of a run in mode "reads"."""
    lines = [line.partition(" ") for line in Path(log).read_text().splitlines()]
    return tuple({path for how, _, path in lines if how == wanted} for wanted in ("open", "move"))


def was_hit(log):
    return Path(log).exists() and HIT in Path(log).read_text().splitlines()
