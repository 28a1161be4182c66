"""One `dit-sample` from its options to its output: settle, check, make the missing chunks, put them together."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.classes import describe_class
from pipeline.runtime.console import progress, say
from pipeline.runtime.devices import memory_explained
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import publish_folder
from pipeline.runtime.processes import StopRequest, launch
from sample import outputs, sidecar
from sample.generate import NotFiniteError, overlapping
from sample.options import SampleOptions
from sample.progress import Pace, Stopped, finished_images
from sample.resolve import Settled, settle
from sample.sidecar import clear, is_finished, strip_of, sweep
from sample.trajectory import Watch, strip_latents
from sample.work_folder import POLL_SECONDS, WorkFolder, begin, join, read_arrays, work_folder_of, write_arrays

STRIP = "trajectory.safetensors"
STRIP_IMAGES = 4


def make_samples(options: SampleOptions) -> int:
    """Make what the options ask for; 0 when it is there, 128 + signal when a signal ended it between two steps.

    Raises:
        UserError: the input is wrong; nothing is left half-written.
    """
    with memory_explained(too_large):
        settled = settle(options)
    work = _open_work(options, settled)
    if work is None:
        say(f"{options.out} is finished, made with these very settings; nothing to do")
        return 0
    with StopRequest() as stop:
        try:
            _make_chunks(work, settled, options, stop)
            if launch().is_main:
                _finish(work, settled, options)
        except Stopped:
            done = finished_images(work, settled)
            say(f"stopped: {done} of {len(settled.labels)} samples are kept; give the same command to go on")
            return stop.exit_status
        except UserError:
            if launch().world_size == 1 and len(work.missing()) == work.chunks:
                work.remove()
            raise
        finally:
            work.close()
    return 0


def _open_work(options: SampleOptions, settled: Settled) -> WorkFolder | None:
    """The work folder, with the plan in it; None if the output is finished, by an earlier run or by others just now."""
    recipe, folder, main = settled.recipe, work_folder_of(options.path), launch().is_main
    if is_finished(options, recipe, thorough=main and options.overwrite):
        if main:
            sweep(options.path, recipe)
        return None
    if main:
        begin(folder, recipe, overwrite=options.overwrite)
    elif not join(folder, recipe, finished=lambda: is_finished(options, recipe, thorough=False)):
        return None
    try:
        return WorkFolder(folder, chunks=settled.chunks)
    except FileNotFoundError:  # the others have put the output together and removed the folder
        return None


def _make_chunks(work: WorkFolder, settled: Settled, options: SampleOptions, stop: StopRequest) -> None:
    """Every chunk that is missing and in no other process's hands; the main process sees to the last."""
    place = launch()
    done = finished_images(work, settled)
    _say_plan(settled, done)
    with (
        progress(len(settled.labels), unit="images", description="sampling", initial=done) as bar,
        memory_explained(lambda: too_large(settled.batch_size)),
    ):
        pace = Pace(work, settled, bar, stop)
        share = partial(work.unclaimed, rank=place.rank, world_size=place.world_size, idle=pace.check_stop)
        with overlapping(enabled=settled.generator.device.type == "cuda") as overlap:
            for chunk in share(wait=False):
                overlap.run(partial(_write_chunk, work, chunk, _latents(chunk, work, settled, options, pace), settled))
                pace.chunk_done()
        for chunk in share(wait=place.is_main):
            _write_chunk(work, chunk, _latents(chunk, work, settled, options, pace), settled)
            pace.chunk_done()
        pace.chunk_done()


def _latents(chunk: int, work: WorkFolder, settled: Settled, options: SampleOptions, pace: Pace) -> torch.Tensor:
    """A chunk's raw latents; the first chunk's moments go into the work folder where a strip is asked for."""
    first = chunk * settled.batch_size
    labels = settled.labels.of_batch(first, settled.batch_size)
    watch = None
    if options.trajectory is not None and chunk == 0:
        distinct = np.unique(labels[: len(settled.labels)], return_index=True)[1]
        watch = Watch(options.trajectory, sorted(int(row) for row in distinct)[:STRIP_IMAGES])
    with _named(chunk, settled):
        latents = settled.generator.latents(first, labels, on_step=pace.step, watch=watch)
    if watch is not None:
        write_arrays(work.path / STRIP, _strip_arrays(watch, settled))
    return latents


def _strip_arrays(watch: Watch, settled: Settled) -> dict[str, NDArray[Any]]:
    """Per image two rows of `frames`, where the process stood and where it was expected to end; `t` per moment."""
    generator = settled.generator
    latents = strip_latents(watch)
    pixels = generator.pixels(generator.raw(latents.flatten(0, 1).to(generator.device)))
    return {
        "frames": pixels.reshape(*latents.shape[:2], *pixels.shape[1:]),
        "rows": np.asarray(watch.rows, dtype=np.int64),
        "t": np.asarray([moment.t for moment in watch.of_row(watch.rows[0])], dtype=np.float32),
    }


def _write_chunk(work: WorkFolder, chunk: int, latents: torch.Tensor, settled: Settled) -> None:
    count = min(settled.batch_size, len(settled.labels) - chunk * settled.batch_size)
    if settled.generator.vae is None:
        data: NDArray[Any] = latents.cpu().numpy()
    else:
        with _named(chunk, settled):
            data = settled.generator.pixels(latents)
    work.write(chunk, {"data": data[:count]})


@contextmanager
def _named(chunk: int, settled: Settled) -> Iterator[None]:
    """Turn rows that are not finite into a `UserError` with the seed, the images' numbers and their classes."""
    try:
        yield
    except NotFiniteError as error:
        known = settled.known
        images = [chunk * settled.batch_size + row for row in error.rows]
        labels = settled.labels.of_batch(chunk * settled.batch_size, settled.batch_size)
        classes = [describe_class(int(labels[row]), known.names, known.ids) for row in error.rows]
        named = [f"image {image} of class {name}" for image, name in zip(images, classes, strict=True)][:4]
        more = f" and {len(images) - 4} more" if len(images) > 4 else ""
        raise UserError(
            f"{error.what} are not finite with seed {settled.generator.plan.seed}: {', '.join(named)}{more}; "
            f"try --mixed-precision no, --decode-dtype float32, a lower --guidance or other --weights"
        ) from error


def _finish(work: WorkFolder, settled: Settled, options: SampleOptions) -> None:
    """Put the output together, unless another main process has; then the sidecar, then the work folder goes."""
    while not work.claim(work.chunks):
        time.sleep(POLL_SECONDS)
    if not work.is_open():
        return
    out, labels = options.path, settled.labels.values
    clear(out)
    if options.trajectory is not None:
        _write_strip(read_arrays(work.path / STRIP), settled, options)
    if options.kind == "folder":
        unfinished = work.path / "folder"
        output = outputs.fill_folder(unfinished, work.parts(), labels, folder_name=settled.folder_name, final=out)
        sidecar.write(out, settled.recipe, output)  # first, or a kill in between would leave a stranger's folder
        publish_folder(unfinished, out)
    else:
        sidecar.write(out, settled.recipe, _write_file(work, settled, options))
    work.remove()
    say(f"wrote {options.out} ({len(labels)} samples) and {sidecar.sidecar_of(out)}")


def _write_file(work: WorkFolder, settled: Settled, options: SampleOptions) -> dict[str, Any]:
    out, labels = options.path, settled.labels.values
    if options.kind == "latents":
        return outputs.write_latents(out, work.parts(), labels, shape=settled.generator.shape)
    if options.kind == "npz":
        return outputs.write_npz(out, work.parts(), labels, pixels=next(work.parts()).shape[1:3])
    columns = settled.labels.rule.get("samples_per_class", 1)
    return outputs.write_grid(
        out, work.parts(), labels, class_name=settled.class_name, columns=columns if columns > 1 else None
    )


def _write_strip(arrays: dict[str, NDArray[Any]], settled: Settled, options: SampleOptions) -> None:
    names = [settled.class_name(int(settled.labels.values[row])) for row in arrays["rows"]]
    outputs.write_strip(
        strip_of(options.path),
        arrays["frames"],
        row_labels=[label for name in names for label in (f"{name} x_t".strip(), "expected x_0")],
        captions=[*(f"t = {t:.0f}" for t in arrays["t"][:-1]), "result"],
    )


def _say_plan(settled: Settled, done: int) -> None:
    recipe = settled.recipe
    held = f", {done} of them there already" if done else ""
    say(
        f"{len(settled.labels)} samples{held}: {recipe['sampler']}, {recipe['steps']} steps, "
        f"guidance {recipe['guidance']:g}, seed {recipe['seed']}, batches of {settled.batch_size} on "
        f"{recipe['device']} (mixed precision: {recipe['mixed_precision']}), {recipe['checkpoint']['weights']} "
        f"weights of step {recipe['checkpoint']['step']}"
    )


def too_large(batch_size: int | None = None) -> str:
    """What to say when memory ends; the batch size is None while the network is only being loaded."""
    if batch_size is None:
        return "the network and the VAE do not fit into memory; use another --device"
    lower = f"lower it to {batch_size // 2}, say, or use" if batch_size > 1 else "use"
    return f"out of memory with --batch-size {batch_size}; {lower} --mixed-precision bf16 or --decode-dtype bfloat16"
