"""One `dit-evaluate` from its options to its numbers: open the inputs, make features, score, write."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.runtime.cli import flag_values
from pipeline.runtime.console import say, warn
from pipeline.runtime.devices import memory_explained
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json
from pipeline.runtime.processes import Launch, launch
from pipeline.runtime.publish import Stage, making
from sample.evaluate import report
from sample.evaluate.features import DIGESTS, Blocks, make_features
from sample.evaluate.image_set import pixels_fingerprint
from sample.evaluate.inception import FIDInception
from sample.evaluate.inception_weights import load_inception
from sample.evaluate.metrics import FEWEST_FOR_FID, Gaussian
from sample.evaluate.options import EvaluateOptions
from sample.evaluate.reference import write_statistics
from sample.evaluate.scoring import Comparison, Side, compute_scores, warn_of_few
from sample.evaluate.task import REFERENCE_FEATURES, Task, settle_task
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
        task, network, work = _begin(options, place, at_the_end)
        if not task.writes_reference and not task.scores:
            return _tell_again(task, place)
        if network is not None:
            _make_all_features(task, network, work, place)
        if place.is_main:
            _finish(task, work)
            _remove(work)
    return 0


def _begin(
    options: EvaluateOptions, place: Launch, at_the_end: ExitStack
) -> tuple[Task, FIDInception | None, dict[Path, WorkFolder]]:
    """The task, its network if it needs one, and its work folders, which every process has opened when this returns."""
    with _barriers(place) as barrier:
        if place.is_main:
            task = settle_task(options)
        barrier()  # the main process alone downloads weights and VAEs; the others find them in the cache
        if not place.is_main:
            task = settle_task(options)
        for side in task.sides.values():
            at_the_end.callback(side.close)
        network = load_inception(task.weights) if task.weights is not None and task.extractions else None
        work: dict[Path, WorkFolder] = {}
        for is_turn in (place.is_main, not place.is_main):  # the main process puts the plans there
            for folder, made in task.extractions.items() if is_turn else ():
                work[folder] = begin(folder, made.plan, chunks=made.parts, overwrite=True)
                at_the_end.callback(work[folder].close)
            barrier()
        barrier()  # nobody comes late to a folder that the main process has finished and removed
    return task, network, work


def _remove(work: Mapping[Path, WorkFolder]) -> None:
    for made in work.values():
        made.remove()
    for base in {folder.parent for folder in work}:
        with suppress(OSError):  # another evaluation's work is in it
            base.rmdir()


def _tell_again(task: Task, place: Launch) -> int:
    """Print the numbers of an earlier run that was asked for the same."""
    if place.is_main:
        named = [path for path in (task.options.out, task.options.make_reference) if path is not None]
        say(f"{' and '.join(named)}: there already, made from these very inputs; nothing to do")
        if task.metrics:
            result = read_json(Path(task.options.out or ""))
            print(report.table(result["metrics"], result["std"]))
    return 0


def _make_all_features(task: Task, network: FIDInception, work: dict[Path, WorkFolder], place: Launch) -> None:
    for folder, extraction in task.extractions.items():
        again = True
        while again:
            with memory_explained(lambda: too_large(task.batch_size)):
                make_features(
                    extraction.images,
                    network,
                    extraction.wanted,
                    work[folder],
                    place=place,
                    batch_size=task.batch_size,
                    device=task.device,
                )
            again = place.is_main and work[folder].drop_damaged() > 0  # a part that is not as it was written


def _finish(task: Task, work: dict[Path, WorkFolder]) -> None:
    """From the features of all images to the files and the table."""
    for side in task.sides.values():
        folder = task.folder_of(side)
        if folder is not None:
            names = (*task.extractions[folder].wanted, DIGESTS)
            side.blocks = {name: Blocks(work=work[folder], name=name) for name in names}
    if task.writes_reference:
        _write_reference(task)
    if task.scores:
        _score(task)


def _write_reference(task: Task) -> None:
    """Write --make-reference and its sidecar, which appear together."""
    side, path = task.reference_source, Path(task.options.make_reference or "")
    images = side.given.images
    assert images is not None, "settled: a reference is made of images"
    assert task.weights is not None, "settled: features need the network"
    if images.count < FEWEST_FOR_FID:
        warn(f"{path} will hold statistics of {images.count} images; FID needs at least {FEWEST_FOR_FID}")
    provenance = {
        "images": report.describe_images(images, fingerprint=_fingerprint(side)),
        "inception": task.weights.describe(),
        "batch_size": task.batch_size,
        "versions": report.all_versions(),
    }
    features = side.blocks["features_2048"].rows() if task.options.reference_features else None
    sidecar = {"request": task.reference_request, **provenance, "source": side.given.path}
    with _made_once(path, task, is_made=lambda: task.has_reference) as stage:
        write_json(stage.place(sidecar_of(path)), sidecar)
        gaussians: dict[str, Gaussian] = {feature: side.fitted(feature) for feature in REFERENCE_FEATURES}
        write_statistics(stage.place(path), gaussians, count=images.count, features=features, provenance=provenance)
    say(f"wrote {path} (statistics of {images.count} images)")


@contextmanager
def _made_once(path: Path, task: Task, *, is_made: Callable[[], bool]) -> Iterator[Stage]:
    """Publish an output; where another command has just published the very same, that one stays and serves."""
    try:
        with making(path, overwrite=task.options.overwrite, wait=True) as stage:
            yield stage
    except UserError:
        if not is_made():
            raise


def _score(task: Task) -> None:
    options = task.options
    samples, reference = task.sides["--samples"], task.sides.get("--reference")
    if reference is not None:
        warn_of_few(task.metrics, samples, reference)
    scores = compute_scores(
        task.metrics,
        Comparison(
            samples=samples,
            reference=reference or samples,
            seed=options.reverse.seed,
            kid_subsets=options.kid_subsets,
            kid_subset_size=options.kid_subset_size,
            device=task.device,
        ),
    )
    result = report.build(
        scores,
        request=task.score_request,
        inputs={
            flag.removeprefix("--"): report.describe_input(side.given, fingerprint=_fingerprint(side))
            for flag, side in task.sides.items()
        },
        inception=None if task.weights is None else task.weights.describe(),
        options=flag_values(options),
        device=task.device,
        batch_size=task.batch_size,
    )
    if options.out is not None:
        out = Path(options.out)
        with _made_once(out, task, is_made=lambda: report.request_of(out) == task.score_request) as stage:
            write_json(stage.place(out), result)
        say(f"wrote {out}")
    print(report.table(result["metrics"], result["std"]))


def _fingerprint(side: Side) -> str | None:
    """The digest of all pixels that were looked at; None where only a file of statistics was read."""
    return pixels_fingerprint(side.blocks[DIGESTS]) if DIGESTS in side.blocks else None


@contextmanager
def _barriers(place: Launch) -> Iterator[Callable[[], None]]:
    """Give a function that returns when every process has called it as often; with one process, at once.

    A process group is needed only here: afterwards the processes share their work through files, so that none
    waits in a collective for one that has died or is long done.

    Raises:
        UserError: the variables of a launcher are incomplete, or the processes do not find each other.
    """
    if place.world_size == 1:
        yield lambda: None
        return
    import torch.distributed

    try:
        torch.distributed.init_process_group("gloo", rank=place.rank, world_size=place.world_size)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the {place.world_size} processes do not find each other ({error}); "
            f"start them with torchrun or accelerate launch, or unset RANK and WORLD_SIZE for one process"
        ) from error

    def barrier() -> None:
        try:
            torch.distributed.barrier()
        except RuntimeError as error:  # another process has ended, and has said why
            raise SystemExit(2) from error

    try:
        yield barrier
    finally:
        torch.distributed.destroy_process_group()
