"""Samples for the page: the job that dit-sample would do, with a look at every picture on its way.

What is made is what `dit-sample` makes of the same settings, byte for byte, with the same sidecar: the options, the
job they resolve to, the draws, the grid and the sidecar are its own. The pictures on the way are decoded beside it.
"""

import shlex
import tempfile
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.runtime.cli import flag_values
from pipeline.runtime.devices import memory_explained
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import Whole
from sample import sidecar
from sample.decode import decode_in_lanes
from sample.options import ComputeOptions, ImageOptions, ReverseOptions, SampleOptions
from sample.outputs import draw_grid
from sample.resolve import SamplingJob, resolve
from sample.run import named_images, too_large, write_output
from view.given import Given, NetworkChoice
from view.jobs import Job, Work
from view.options import ViewOptions

OUT = "samples.png"
MOST_PICTURES = 256
NOTHING_YET = 236
"""Grey of a cell that no step has been made of."""
PAUSE_SECONDS, PAUSE_TIMES = 0.4, 4.0
"""Between two looks at the pictures on the way: at least this, and so many times what the last one took."""


class SampleRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the page asks for; its words and ranges are those of dit-sample's flags."""

    networks: Annotated[tuple[NetworkChoice, ...], msgspec.Meta(min_length=1, max_length=6)]
    """One to sample from; several are compared, from the same noise."""
    classes: Annotated[str, msgspec.Meta(max_length=4000)] = ""
    samples_per_class: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    seed: Whole = 0
    sampler: Annotated[str, msgspec.Meta(max_length=32)] | None = None
    steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 250
    guidance: Annotated[float, msgspec.Meta(ge=0, le=1000)] | None = None
    source: Literal["class", "middle", "both", "network"] = "class"
    guide: NetworkChoice | None = None
    """With the source network: the one to guide away from."""


def options_for(
    request: SampleRequest, choice: NetworkChoice, given: Given, options: ViewOptions, out: str = OUT
) -> SampleOptions:
    """The options of the dit-sample that makes the same.

    Raises:
        UserError: a choice is not there, or the settings contradict each other.
    """
    guide = None
    if request.source == "network":
        if request.guide is None:
            raise UserError("choose the checkpoint to guide away from, or guide by the class")
        place = given.network(request.guide.network).place(request.guide.step)
        guide = f"{place}@{request.guide.weights}"
    return SampleOptions(
        checkpoint=given.network(choice.network).place(choice.step),
        out=out,
        weights=choice.weights,
        vae=options.vae,
        images=ImageOptions(classes=request.classes.strip() or None, samples_per_class=request.samples_per_class),
        reverse=ReverseOptions(
            sampler=request.sampler or None,
            steps=request.steps,
            guidance=request.guidance,
            guidance_source="class" if request.source == "network" else request.source,
            guide=guide,
            seed=request.seed,
        ),
        compute=ComputeOptions(device=options.device),
    )


def command_of(options: SampleOptions) -> str:
    """The dit-sample command that these options are, without what is its default."""
    plain = flag_values(SampleOptions(checkpoint=options.checkpoint, out=options.out))
    changed = {name: value for name, value in flag_values(options).items() if value != plain[name]}
    words = ["dit-sample"]
    for name, value in {"checkpoint": options.checkpoint, "out": OUT, **changed}.items():
        words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return shlex.join(words)


def sampling(request: SampleRequest, given: Given, options: ViewOptions) -> tuple[Work, list[str]]:
    """The work, and the titles of its pictures.

    Raises:
        UserError: a choice is not there, or the settings contradict each other.
    """
    asked = [options_for(request, choice, given, options) for choice in request.networks]

    def work(job: Job) -> None:
        for number, one in enumerate(asked):
            job.pictures[number].command = command_of(one)
        for number, one in enumerate(asked):
            _sample(one, job, number, of=len(asked))

    return work, [given.title(choice) for choice in request.networks]


def _sample(options: SampleOptions, page: Job, number: int, *, of: int) -> None:
    """One picture of a job, with its sidecar."""
    page.progress(number / of, f"reading {page.pictures[number].title}")
    with memory_explained(too_large):
        job = resolve(options)
    if len(job.labels) * of > MOST_PICTURES:
        raise UserError(
            f"{len(job.labels) * of} pictures are more than the {MOST_PICTURES} that this page makes at once; ask for "
            f"fewer classes or fewer of each, or give the command below to a terminal"
        )
    seen = _Seen(job, show=lambda picture: page.show(number, as_png(picture, level=1)))
    seen.draw()

    def on_step(chunk: int) -> Callable[[int, int], None]:
        def told(done: int, total: int) -> None:
            share = (chunk + done / total) / job.chunks
            page.progress((number + share) / of, f"{share:.0%} of {job.generator.plan.steps} steps")

        return told

    parts: list[NDArray[Any]] = []
    with memory_explained(lambda: too_large(job.batch_size)), job.generator.arithmetic():
        for chunk in range(job.chunks):
            first = chunk * job.batch_size
            labels = job.labels.of_batch(first, job.batch_size)
            with named_images(chunk, job):
                latents = job.generator.latents(first, labels, on_step=on_step(chunk), watch=seen.batch(first))
                page.progress((number + (chunk + 1) / job.chunks) / of, "decoding")
                parts.append(job.generator.pixels(latents)[: len(job.labels) - first])
    files = finished_files(job, parts, kind=options.kind)
    page.show(number, files[OUT])
    page.pictures[number].files = files


def finished_files(job: SamplingJob, parts: list[NDArray[Any]], *, kind: str) -> dict[str, bytes]:
    """{name: bytes} of the picture and its sidecar, as dit-sample writes them."""
    with tempfile.TemporaryDirectory(prefix="dit-view-") as folder:
        out = Path(folder, OUT)
        described = write_output(out, lambda: iter(parts), job, kind=kind)
        beside = sidecar.sidecar_of(out)
        sidecar.write(beside, job.recipe, described)
        return {path.name: path.read_bytes() for path in (out, beside)}


def as_png(picture: Image.Image, *, level: int = 6) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG", compress_level=level)
    return buffer.getvalue()


class _Seen:
    """What is seen of a job on its way: per cell the x_0 that the network expects, decoded now and then."""

    def __init__(self, job: SamplingJob, *, show: Callable[[Image.Image], None]) -> None:
        self._job = job
        self._show = show
        generator, vae = job.generator, job.generator.vae
        assert vae is not None, "a grid is asked for"
        self._vae = vae
        _, height, width = generator.shape
        size = (len(job.labels), height * vae.downsample, width * vae.downsample, 3)
        self._cells = np.full(size, NOTHING_YET, dtype=np.uint8)
        self._one_at_a_time = threading.Lock()
        self._next = 0.0

    def batch(self, first: int) -> "_SeenBatch":
        """What watches the batch that begins with image `first`."""
        return _SeenBatch(self, first, min(first + self._job.batch_size, len(self._cells)))

    def draw(self) -> None:
        """Show the cells as they are."""
        job = self._job
        self._show(draw_grid([self._cells], job.labels.values, class_name=job.class_name, columns=job.columns))

    def look(self, images: slice, x_start: Tensor, *, last: bool) -> None:
        """Decode the first rows, which are these images, from the network's scale, if it is time for it.

        Args:
            last: they are the result; it is always time for that.
        """
        if not self._one_at_a_time.acquire(blocking=last):
            return
        try:
            began = time.monotonic()
            if last or began >= self._next:
                generator, rows = self._job.generator, x_start[: images.stop - images.start]
                with torch.no_grad(), torch.autocast(generator.device.type, enabled=False):
                    latents, size = generator.raw(rows), generator.decode_lane
                    _, pixels = decode_in_lanes(self._vae, latents, size=size, in_lanes=map)
                self._cells[images] = pixels.numpy()
                self.draw()
                now = time.monotonic()
                self._next = now + max(PAUSE_SECONDS, PAUSE_TIMES * (now - began))
        finally:
            self._one_at_a_time.release()


class _SeenBatch:
    """A batch of what is seen: the images first … end − 1."""

    def __init__(self, seen: _Seen, first: int, end: int) -> None:
        self._seen, self._first, self._end = seen, first, end

    def lane(self, start: int, count: int) -> "_SeenLane | None":
        """What watches rows of the batch; those past its end are padding."""
        images = slice(self._first + start, min(self._first + start + count, self._end))
        return _SeenLane(self._seen, images) if images.start < images.stop else None


class _SeenLane:
    """Images of a batch that run together."""

    def __init__(self, seen: _Seen, images: slice) -> None:
        self._seen, self._images = seen, images

    def watched(self, denoise: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The same function."""
        return denoise

    def on_step(self, k: int, total: int, x_start: Tensor) -> None:  # noqa: ARG002 - as LaneWatcher has it
        """Look at where the rows are expected to end."""
        self._seen.look(self._images, x_start, last=False)

    def end(self, x: Tensor) -> None:
        """Look at where they ended."""
        self._seen.look(self._images, x, last=True)
