"""The progress of one sampling: a bar, an estimate as soon as there is one, and an end where a signal asks for it."""

import sys
import time
from typing import Any

from tqdm import tqdm

from pipeline.runtime.console import say
from pipeline.runtime.processes import StopRequest, launch
from pipeline.runtime.units import duration
from sample.resolve import SamplingJob
from sample.work_folder import WorkFolder

TIMED_SECONDS = 2.0  # after the first step, which warms up


class Stopped(Exception):  # noqa: N818 - nothing is wrong: finished chunks are kept
    """A signal asked for an end between two steps."""


class SamplingProgress:
    """Counts what all processes have finished, and this one's steps on the way there."""

    def __init__(self, work: WorkFolder, job: SamplingJob, bar: "tqdm[Any]", stop: StopRequest) -> None:
        """Follow the work folder with a bar whose total is the number of images."""
        self._work = work
        self._job = job
        self._bar = bar
        self._stop = stop
        self._timed: tuple[int, float] | None = None
        self._estimated = False
        self._shown = time.perf_counter()

    def step(self, done: int, total: int) -> None:
        """A step of a batch is done.

        Raises:
            Stopped: a signal has come.
        """
        self.check_stop()
        now = time.perf_counter()
        self._bar.set_postfix_str(f"batch {done * 100 // total} %", refresh=False)
        if now - self._shown > 1.0 and sys.stderr.isatty():  # in a log, a line per finished batch is enough
            self._bar.refresh()
            self._shown = now
        if self._estimated:
            return
        if self._timed is None:
            self._timed = (done, now)
        elif now - self._timed[1] > TIMED_SECONDS or done == total:
            self._estimated = True
            self._say_estimate((now - self._timed[1]) / max(done - self._timed[0], 1) * total)

    def check_stop(self) -> None:
        """Nothing, unless a signal has come.

        Raises:
            Stopped: it has.
        """
        if self._stop.signal is not None:
            raise Stopped

    def chunk_done(self) -> None:
        """Show what all processes have finished."""
        self._bar.update(finished_images(self._work, self._job) - self._bar.n)

    def _say_estimate(self, seconds_per_batch: float) -> None:
        processes = launch().world_size
        rounds = -(-len(self._work.missing()) // processes)
        rate = self._job.batch_size * processes / max(seconds_per_batch, 1e-9)
        say(f"estimate: {duration(seconds_per_batch * rounds)} to go, {rate:.3g} images/s before decoding")


def finished_images(work: WorkFolder, job: SamplingJob) -> int:
    """Images in finished chunks, whoever made them."""
    missing = work.missing()
    images = (job.chunks - len(missing)) * job.batch_size
    padding = job.chunks * job.batch_size - len(job.labels)
    return images - padding * (job.chunks - 1 not in missing)
