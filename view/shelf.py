"""Files that windows of the page show, in a temporary folder that goes with the process."""

import shutil
import tempfile
import threading
from collections import OrderedDict
from functools import cache
from pathlib import Path

MOST_WINDOWS = 64


@cache
def scratch() -> Path:
    """The one folder that this process writes into, and the only one whose files are served."""
    return Path(_folder().name).resolve()


@cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="dit-view-", ignore_cleanup_errors=True)


class Shelf:
    """What each window sees at each place; of a place that changes the last two, since a browser may still ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: OrderedDict[str, dict[str, list[Path]]] = OrderedDict()

    def put(self, window: str, place: str, name: str, data: bytes) -> str:
        """The path of a new file of that name, in a folder with a name that nobody guesses."""
        path = Path(tempfile.mkdtemp(dir=scratch()), name)
        path.write_bytes(data)
        with self._lock:
            places = self._windows.setdefault(window, {})
            self._windows.move_to_end(window)
            kept = places.setdefault(place, [])
            kept.append(path)
            old = [kept.pop(0)] if len(kept) > 2 else []
            while len(self._windows) > MOST_WINDOWS:
                old += _all(self._windows.popitem(last=False)[1])
        _remove(old)
        return str(path)

    def drop(self, window: str) -> None:
        """Remove what a window that was closed saw."""
        with self._lock:
            old = _all(self._windows.pop(window, {}))
        _remove(old)


def _all(places: dict[str, list[Path]]) -> list[Path]:
    return [path for kept in places.values() for path in kept]


def _remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path.parent, ignore_errors=True)
