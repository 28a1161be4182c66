"""One `dit-sample` from its options to its output: resolve, check, make the missing chunks, put them together."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.classes import describe_class
from pipeline.diffusion.process import noise_share
from pipeline.runtime.console import progress, say, warn
from pipeline.runtime.devices import memory_explained
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import check_room, remove_folder
from pipeline.runtime.processes import StopRequest, launch
from pipeline.runtime.publish import Stage, finish, publish, work_folder_of
from sample import outputs, sidecar
from sample.decode import NotFiniteError, overlapping
from sample.options import SampleOptions
from sample.outputs import Parts
from sample.progress import SamplingProgress, Stopped, finished_images
from sample.remote import remote_samples
from sample.resolve import SamplingJob, resolve
from sample.sidecar import is_finished, strip_of, sweep
from sample.trajectory import Watch, strip_latents
from sample.work_folder import POLL_SECONDS, WorkFolder, begin, join

STRIP = "trajectory.safetensors"
STRIP_IMAGES = 4


def make_samples(options: SampleOptions) -> int:
    """Make what the options ask for; 0 when it is there, 128 + signal when a signal ended it between two steps.

    Raises:
        UserError: the input is wrong; nothing is left half-written.
    """
    with memory_explained(too_large):
        job = resolve(options)
    far = remote_samples(options, job)
    if far is None:
        return _make_here(options, job, is_there=lambda: False)
    if far.is_finished():
        if launch().is_main:
            far.output.forget()
        say(f"{options.out} is finished, made with these very settings; nothing to do")
        return 0
    if launch().is_main:
        far.output.begin(far.request)
    try:
        status = _make_here(far.made_by, job, is_there=far.is_finished)
    except UserError:
        if launch().is_main:
            far.output.withdraw()
        raise
    if status == 0 and launch().is_main:
        far.put()
    return status


def _make_here(options: SampleOptions, job: SamplingJob, *, is_there: Callable[[], bool]) -> int:
    """Make the output at a path; the exit status.

    Args:
        is_there: whether the main process has made it and taken it away, to a URL.
    """
    work = _open_work(options, job, is_there)
    if work is None:
        say(f"{options.out} is finished, made with these very settings; nothing to do")
        return 0
    with StopRequest() as stop:
        try:
            _make_chunks(work, job, options, stop)
            strip = None if options.trajectory is None else STRIP
            while launch().is_main and work.is_open() and (bad := work.drop_damaged(together=strip)):
                warn(f"{bad} finished parts in {work.path} were damaged, and are made again")
                _make_chunks(work, job, options, stop)
            if launch().is_main:
                _finish(work, job, options)
        except Stopped:
            done = finished_images(work, job)
            say(f"stopped: {done} of {len(job.labels)} samples are kept; give the same command to go on")
            return stop.exit_status
        except UserError:
            if launch().world_size == 1 and len(work.missing()) == work.chunks:
                work.remove(unless_shared=True)
            raise
        finally:
            work.close()
    return 0


def _open_work(options: SampleOptions, job: SamplingJob, is_there: Callable[[], bool]) -> WorkFolder | None:
    """The work folder, with the plan in it; None if the output is finished, by an earlier run or by others just now."""
    recipe, folder, main = job.recipe, work_folder_of(options.path), launch().is_main
    if main:
        finish(options.path)  # what a killed command had begun to publish
    if is_finished(options, recipe):
        if main:
            sweep(options.path, recipe, of_others=options.overwrite)
        return None
    if main:
        _check_room(folder, job)
        return begin(folder, recipe, chunks=job.chunks, overwrite=options.overwrite)
    return join(folder, recipe, chunks=job.chunks, finished=lambda: is_finished(options, recipe) or is_there())


def _check_room(folder: Path, job: SamplingJob) -> None:
    """Raise UserError unless the disk has room for the parts that are missing and for the output of all."""
    vae, (channels, height, width) = job.generator.vae, job.generator.shape
    values = 4 * channels if vae is None else 3 * vae.downsample**2  # per latent pixel: float32, or bytes of colour
    needed = 2 * len(job.labels) * values * height * width
    check_room(folder.parent, needed - sum(path.stat().st_size for path in folder.glob("chunk-*")), "the samples")


def _make_chunks(work: WorkFolder, job: SamplingJob, options: SampleOptions, stop: StopRequest) -> None:
    """Every chunk that is missing and in no other process's hands; the main process sees to the last."""
    place = launch()
    done = finished_images(work, job)
    _say_plan(job, done)
    with (
        progress(len(job.labels), unit="images", description="sampling", initial=done) as bar,
        memory_explained(lambda: too_large(job.batch_size)),
        job.generator.arithmetic(),
    ):
        pace = SamplingProgress(work, job, bar, stop)
        share = partial(work.unclaimed, rank=place.rank, world_size=place.world_size, idle=pace.check_stop)
        with overlapping(enabled=job.generator.device.type == "cuda") as overlap:
            for chunk in share(wait=False):
                overlap.run(partial(_write_chunk, work, chunk, _latents(chunk, work, job, options, pace), job))
                pace.chunk_done()
        for chunk in share(wait=place.is_main):
            _write_chunk(work, chunk, _latents(chunk, work, job, options, pace), job)
            pace.chunk_done()
        pace.chunk_done()


def _latents(
    chunk: int, work: WorkFolder, job: SamplingJob, options: SampleOptions, pace: SamplingProgress
) -> torch.Tensor:
    """A chunk's raw latents; the first chunk's moments go into the work folder where a strip is asked for."""
    first = chunk * job.batch_size
    labels = job.labels.of_batch(first, job.batch_size)
    watch = None
    if options.trajectory is not None and chunk == 0:
        distinct = np.unique(labels[: len(job.labels)], return_index=True)[1]
        watch = Watch(options.trajectory, sorted(int(row) for row in distinct)[:STRIP_IMAGES])
    with named_images(chunk, job):
        latents = job.generator.latents(first, labels, on_step=pace.step, watch=watch)
    if watch is not None:
        work.write_part(STRIP, _strip_arrays(watch, job))
    return latents


def _strip_arrays(watch: Watch, job: SamplingJob) -> dict[str, NDArray[Any]]:
    """Per image two rows of `frames`, where the process stood and where it was expected to end; `t` per moment."""
    generator = job.generator
    latents = strip_latents(watch)
    pixels = generator.pixels(generator.raw(latents.flatten(0, 1).to(generator.device)))
    return {
        "frames": pixels.reshape(*latents.shape[:2], *pixels.shape[1:]),
        "rows": np.asarray(watch.rows, dtype=np.int64),
        "t": np.asarray([_shown_time(moment.t, job) for moment in watch.of_row(watch.rows[0])], dtype=np.float32),
    }


def _shown_time(fed: float, job: SamplingJob) -> float:
    """A moment's time from noise (1000) to data (0), of networks that are told a number between 0 and 1, too."""
    process = job.generator.checkpoint.process
    return fed if process.time_scale != 1 else 1000 * float(noise_share(process, torch.tensor(fed)))


def _write_chunk(work: WorkFolder, chunk: int, latents: torch.Tensor, job: SamplingJob) -> None:
    count = min(job.batch_size, len(job.labels) - chunk * job.batch_size)
    if job.generator.vae is None:
        data: NDArray[Any] = latents.cpu().numpy()
    else:
        with named_images(chunk, job):
            data = job.generator.pixels(latents)
    work.write(chunk, {"data": data[:count]})


@contextmanager
def named_images(chunk: int, job: SamplingJob) -> Iterator[None]:
    """Turn rows that are not finite into a `UserError` with the seed, the images' numbers and their classes."""
    try:
        yield
    except NotFiniteError as error:
        known = job.known
        images = [chunk * job.batch_size + row for row in error.rows]
        labels = job.labels.of_batch(chunk * job.batch_size, job.batch_size)
        classes = [describe_class(int(labels[row]), known.names, known.ids) for row in error.rows]
        named = [f"image {image} of class {name}" for image, name in zip(images, classes, strict=True)][:4]
        more = f" and {len(images) - 4} more" if len(images) > 4 else ""
        raise UserError(
            f"{error.what} are not finite with seed {job.generator.plan.seed}: {', '.join(named)}{more}; "
            f"try --mixed-precision no, --decode-dtype float32, a lower --guidance or other --weights"
        ) from error


def _finish(work: WorkFolder, job: SamplingJob, options: SampleOptions) -> None:
    """Put the output together, unless another main process has; then the sidecar, then the work folder goes."""
    while work.is_open() and not work.claim(work.chunks):
        time.sleep(POLL_SECONDS)
    if not work.is_open():
        return
    out, labels, stage = options.path, job.labels.values, Stage(work.path)
    remove_folder(stage.ready)
    strip = None
    if options.trajectory is not None:
        arrays = work.read_part(STRIP)
        assert arrays is not None, "looked at by drop_damaged"
        strip = _write_strip(stage.place(strip_of(out)), arrays, job)
    output = write_output(stage.place(out), work.parts, job, kind=options.kind)
    sidecar.write(stage.place(sidecar.sidecar_of(out)), job.recipe, output, strip)
    publish(work.path, stage, overwrite=options.overwrite)
    work.remove()
    say(f"wrote {options.out} ({len(labels)} samples) and {sidecar.sidecar_of(out)}")


def write_output(out: Path, parts: Callable[[], Parts], job: SamplingJob, *, kind: str) -> dict[str, Any]:
    """Make the output at its place in the stage; what the sidecar says of it.

    Args:
        parts: gives the finished chunks, in order, from the first one every time.
        kind: `SampleOptions.kind`.
    """
    labels = job.labels.values
    if kind == "folder":
        return outputs.fill_folder(out, parts(), labels, folder_name=job.folder_name)
    if kind == "latents":
        return outputs.write_latents(out, parts(), labels, shape=job.generator.shape)
    if kind == "npz":
        return outputs.write_npz(out, parts(), labels, pixels=next(iter(parts())).shape[1:3])
    return outputs.write_grid(out, parts(), labels, class_name=job.class_name, columns=job.columns)


def _write_strip(path: Path, arrays: dict[str, NDArray[Any]], job: SamplingJob) -> dict[str, Any]:
    names = [job.class_name(int(job.labels.values[row])) for row in arrays["rows"]]
    return outputs.write_strip(
        path,
        arrays["frames"],
        row_labels=[label for name in names for label in (f"{name} x_t".strip(), "expected x_0")],
        captions=[*(f"t = {t:.0f}" for t in arrays["t"][:-1]), "result"],
    )


def _say_plan(job: SamplingJob, done: int) -> None:
    recipe = job.recipe
    held = f", {done} of them there already" if done else ""
    guide = recipe.get("guide")
    by = f" by the {guide['weights']} weights of step {guide['step']}" if guide else ""
    if "guidance_source" in recipe:
        by = " by the middle head" if recipe["guidance_source"] == "middle" else " by the class and the middle head"
    say(
        f"{len(job.labels)} samples{held}: {recipe['sampler']}, {recipe['steps']} steps, "
        f"guidance {recipe['guidance']:g}{by}, seed {recipe['seed']}, batches of {job.batch_size} on "
        f"{recipe['device']} (mixed precision: {recipe['mixed_precision']}), {recipe['checkpoint']['weights']} "
        f"weights of step {recipe['checkpoint']['step']}"
    )


def too_large(batch_size: int | None = None) -> str:
    """What to say when memory ends; the batch size is None while the network is only being loaded."""
    if batch_size is None:
        return "the network and the VAE do not fit into memory; use another --device"
    lower = f"lower it to {batch_size // 2}, say, or use" if batch_size > 1 else "use"
    return f"out of memory with --batch-size {batch_size}; {lower} --mixed-precision bf16 or --decode-dtype bfloat16"
