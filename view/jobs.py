"""One job at a time: a queue, and the job that runs.

Everything that computes goes through here, so that two browser windows never share a device. A job belongs to a tab of
a window and ends with it; so does one that nobody has looked at for minutes, should the window's end not be told.
"""

import itertools
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError

MOST_WAITING = 16
ABANDONED_SECONDS = 300.0


class Stopped(Exception):  # noqa: N818 - nothing is wrong: someone has seen enough
    """The page asked for an end, or nobody looks any more."""


@dataclass(kw_only=True, slots=True)
class Picture:
    """One picture of a job, as far as it is."""

    title: str
    png: bytes = b""
    version: int = 0
    """How often it has changed; 0 while there is nothing to see."""
    command: str = ""
    """What makes the same in a terminal."""
    files: dict[str, bytes] = field(default_factory=dict)
    """{name: contents} to download, once it is finished."""


Work = Callable[["Job"], None]


class Job:
    """A piece of work, what it has made, and whether it should go on."""

    def __init__(self, work: Work, titles: list[str]) -> None:
        """Wait for a turn; `titles` are those of the pictures that it will make."""
        self.state = "waiting"
        """Then running, then done, stopped or failed."""
        self.sentence = ""
        """What went wrong, or what it is doing."""
        self.share = 0.0
        """Of the work that is done."""
        self.pictures = [Picture(title=title) for title in titles]
        self.facts: dict[str, Any] = {}
        self.replaced = False
        """Whether its tab has asked for something else, so that nobody waits for its end."""
        self._work: Work | None = work
        self._stop = threading.Event()
        self._asked_at = time.monotonic()

    def seen(self) -> None:
        """Somebody looks."""
        self._asked_at = time.monotonic()

    def stop(self) -> None:
        """Ask for an end at the next step."""
        self._stop.set()

    def check(self) -> None:
        """To be called at every step.

        Raises:
            Stopped: it should not go on.
        """
        if self._stop.is_set() or time.monotonic() - self._asked_at > ABANDONED_SECONDS:
            raise Stopped

    def progress(self, share: float, sentence: str) -> None:
        """How far it is.

        Raises:
            Stopped: it should not go on.
        """
        self.check()
        self.share, self.sentence = share, sentence

    def show(self, number: int, png: bytes) -> None:
        """Another state of one of its pictures."""
        self.pictures[number].png = png
        self.pictures[number].version += 1

    def run(self) -> None:
        """Do it, in the thread that does all jobs."""
        work, self._work = self._work, None  # what it holds of memory goes when it is done
        assert work is not None
        try:
            self.check()
            self.state = "running"
            work(self)
        except Stopped:
            self.state, self.sentence = "stopped", "stopped"
        except UserError as error:
            self.state, self.sentence = "failed", str(error)
            say(f"refused: {error}")
        except Exception as error:  # noqa: BLE001 - the page must not wait for ever, and the next job has its turn
            warn(traceback.format_exc().rstrip())
            self.state = "failed"
            self.sentence = (
                f"the program failed ({type(error).__name__}); the terminal that dit-view runs in says where"
            )
        else:
            self.state, self.share, self.sentence = "done", 1.0, ""

    @property
    def is_over(self) -> bool:
        """Whether it has ended, however it did, or was stopped before it began."""
        return self.state not in {"waiting", "running"} or (self.state == "waiting" and self._stop.is_set())


class JobQueue:
    """The jobs of all windows; each tab of a window has one at a time."""

    def __init__(self) -> None:
        self._jobs: dict[Job, tuple[str, str]] = {}
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "job")

    def submit(self, work: Work, titles: list[str], *, window: str = "", tab: str = "") -> Job:
        """A job that has its turn after those before it; what this tab asked for before is stopped.

        Raises:
            UserError: too many wait already.
        """
        self.stop(window, tab)
        with self._lock:
            for job, owner in self._jobs.items():
                job.replaced |= owner == (window, tab)
            self._jobs = {job: owner for job, owner in self._jobs.items() if not job.is_over}
            if sum(job.state == "waiting" and not job.is_over for job in self._jobs) >= MOST_WAITING:
                raise UserError(f"{MOST_WAITING} jobs wait already; stop some, or wait for them")
            job = Job(work, titles)
            self._jobs[job] = (window, tab)
        self._thread.submit(job.run)
        return job

    def stop(self, window: str, tab: str | None = None) -> None:
        """Stop the job of a tab; without one, all of a window that was closed."""
        with self._lock:
            for job, owner in self._jobs.items():
                if owner[0] == window and tab in {None, owner[1]}:
                    job.stop()

    def before(self, job: Job) -> int:
        """How many jobs have their turn before this one."""
        with self._lock:
            unfinished = [one for one in self._jobs if not one.is_over]
            return sum(1 for _ in itertools.takewhile(lambda one: one is not job, unfinished))

    def close(self) -> None:
        """Stop every job and return when none runs any more."""
        with self._lock:
            for job in self._jobs:
                job.stop()
        self._thread.shutdown(cancel_futures=True)
