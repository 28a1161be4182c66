"""One job at a time: a queue, the job that runs, and the last ones that are done.

Everything that computes goes through here, so that two browser windows never share a device. A job is asked about by
the page that started it; one that nobody has asked about for minutes belongs to a window that was closed, and ends.
"""

import itertools
import secrets
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError

MOST_WAITING, KEPT = 16, 8
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
        self.id = secrets.token_hex(8)
        self.state = "waiting"
        """Then running, then done, stopped or failed."""
        self.sentence = ""
        """What went wrong, or what it is doing."""
        self.share = 0.0
        """Of the work that is done."""
        self.pictures = [Picture(title=title) for title in titles]
        self.facts: dict[str, Any] = {}
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

    def to_json(self, before: int) -> dict[str, Any]:
        """What the page asks for again and again."""
        return {
            "id": self.id,
            "state": self.state,
            "sentence": self.sentence,
            "before": before,
            "share": self.share,
            "pictures": [
                {"title": one.title, "version": one.version, "command": one.command, "files": sorted(one.files)}
                for one in self.pictures
            ],
            "facts": self.facts,
        }


class JobQueue:
    """All jobs of a page."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "job")

    def submit(self, work: Work, titles: list[str]) -> Job:
        """A job that has its turn after those before it.

        Raises:
            UserError: too many wait already.
        """
        with self._lock:
            if len(self._unfinished()) >= MOST_WAITING:
                raise UserError(f"{MOST_WAITING} jobs wait already; stop some, or wait for them")
            job = Job(work, titles)
            self._jobs[job.id] = job
            finished = [one for one in self._jobs.values() if one.state not in {"waiting", "running"}]
            for old in finished[: max(0, len(finished) - KEPT)]:
                del self._jobs[old.id]
        self._thread.submit(job.run)
        return job

    def get(self, name: str) -> Job:
        """A job by its id.

        Raises:
            UserError: it is not kept any more.
        """
        with self._lock:
            if name not in self._jobs:
                raise UserError("this job is not kept any more; start it again")
            return self._jobs[name]

    def before(self, job: Job) -> int:
        """How many jobs have their turn before this one."""
        with self._lock:
            return sum(1 for _ in itertools.takewhile(lambda one: one is not job, self._unfinished()))

    def close(self) -> None:
        """Stop every job and return when none runs any more."""
        with self._lock:
            for job in self._unfinished():
                job.stop()
        self._thread.shutdown(cancel_futures=True)

    def _unfinished(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.state in {"waiting", "running"}]
