"""The loop that fills a store: claim a shard, load, encode, hand it to the writer, go on with the next one.

Loading runs ahead in threads, several batches are under way, and finished shards are written in the background; all of
it across the borders of shards, so that the encoder is the only thing that anything waits for.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from extract.encoder import Encoder
from extract.inputs import Loaded, Loader
from extract.progress import Claim, ExtractProgress, Output
from pipeline.latents.writer import unstorable_rows, write_shard
from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import StopRequest
from pipeline.runtime.threads import read_ahead

NOT_FINITE = "the VAE's latent is not finite in the precision that is asked for"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractJob:
    """All that filling a store needs."""

    output: Output
    span: range
    """The shards to make."""
    rows: "Callable[[int], NDArray[np.int64]]"
    """The inputs of a shard, as positions in the listing."""
    load: "Callable[[int], Loaded]"
    """One of them; called from many threads."""
    key: "Callable[[int], str]"
    """Its name, for people."""
    encoder: Encoder
    write: "Callable[[Draft], None]"
    """Publish a shard and its commit record."""
    store_dtype: str
    workers: int
    """Threads that load."""
    fail_on_error: bool
    refusal: str | None = None
    """What is said of a value that cannot be stored, where all must be; None leaves such inputs out."""


@dataclass(kw_only=True, slots=True)
class Draft:
    """A shard in the making."""

    shard: int
    latents: Tensor
    """[rows, views, …]; rows beyond those kept are unused."""
    kept: list[int] = field(default_factory=list)
    """Positions in the listing of the samples so far."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Positions in the listing of what is left out, with the reason."""
    checksums: dict[int, int] = field(default_factory=dict)
    """By position in the listing: the CRC-32 of the input's bytes."""


class Claims:
    """The shards that this process has claimed and not yet written."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._locks: dict[int, Claim] = {}

    def take(self, shard: int) -> bool:
        lock = self._output.claim(shard)
        if lock is not None:
            self._locks[shard] = lock
        return lock is not None

    def release(self, shard: int) -> None:
        self._locks.pop(shard).release()

    def release_all(self) -> None:
        for shard in list(self._locks):
            self.release(shard)


def fill(job: ExtractJob, stop: StopRequest, progress: ExtractProgress) -> None:
    """Make every shard of the span that no other process makes; return early if asked to stop.

    Raises:
        UserError: the disk is full, an input vanished, or a bad input was met under --on-error fail.
    """
    claims = Claims(job.output)
    tasks = _tasks(job, claims, stop)
    window = (job.encoder.batches_ahead + 2) * job.encoder.batch_size + 2 * job.workers
    try:
        with (
            ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
            read_ahead(tasks, lambda task: job.load(task[1]), workers=job.workers, window=window) as loaded,
        ):
            filling = _Filling(job, claims, progress, writer)
            for (shard, index), result in loaded:
                if stop.signal:
                    break
                filling.take(shard, index, result)
            filling.end(keep_last=not stop.signal)
    finally:
        claims.release_all()


def _tasks(job: ExtractJob, claims: Claims, stop: StopRequest) -> Iterator[tuple[int, int]]:
    """(shard, input) of one free shard after another; the next is claimed when the loader has come to its end."""
    for shard in job.span:
        if stop.signal:
            return
        if claims.take(shard):
            yield from ((shard, int(index)) for index in job.rows(shard))


class _Filling:
    """Loaded inputs on their way into shards, in order: batch, encode, collect, write."""

    def __init__(self, job: ExtractJob, claims: Claims, progress: ExtractProgress, writer: ThreadPoolExecutor) -> None:
        self._job, self._claims, self._progress, self._writer = job, claims, progress, writer
        self._draft: Draft | None = None
        self._batch: list[tuple[int, Loaded]] = []
        self._running: deque[tuple[Draft, list[int], Future[Tensor] | None]] = deque()  # None: the draft is complete
        self._writing: Future[None] | None = None

    def take(self, shard: int, index: int, loaded: Loaded) -> None:
        """The next input of a shard."""
        if self._draft is None or self._draft.shard != shard:
            self._seal()
            self._draft = Draft(shard=shard, latents=self._job.encoder.room_for(len(self._job.rows(shard))))
        self._progress.read(loaded.bytes_read)
        if loaded.crops is None:
            self._skip(self._draft, index, loaded.reason)
            self._progress.done(0, skipped=1)
            return
        self._draft.checksums[index] = loaded.checksum
        self._batch.append((index, loaded))
        if len(self._batch) == self._job.encoder.batch_size:
            self._start()

    def end(self, *, keep_last: bool) -> None:
        """Finish what is under way; the last shard only if all of it was taken."""
        if keep_last:
            self._seal()
        while any(latents is None for _, _, latents in self._running):
            self._collect()
        if self._writing is not None:
            self._writing.result()

    def _start(self) -> None:
        assert self._draft is not None
        crops = [loaded.crops for _, loaded in self._batch if loaded.crops is not None]
        self._running.append((self._draft, [index for index, _ in self._batch], self._job.encoder.start(crops)))
        self._batch = []
        while len(self._running) > self._job.encoder.batches_ahead:
            self._collect()

    def _seal(self) -> None:
        """The draft has all its inputs."""
        if self._batch:
            self._start()
        if self._draft is not None:
            self._running.append((self._draft, [], None))
        self._draft = None

    def _collect(self) -> None:
        """Take the oldest batch's latents, or hand its finished draft to the writer."""
        draft, indices, latents = self._running.popleft()
        if latents is None:
            if self._writing is not None:
                self._writing.result()  # at most one shard waits for the disk
            self._writing = self._writer.submit(_write, self._job, draft, self._claims)
            return
        values = latents.result()
        bad = set(unstorable_rows(values, self._job.store_dtype).tolist())
        if bad and self._job.refusal is not None:
            raise UserError(self._job.refusal)
        if len(bad) == len(indices) > 1:
            raise UserError(
                f"every latent of a batch is infinite or not a number (the first is of {self._key(indices[0])}); use "
                "--encode-dtype float32 and --store-dtype float32, or another --vae"
            )
        good = [row for row in range(len(indices)) if row not in bad]
        draft.latents[len(draft.kept) : len(draft.kept) + len(good)] = values[good]
        draft.kept += [indices[row] for row in good]
        for row in sorted(bad):
            warn(f"{self._key(indices[row])}: {NOT_FINITE}")
            self._skip(draft, indices[row], NOT_FINITE)
        self._progress.done(len(good), skipped=len(bad))

    def _skip(self, draft: Draft, index: int, reason: str) -> None:
        if self._job.fail_on_error:
            raise UserError(f"{self._key(index)}: {reason}; mend or remove it, or go on without it by --on-error skip")
        draft.skipped[index] = reason

    def _key(self, index: int) -> str:
        return self._job.key(index)


def _write(job: ExtractJob, draft: Draft, claims: Claims) -> None:
    """Publish a shard, then let go of it."""
    job.write(draft)
    claims.release(draft.shard)


def write_latents(output: Output, loader: Loader, draft: Draft, *, shard_format: str, kind: str, plan: str) -> None:
    """Publish a shard of latents and its commit record.

    Args:
        plan: marks every shard of this store, so that shards of different settings never come together.
    """
    kept = np.array(draft.kept, dtype=np.int64)
    loader.source.check_unchanged()
    write_shard(
        output.place,
        output.split,
        draft.shard,
        shard_format,
        draft.latents[: len(kept)],
        loader.listing.labels[kept],
        kept,
        [loader.key(index) for index in draft.kept],
        kind=kind,
        skipped=[(loader.key(index), draft.skipped[index]) for index in sorted(draft.skipped)],
        plan=plan,
        input_crc32=[draft.checksums[index] for index in draft.kept],
    )
    output.publish(draft.shard, shard_format)
