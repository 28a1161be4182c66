"""One `dit-evaluate` from its options to its numbers: open the inputs, make features, score, write."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from torch.nn import Module

from pipeline.runtime.cli import flag_values
from pipeline.runtime.console import say, warn
from pipeline.runtime.devices import memory_explained
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes, make_folder, sha256_of, write_json
from pipeline.runtime.processes import Launch, launch
from pipeline.runtime.publish import making
from pipeline.runtime.work_queue import Presence, exclusive
from sample.evaluate import report
from sample.evaluate.encoder import EncoderFeatures, describe
from sample.evaluate.features import DIGESTS, make_features
from sample.evaluate.image_set import pixels_fingerprint
from sample.evaluate.inception_weights import load_inception
from sample.evaluate.job import REFERENCE_FEATURES, EvaluationJob, Extraction, resolve_job
from sample.evaluate.metrics import FEWEST_FOR_FID
from sample.evaluate.options import EvaluateOptions
from sample.evaluate.pixels import PixelFeatures
from sample.evaluate.reference import write_statistics
from sample.evaluate.remote import bring_here, put_there
from sample.evaluate.scoring import Comparison, Side, compute_scores, over_seeds, warn_of_few
from sample.run import too_large
from sample.sidecar import sidecar_of
from sample.work_folder import WorkFolder, begin


def evaluate(options: EvaluateOptions) -> int:
    """Do what the options ask for and print the numbers; 0 when it is done.

    Raises:
        UserError: the input is wrong.
    """
    place = launch()
    with ExitStack() as at_the_end:
        job, network, work = _begin(options, place, at_the_end)
        if not job.writes_reference and not job.scores:
            if place.is_main:
                _drop_superseded(job)
                _tell_again(job)
                put_there(job)
            return 0
        if network is not None:
            _make_all_features(job, network, work, place)
        if place.is_main:
            with _one_at_a_time(job):
                _finish(job, work)
                for made in work.values():
                    made.remove()
            _drop_superseded(job)
            put_there(job)
    return 0


def _begin(
    options: EvaluateOptions, place: Launch, at_the_end: ExitStack
) -> tuple[EvaluationJob, Module | None, dict[Path, WorkFolder]]:
    """The job, its network if it needs one, and its work folders, which every process has opened when this returns."""
    with _from_main(place) as from_main:
        # The main process alone downloads weights and VAEs and reads all images for their key; the others are told.
        keys: dict[str, str] = {}
        if place.is_main:
            job = resolve_job(options)
            keys = {flag: side.images_key for flag, side in job.sides.items()}
            bring_here(job)
            for side in job.sides.values():
                side.check(job.metrics if job.scores else ())
        keys = from_main(keys)
        if not place.is_main:
            job = resolve_job(options)
        for flag, side in job.sides.items():
            side.images_key = keys[flag]
            at_the_end.callback(side.close)
        network: Module | None = None
        if job.extractions:
            network = network_of(job)
        work: dict[Path, WorkFolder] = {}
        for is_turn in (place.is_main, not place.is_main):  # the main process puts the plans there
            for folder, made in job.extractions.items() if is_turn else ():
                work[folder] = begin(folder, made.plan, chunks=made.parts, overwrite=True)
                at_the_end.callback(work[folder].close)
            from_main({})
        from_main({})  # nobody comes late to a folder that the main process has finished and removed
    return job, network, work


def network_of(job: EvaluationJob) -> Module:
    """What makes the job's features of images."""
    if job.encoder is not None:
        wanted = {name for extraction in job.extractions.values() for name in extraction.wanted}
        return EncoderFeatures(job.encoder, sorted(wanted), job.device)
    return PixelFeatures() if job.weights is None else load_inception(job.weights)


@contextmanager
def _one_at_a_time(job: EvaluationJob) -> Iterator[None]:
    """Let commands that share features or an output end one after the other, each seeing what the ones before left."""
    if not job.extractions and job.out is None and not job.work_base.exists():
        yield
        return
    make_folder(job.work_base)
    lock = job.work_base / "finish.lock"
    with exclusive(lock, needed=False):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            with suppress(OSError):  # unfinished or another evaluation's work is in it
                job.work_base.rmdir()


def _drop_superseded(job: EvaluationJob) -> None:
    """Remove the features that a killed command has left of what is there by now."""
    if job.work_base.exists():
        with _one_at_a_time(job):
            for folder in filter(Path.exists, job.superseded()):
                with Presence(folder) as here, here.last() as alone:
                    if alone:
                        here.remove_folder()


def _tell_again(job: EvaluationJob) -> None:
    """Print the numbers of an earlier run that was asked for the same."""
    named = [path for path in (job.options.out, job.options.make_reference) if path is not None]
    say(f"{' and '.join(named)}: there already, made from these very inputs; nothing to do")
    if job.metrics:
        result = report.read_result(job.out or Path())
        assert result is not None, "job.result_is_there has seen to it"
        print(report.in_words(result.metrics, result.std, result.protocol))


def fill_with_features(
    job: EvaluationJob, extraction: Extraction, network: Module, work: WorkFolder, *, place: Launch, wait: bool
) -> None:
    """Make the parts of a job's features that nobody else is at.

    Args:
        wait: whether to return when all are there, whoever makes them.

    Raises:
        UserError: an image cannot be read, its features are not finite, or memory ends.
    """
    with memory_explained(lambda: too_large(job.batch_size)):
        make_features(
            extraction.images,
            network,
            extraction.wanted,
            work,
            place=place,
            wait=wait,
            batch_size=job.batch_size,
            device=job.device,
        )


def _make_all_features(job: EvaluationJob, network: Module, work: dict[Path, WorkFolder], place: Launch) -> None:
    for folder, extraction in job.extractions.items():
        again = True
        while again:
            fill_with_features(job, extraction, network, work[folder], place=place, wait=place.is_main)
            again = (  # for a part that is not as it was written
                place.is_main and work[folder].is_open() and work[folder].drop_damaged() > 0
            )


def _finish(job: EvaluationJob, work: dict[Path, WorkFolder]) -> None:
    """From the features of all images to the files and the table.

    Raises:
        UserError: something else is there by now, and --overwrite is not given.
    """
    # The same command may have run beside this one and be done.
    writes = job.writes_reference and not job.reference_is_there()
    scores = job.scores and not job.result_is_there()
    if not writes and not scores:
        _tell_again(job)
        return
    if not all(made.is_open() for made in work.values()):
        raise UserError("the same command ran beside this one and has removed the features; give the command again")

    # Only now are the features complete.
    job.read_features(work)
    if writes:
        _write_reference(job)
    if scores:
        _score(job)


def _write_reference(job: EvaluationJob) -> None:
    """Write --make-reference and its sidecar, which appear together."""
    side, path = job.reference_source, job.make_reference or Path()
    images = side.given.images
    assert images is not None, "resolve_job has seen to it: a reference is made of images"
    assert job.weights is not None, "resolve_job has seen to it: features need the network"
    if images.count < FEWEST_FOR_FID:
        warn(f"{path} will hold statistics of {images.count} images; FID needs at least {FEWEST_FOR_FID}")
    provenance = {
        "images": report.describe_images(images, fingerprint=_fingerprint(side)),
        "inception": job.weights.describe(),
        "batch_size": job.batch_size,
        "versions": report.all_versions(),
    }
    gaussians = {feature: side.fitted(feature) for feature in REFERENCE_FEATURES}
    features = side.blocks["features_2048"].rows() if job.options.reference_features else None
    sidecar = sidecar_of(path)
    with making(path, overwrite=job.options.overwrite, beside=(sidecar,), wait=True) as stage:
        made = stage.place(path)
        with explained_writes(path):
            write_statistics(made, gaussians, count=images.count, features=features, provenance=provenance)
        described = {"request": job.reference_request, **provenance, "source": side.given.path}
        write_json(stage.place(sidecar), {**described, "sha256": sha256_of(made)})
    say(f"wrote {job.options.make_reference} (statistics of {images.count} images)")


def _score(job: EvaluationJob) -> None:
    options = job.options
    reference = job.sides.get("--reference")
    if reference is not None:
        warn_of_few(job.metrics, job.samples[0], reference)
    scores = over_seeds(
        [
            compute_scores(
                job.metrics,
                Comparison(
                    samples=samples,
                    reference=reference or samples,
                    seed=options.reverse.seed,
                    kid_subsets=options.kid_subsets,
                    kid_subset_size=options.kid_subset_size,
                    device=job.device,
                    encoder=job.encoder_name,
                ),
            )
            for samples in job.samples
        ],
        first_seed=options.reverse.seed,
    )
    result = report.build(
        scores,
        request=job.score_request,
        protocol=report.protocol(job.samples[0].given.recipe, seeds=len(job.samples)),
        inputs={
            flag.removeprefix("--"): report.describe_input(side.given, fingerprint=_fingerprint(side))
            for flag, side in job.sides.items()
        },
        inception=None if job.weights is None else job.weights.describe(),
        encoder=None if job.encoder is None else describe(job.encoder),
        options=flag_values(options),
        device=job.device,
        batch_size=job.batch_size,
    )
    if job.out is not None:
        with making(job.out, overwrite=options.overwrite, wait=True) as stage:
            write_json(stage.place(job.out), result)
        say(f"wrote {options.out}")
    print(report.in_words(result["metrics"], result["std"], result["protocol"]))


def _fingerprint(side: Side) -> str | None:
    """The digest of all pixels that were looked at; None where only a file of statistics was read."""
    return pixels_fingerprint(side.blocks[DIGESTS]) if DIGESTS in side.blocks else None


@contextmanager
def _from_main(place: Launch) -> Iterator[Callable[[dict[str, str]], dict[str, str]]]:
    """Give a function that returns the main process's value when every process has called it as often.

    A process group is needed only here: afterwards the processes share their work through files, so that none
    waits in a collective for one that has died or is long done.

    Raises:
        UserError: the variables of a launcher are incomplete, or the processes do not find each other.
    """
    if place.world_size == 1:
        yield lambda value: value
        return
    import torch.distributed

    try:
        torch.distributed.init_process_group("gloo", rank=place.rank, world_size=place.world_size)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the {place.world_size} processes do not find each other ({error}); "
            f"start them with torchrun or accelerate launch, or unset RANK and WORLD_SIZE for one process"
        ) from error

    def from_main(value: dict[str, str]) -> dict[str, str]:
        held = [value]
        try:
            torch.distributed.broadcast_object_list(held)
            torch.distributed.barrier()
        except RuntimeError as error:  # another process has ended, and has said why
            raise SystemExit(2) from error
        return held[0]

    try:
        yield from_main
    finally:
        torch.distributed.destroy_process_group()
