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


@dataclass(frozen=True)
class Reads:
    """Paths below the folder that a run in mode "reads" came by, by the names that they had at its start."""

    opened: frozenset[str]
    moved: frozenset[str]
    asked: frozenset[str]
    """Whether they are there."""
    listed: frozenset[str]
    """Folders whose names it has read."""
    dropped: frozenset[str]
    """Removed or cut to nothing; what was done with that name later is not told."""
    swept: frozenset[str]
    """Folders that were removed with all that was in them, whatever it was."""

    @property
    def touched(self):
        """Every path that the run did more with than ask whether it is there."""
        return self.opened | self.moved | self.listed | self.dropped


def reads_of(log):
    """What a run in mode "reads" looked at."""
    found, renames = {how: set() for how in ("open", "move", "ask", "list", "walk", "drop")}, []
    for line in Path(log).read_text().splitlines():
        how, _, path = line.partition(" ")
        if how == "move":
            pair = tuple(path.split("\t"))
            found[how] |= {_first_name(one, renames) for one in pair if one}
            renames.append(pair)
        elif how in found:
            path = _first_name(path, renames)
            if path not in found["drop"] and not found["walk"] & found["drop"] & set(with_parents(path)):
                found[how].add(path)
    opened, moved, asked, listed, walked, dropped = map(frozenset, found.values())
    swept = (walked & dropped) - listed
    return Reads(opened, moved, asked, listed | (walked - swept), dropped, swept)


def with_parents(path):
    """A path and the folders that it is in, the innermost first."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _first_name(path, renames):
    """What a path was called before the renames; one that was renamed over had the other's name, as if exchanged."""
    for one, two in reversed(renames):
        for now, was in ((two, one), (one, two)):
            if now and was and (path == now or path.startswith(f"{now}/")):
                path = was + path[len(now) :]
                break
    return path


def was_hit(log):
    return Path(log).exists() and HIT in Path(log).read_text().splitlines()
