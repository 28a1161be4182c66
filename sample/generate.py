"""Image k from (seed, k): noise, the reverse process and the decoder, one padded batch at a time.

Every draw is keyed by the seed and the image's own number, and batches are cut into lanes of a size that follows from
the batch size alone. A GPU takes a batch as one lane. A CPU takes several at once, one per core, and computes each on
one thread: so no sum is ever split by the number of cores, and it is faster too (benchmarks/sample.py).
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.checkpoint import Checkpoint
from pipeline.diffusion import SAMPLERS, classifier_free_guidance
from pipeline.randomness import normal
from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import keep_freed_memory
from pipeline.runtime.threads import CPU_LANE, GPU_DECODE_BATCH, InLanes, decode_in_lanes, finite_rows, one_thread_each
from pipeline.vae import Vae, denormalize
from sample.trajectory import Watch

NOISE = "sample-noise"
OnStep = Callable[[int, int], None]
"""Told (steps done, steps in all), counted over the lanes of a batch."""
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReversePlan:
    """The reverse process, every default filled in."""

    sampler: str
    steps: int
    eta: float
    guidance: float
    channels: int | None
    """How many latent channels are guided, the first ones; None is all."""
    interval: tuple[float, float] | None
    """Shares of time from data (0) to noise (1) within which guidance applies; None is always."""
    seed: int
    batch_size: int
    precision: str
    """no (float32), bf16 or fp16."""


class Generator:
    """Batches of latents, and of pixels where it is given a VAE."""

    def __init__(self, checkpoint: Checkpoint, plan: ReversePlan, *, device: str, vae: Vae | None) -> None:
        """Take a checkpoint to the device; `plan` is complete and fits it."""
        self.checkpoint = checkpoint
        self.plan = plan
        self.device = torch.device(device)
        self.vae = vae
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # or pinned memory would open a second context on the first GPU
        self.model = checkpoint.model.to(self.device).eval()
        config = checkpoint.config
        self.shape = (config.in_channels, config.height, config.width)
        recorded = checkpoint.info["vae"]
        self._scale, self._shift = recorded["scaling_factor"], recorded.get("shift_factor")
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            keep_freed_memory()
        size = plan.batch_size
        self._lane = min(CPU_LANE, -(-size // 4)) if on_cpu else size  # four lanes at least, where it can be
        self._decode_lane = self._lane if on_cpu else min(size, GPU_DECODE_BATCH)
        self._workers = torch.get_num_threads() if on_cpu else 1

    def latents(
        self, first: int, labels: NDArray[np.int64], *, on_step: OnStep | None = None, watch: Watch | None = None
    ) -> Tensor:
        """Raw latents [B, C, h, w] float32 on the device: images first … first + B − 1 with the given labels.

        Raises:
            NotFiniteError: values that are not finite.
        """
        starts = range(0, len(labels), self._lane)
        steps = _StepCount(self.plan.steps * len(starts), on_step)

        def lane(start: int) -> Tensor:
            rows = np.minimum(np.arange(start, start + self._lane), len(labels) - 1)
            with steps.of_lane():
                return self._denoise_lane(first + start, labels[rows], start, steps, watch)

        with self._lanes() as in_lanes:
            x = torch.cat(list(in_lanes(lane, starts)))[: len(labels)]
        _refuse_not_finite(finite_rows(x), "latents")
        return self.raw(x)

    def raw(self, x: Tensor) -> Tensor:
        """Latents as the VAE gives them, from latents in the network's scale."""
        return denormalize(x.float(), self._scale, self._shift)

    def pixels(self, latents: Tensor) -> NDArray[np.uint8]:
        """Images uint8 [B, H, W, 3] of raw latents, decoded in lanes of one size.

        Raises:
            NotFiniteError: the decoder gave values that are not finite.
        """
        assert self.vae is not None, "a generator without a VAE gives latents"
        with self._lanes() as in_lanes:
            finite, images = decode_in_lanes(self.vae, latents, size=self._decode_lane, in_lanes=in_lanes)
        _refuse_not_finite(finite, "decoded pixels")
        return np.asarray(images.numpy(), dtype=np.uint8)

    def _denoise_lane(
        self,
        first: int,
        labels: NDArray[np.int64],
        start: int,
        steps: "_StepCount",
        watch: Watch | None,
    ) -> Tensor:
        """Latents in the network's scale of images first … first + lane − 1; `start` is its place in the batch."""
        plan, config = self.plan, self.checkpoint.config
        denoise = classifier_free_guidance(
            self.model,
            torch.from_numpy(labels).to(self.device) if config.num_classes else None,
            scale=plan.guidance,
            null_class=config.null_class if config.has_null_class else None,
            channels=plan.channels,
            interval=plan.interval,
            time_scale=self.checkpoint.process.time_scale,
        )
        look = watch.lane(start, len(labels)) if watch is not None else None

        def each_step(k: int, total: int, x_start: Tensor) -> None:
            if look is not None:
                look.on_step(k, total, x_start)
            steps.add()

        dtype = PRECISIONS[plan.precision]
        # Around the whole process, not each call: autocast then casts every weight once.
        with torch.no_grad(), torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
            x = SAMPLERS[plan.sampler](
                self.checkpoint.process,
                denoise if look is None else look.watched(denoise),
                self._noise(first, len(labels)),
                lambda k: self._noise(first, len(labels), k),
                steps=plan.steps,
                eta=plan.eta,
                on_step=each_step,
            )
        if look is not None:
            look.end(x)
        return x

    def _noise(self, first: int, count: int, *step: int) -> Tensor:
        draws = [normal(self.shape, self.plan.seed, NOISE, k, *step) for k in range(first, first + count)]
        batch = torch.stack(draws)
        # Pinned, or the copy would wait for the GPU to finish all steps before it.
        return batch.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch

    def _lanes(self) -> contextlib.AbstractContextManager[InLanes]:
        return one_thread_each(self.device, workers=self._workers)


class NotFiniteError(UserError):
    """Values of some rows of a batch are not finite."""

    def __init__(self, what: str, rows: list[int]) -> None:
        super().__init__(f"{what} of rows {rows} of a batch are not finite")
        self.what = what
        self.rows = rows


def _refuse_not_finite(finite: Tensor, what: str) -> None:
    rows = (~finite).nonzero().flatten().tolist()
    if rows:
        raise NotFiniteError(what, rows)


class _StepCount:
    """Counts the steps of all lanes; when one lane fails, the others end at their next step."""

    def __init__(self, total: int, on_step: OnStep | None) -> None:
        self._total = total
        self._on_step = on_step
        self._done = 0
        self._lock = threading.Lock()
        self._failure: Exception | None = None

    def add(self) -> None:
        """One step of some lane is done."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._done += 1
            if self._on_step is not None:
                self._on_step(self._done, self._total)

    @contextlib.contextmanager
    def of_lane(self) -> Iterator[None]:
        """Around one lane's work: its failure, or an earlier one of another, is what comes out."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - it is raised again, here and in the other lanes
            with self._lock:
                self._failure = self._failure or error
            raise self._failure from None


class Overlap:
    """Runs one piece of work beside the main thread; the next piece waits for the one before."""

    def __init__(self, *, enabled: bool) -> None:
        """With `enabled` False every piece is run at once, where threads would only compete for the same cores."""
        self._pool = ThreadPoolExecutor(1) if enabled else None
        self._running: Future[Any] | None = None

    def run(self, work: Callable[[], None]) -> None:
        self.wait()
        if self._pool is None:
            work()
        else:
            self._running = self._pool.submit(work)

    def wait(self) -> None:
        """Return when the last piece is done; its exception is raised here."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


@contextlib.contextmanager
def overlapping(*, enabled: bool) -> Iterator[Overlap]:
    """An `Overlap` whose last piece is done when the block ends."""
    overlap = Overlap(enabled=enabled)
    yield overlap
    overlap.wait()
