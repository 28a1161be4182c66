"""The progress bar of an extraction, the estimate of time and disk before it, and what both ask of a store's place."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from extract.plan import Plan
from pipeline.runtime.console import progress, refuse_unless, say
from pipeline.runtime.units import duration, size

_LOOK_AROUND_S = 5.0


class Claim(Protocol):
    """The right to make a shard."""

    def release(self) -> None:
        """Let go of it."""


class Output(Protocol):
    """What filling a store asks of the place that its shards go to."""

    @property
    def path(self) -> Path:
        """A folder on the disk that shards are written to."""

    @property
    def split(self) -> str:
        """What the names of shards begin with."""

    @property
    def place(self) -> Path:
        """Where a shard and its record are written."""

    @property
    def shards_on_disk(self) -> int | None:
        """How many shards lie on this disk at a time; None for all."""

    def done(self, shards: range) -> list[int]:
        """Those of the shards that have their commit record."""

    def claim(self, shard: int) -> Claim | None:
        """The right to make a shard, or None if it is none of this process's business."""

    def publish(self, shard: int, shard_format: str) -> None:
        """Bring a shard that was written, with its record, to where the store is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """What there is to do."""

    plan: Plan
    span: range
    sample_bytes: int
    """Bytes of a stored sample."""
    what: str = "the store"
    features_bytes: int = 0
    """Of a sample's features, which are made when this is done."""


class ExtractProgress:
    """Counts images, bytes and skips; shows the whole job's progress, other processes' shards included."""

    def __init__(self, output: Output, amount: Amount, *, batches_ahead: int, anyway: bool = False) -> None:
        """Begin to count, and say how much disk the store will take.

        Args:
            output: where the store is made.
            amount: what there is to do.
            batches_ahead: batches under way at a time; two rounds of them are waited for before time is estimated.
            anyway: go on where the disk is too small.

        Raises:
            UserError: the disk is too small.
        """
        self._output, self._amount, self._round = output, amount, batches_ahead
        self._own = self._skipped = self._read = self._batches = 0
        self._started = self._looked = time.monotonic()
        self._warm = (0, self._started)
        self._before = self._inputs_in(output.done(amount.span))
        missing = amount.plan.samples - self._inputs_in(output.done(range(amount.plan.shards)))
        if output.shards_on_disk is not None:
            missing = min(missing, output.shards_on_disk * amount.plan.samples_per_shard)
        say(disk_estimate(amount, output.path, missing=missing, anyway=anyway))
        total = self._inputs_in(amount.span)
        self._bar = progress(total, unit="images", description="encoding", initial=self._before)

    def __enter__(self) -> "ExtractProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    @property
    def images(self) -> int:
        """Images encoded here."""
        return self._own

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    @property
    def skipped(self) -> int:
        """Inputs left out here."""
        return self._skipped

    def read(self, count: int) -> None:
        """Count bytes of an input."""
        self._read += count

    def done(self, images: int, *, skipped: int) -> None:
        """Count what became of inputs, and show it."""
        self._own += images
        self._skipped += skipped
        self._bar.update(images + skipped)
        now = time.monotonic()
        if images:
            self._batches += 1
            self._estimate(now)
        if now - self._looked > _LOOK_AROUND_S:
            self._look_around(now)

    def _look_around(self, now: float) -> None:
        """Add the shards that other processes finished meanwhile to the bar."""
        self._looked = now
        rate = self._read / self.seconds / 1e6
        self._bar.set_postfix_str(f"{rate:.1f} MB/s, {self._skipped} skipped", refresh=False)
        self._bar.n = max(self._bar.n, self._inputs_in(self._output.done(self._amount.span)))

    def _estimate(self, now: float) -> None:
        """Say how long it will take, once: from two rounds of batches after the first, which pays for warming up."""
        if self._batches == self._round:
            self._warm = self._own, now
        elif self._batches == 3 * self._round:
            images, since = self._warm
            rate = (self._own - images) / max(now - since, 1e-9)
            left = self._inputs_in(self._amount.span) - self._before - self._own
            say(f"about {duration(left / max(rate, 1e-9))} to go at {rate:.1f} images/s, with this process alone")

    def _inputs_in(self, shards: range | list[int]) -> int:
        size = self._amount.plan.samples_per_shard
        return sum(min(size, self._amount.plan.samples - shard * size) for shard in shards)


def disk_estimate(amount: Amount, path: Path, *, missing: int, anyway: bool = False) -> str:
    """How much disk the whole store takes.

    Args:
        amount: what there is to do.
        path: where.
        missing: samples that are not there yet.
        anyway: a warning is enough where the disk is too small for these.

    Raises:
        UserError: it is, and a warning is not enough.
    """
    needed, features = (amount.plan.samples * each for each in (amount.sample_bytes, amount.features_bytes))
    free, more = shutil.disk_usage(path).free, missing * amount.sample_bytes + features
    if more > free:
        what = f"{amount.what} with its features" if features else amount.what
        refuse_unless(
            anyway,
            f"{what} needs {size(more)} more, but only {size(free)} are free at {path}",
            "; free some, name another --out, or go on until it is full by --anyway",
        )
    then = f"; its features {size(features)} then, {size(amount.features_bytes)} an image" if features else ""
    return (
        f"{amount.what} will take {size(needed)} of disk ({size(free)} free): {amount.plan.samples:,} images of "
        f"{size(amount.sample_bytes)}, in shards of {amount.plan.samples_per_shard:,}{then}"
    )
