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
from torch import Tensor, nn

from pipeline.checkpoint import Checkpoint
from pipeline.diffusion import SAMPLERS, NetworkFn, classifier_free_guidance
from pipeline.diffusion.guidance import MiddleHead, OtherNetwork, guided
from pipeline.dit import DiT
from pipeline.dit.embeddings import state_noise
from pipeline.runtime.devices import float32_products
from pipeline.runtime.processes import keep_freed_memory
from pipeline.runtime.threads import CPU_MICRO_BATCH, ParallelMap, finite_rows, one_thread_each
from pipeline.vae import Vae, denormalize
from sample.decode import check_finite, decode_in_lanes, decode_lane
from sample.edits import NOISE, Edit
from sample.trajectory import Watcher

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
    source: str = "class"
    """What guides where no other network does: the class, the middle head, or both."""
    middle_guidance: float = 1.0
    """Scale of the middle head's guidance beside the class's."""
    timesteps: tuple[float, ...] | None = None
    """Where the steps begin; None is where the sampler has them begin."""


class Generator:
    """Batches of latents, and of pixels where it is given a VAE."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: ReversePlan,
        *,
        device: str,
        vae: Vae | None,
        guide: DiT | None = None,
        edit: Edit | None = None,
    ) -> None:
        """Take a checkpoint to the device; `plan` is complete and fits it, and so does a network that guides."""
        self.checkpoint = checkpoint
        self.plan = plan
        self.device = torch.device(device)
        self.vae = vae
        self.edit = edit or Edit()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # or pinned memory would open a second context on the first GPU
        self._dtype = PRECISIONS[plan.precision]
        self.model = checkpoint.model.to(self.device).eval()
        self.guide = None if guide is None else guide.to(self.device).eval()
        for network in (self.model, self.guide):
            if self._dtype is not None and network is not None:
                _cast_products(network, self._dtype)
        config = checkpoint.config
        self.shape = (config.in_channels, config.height, config.width)
        recorded = checkpoint.info.vae
        self._scale, self._shift = recorded.scaling_factor, recorded.shift_factor

        # a batch in lanes: as one on a GPU, in at least four, where it can be, on a CPU
        self._on_cpu = self.device.type == "cpu"
        if self._on_cpu:
            keep_freed_memory()
        size = plan.batch_size
        self._lane = min(CPU_MICRO_BATCH, -(-size // 4)) if self._on_cpu else size
        self._workers = torch.get_num_threads() if self._on_cpu else 1
        pixels = config.height * config.width * (1 if vae is None else vae.downsample**2)
        self.decode_lane = min(self._lane, decode_lane(self.device, pixels=pixels))

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """Around all use, in whatever thread: TF32 for what is float32, or none of it where no precision is spared."""
        return float32_products(self.device, tf32=self._dtype is not None)

    def latents(
        self, first: int, labels: NDArray[np.int64], *, on_step: OnStep | None = None, watch: Watcher | None = None
    ) -> Tensor:
        """Raw latents [B, C, h, w] float32 on the device: images first … first + B − 1 with the given labels.

        Raises:
            NotFiniteError: values that are not finite.
        """
        plan, process, size = self.plan, self.checkpoint.process, self._lane
        starts = range(0, len(labels), size)
        steps = _StepCount(plan.steps * len(starts), on_step)

        def lane(start: int) -> Tensor:
            """Latents in the network's scale of the rows from `start` on, past the end the last one again."""
            rows = np.minimum(np.arange(start, start + size), len(labels) - 1)
            images = np.arange(first + start, first + start + size)
            denoise = self.edit.within(process, self.edit.of_classes(self._guided, labels[rows], images), images)
            look = watch.lane(start, size) if watch is not None else None

            def each_step(k: int, total: int, x_start: Tensor) -> None:
                if look is not None:
                    look.on_step(k, total, x_start)
                steps.add()

            with steps.of_lane(), torch.no_grad(), self._autocast(), self._noise_of(first + start) as noise:
                x = SAMPLERS[plan.sampler](
                    process,
                    denoise if look is None else look.watched(denoise),
                    self.edit.start(process, noise(), images),
                    noise,
                    steps=plan.steps,
                    eta=plan.eta,
                    timesteps=plan.timesteps,
                    on_step=each_step,
                )
            if look is not None:
                look.end(x)
            return x

        with self._lanes() as in_lanes:
            x = torch.cat(list(in_lanes(lane, starts)))[: len(labels)]
        check_finite(finite_rows(x), "latents")
        return self.raw(x)

    def raw(self, x: Tensor) -> Tensor:
        """Latents as the VAE gives them, from latents in the network's scale; a class token beside them is left out."""
        return denormalize(x[:, : self.shape[0]].float(), self._scale, self._shift)

    def pixels(self, latents: Tensor) -> NDArray[np.uint8]:
        """Images uint8 [B, H, W, 3] of raw latents, decoded in lanes of one size.

        Raises:
            NotFiniteError: the decoder gave values that are not finite.
        """
        assert self.vae is not None, "a generator without a VAE gives latents"
        with self._lanes() as in_lanes:
            finite, images = decode_in_lanes(self.vae, latents, size=self.decode_lane, in_lanes=in_lanes)
        check_finite(finite, "decoded pixels")
        return np.asarray(images.numpy(), dtype=np.uint8)

    def _guided(self, labels: NDArray[np.int64]) -> NetworkFn:
        """The network for images of these classes, guided as the plan says."""
        plan, config, process = self.plan, self.checkpoint.config, self.checkpoint.process
        y = torch.from_numpy(labels).to(self.device) if config.num_classes else None
        how: dict[str, Any] = {
            "scale": plan.guidance,
            "channels": plan.channels,
            "interval": plan.interval,
            "time_scale": process.time_scale,
            "noise_first": process.noise_first,
        }
        if self.guide is not None:
            return guided(OtherNetwork(self.model, y, self.guide), **how)
        if plan.source == "middle":
            return guided(MiddleHead(self.model, y), **how)

        # By the class; with both, each of its two halves is first guided by the middle head.
        def halves(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            return guided(MiddleHead(self.model, labels), **{**how, "scale": plan.middle_guidance})(x_t, t)

        null_class = config.null_class if config.has_null_class else None
        network = self.model if plan.source == "class" else halves
        return classifier_free_guidance(network, y, null_class=null_class, **how)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._dtype is None else torch.autocast(self.device.type, self._dtype)

    @contextlib.contextmanager
    def _noise_of(self, first: int) -> Iterator[Callable[..., Tensor]]:
        """`noise()`, the starting noise of a lane on the device, and `noise(k)`, that of step k.

        Drawn on the CPU, so the same on any device; beside a GPU the next step's in a thread while this one's is used.
        """
        if self._on_cpu:
            yield lambda *step: self._noise(first, self._lane, *step)
            return
        ahead: dict[int, Future[Tensor]] = {}

        def noise(*step: int) -> Tensor:
            k = step[0] if step else -1
            drawn = ahead.pop(k).result() if k in ahead else self._noise(first, self._lane, *step)
            if step and k < self.plan.steps - 2:  # a sampler that draws, and whose last step draws nothing
                ahead[k + 1] = pool.submit(self._noise, first, self._lane, k + 1)
            # Pinned, or the copy would wait for the GPU to finish all steps before it.
            drawn = drawn.pin_memory() if self.device.type == "cuda" else drawn
            return drawn.to(self.device, non_blocking=self.device.type == "cuda")

        with ThreadPoolExecutor(1) as pool:
            yield noise

    def _noise(self, first: int, count: int, *step: int) -> Tensor:
        """Standard normals [count, C, h, w] of images first … first + count − 1, on the CPU."""
        images = map(self.edit.takes_noise_of, range(first, first + count))
        return torch.stack([state_noise(self.checkpoint.config, self.plan.seed, NOISE, k, *step) for k in images])

    def _lanes(self) -> contextlib.AbstractContextManager[ParallelMap]:
        return one_thread_each(self.device, workers=self._workers)


def _cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of matrix products in the precision that autocast computes these in.

    Autocast would cast them itself, to the very same values: once per lane, and in every call of a compiled block.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


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
