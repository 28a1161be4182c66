"""Values settings: made by any number of processes that share a folder, published whole and never made again.

The images of a point are sampled in chunks that processes claim, as in dit-evaluate; whoever finds all chunks there
computes the distance and writes `points/KEY.json`, KEY a digest of all that it depends on. So every process learns the
value of every point from its file, and all of them decide alike what to try next.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, write_json
from pipeline.runtime.processes import launch
from pipeline.runtime.work_queue import Presence
from sample.evaluate.evaluation import fill_with_features, network_of
from sample.evaluate.generated import CheckpointImages, open_checkpoint, with_settings
from sample.evaluate.inputs import kind_of
from sample.evaluate.job import EvaluationJob, resolve_job
from sample.evaluate.metrics import METRICS, feature_kind
from sample.evaluate.options import EvaluateOptions
from sample.evaluate.scoring import Comparison, Side, compute_scores
from sample.options import ReverseOptions
from sample.tune.options import TuneOptions
from sample.tune.points import FORMAT, VERSION, Point, Row, in_words, passes_per_image, read_point
from sample.tune.search import Setting
from sample.work_folder import POLL_SECONDS, WorkFolder, begin

POINTS, WORK = "points", ".work"


class Judge:
    """Values settings, by sampling or from the files of points that are there."""

    def __init__(self, options: TuneOptions) -> None:
        """Read the checkpoint and the reference.

        Raises:
            UserError: they are not there, do not fit together, or are too few images for the metric.
        """
        self.options = options
        _check_inputs(options)
        self.folder = Path(options.out) / POINTS
        make_folder(self.folder)
        first = options.space.starts[0]
        self._job = resolve_job(_evaluation(options, first, options.seed))
        self._weights = first.weights
        self._network = None
        if self._job.extractions:
            self._network = network_of(self._job)
        for side in self._job.sides.values():
            side.check(self._job.metrics)
        self.rows: dict[Setting, Row] = {}

    @property
    def request(self) -> str:
        """A digest of what the first point depends on."""
        return self._job.score_request

    def values(self, settings: Sequence[Setting]) -> list[float]:
        """The mean distance of each setting over the seeds."""
        wanted = [(setting, seed) for setting in settings if setting not in self.rows for seed in self.options.seeds]
        if launch().world_size > 1:  # first what nobody else is at, then wait for the rest
            for setting, seed in wanted:
                self._point(setting, seed, wait=False)
        found: dict[Setting, list[Point]] = {}
        for setting, seed in wanted:
            point = self._point(setting, seed, wait=True)
            assert point is not None, "it was waited for"
            found.setdefault(setting, []).append(point)
        for setting, points in found.items():
            row = self.rows[setting] = Row(setting=setting, points=tuple(points))
            say(f"{points[0].metric} {row.value:.6g} with {in_words(row)}")
        return [self.rows[setting].value for setting in settings]

    def close(self) -> None:
        """Close what the reference is read from."""
        for side in self._job.sides.values():
            side.close()

    def clean_up(self) -> None:
        """Remove the reference's features, where nobody is at work on them or on a point."""
        base = Path(self.options.out) / WORK
        for folder in list(base.glob("*")):  # none where it is gone
            with Presence(folder) as here, here.last() as alone:
                if alone:
                    here.remove_folder()
        with suppress(OSError):  # others are at work there, or there is none
            base.rmdir()

    def _point(self, setting: Setting, seed: int, *, wait: bool) -> Point | None:
        """A setting's distance with one seed; None if it is not there yet and not waited for."""
        job = self._job_of(setting, seed)
        path = self.folder / f"{job.score_request[:16]}.json"
        while (point := read_point(path, job.score_request)) is None:
            with ExitStack() as at_the_end:
                if not self._work_on(job, path, at_the_end, wait=wait):
                    return None
        return point

    def _work_on(self, job: EvaluationJob, path: Path, at_the_end: ExitStack, *, wait: bool) -> bool:
        """Make what of a point nobody else is at; False if others are at the rest and it is not waited for."""
        work: dict[Path, WorkFolder] = {}
        for folder, made in job.extractions.items():
            work[folder] = begin(folder, made.plan, chunks=made.parts, overwrite=True)
            at_the_end.callback(work[folder].close)
        samples = job.sides["--samples"]
        own = work[job.folder_of(samples) or Path()]
        if path.exists():  # another process has published it just now, and removed the folder
            own.remove(unless_shared=True)
            return True
        for folder, made in job.extractions.items():
            if not work[folder].missing():
                continue
            assert self._network is not None, "there is something to make features of"
            fill_with_features(job, made, self._network, work[folder], place=launch(), wait=wait)
        if any(made.missing() for made in work.values()) or not own.claim(own.chunks):
            if wait:
                time.sleep(POLL_SECONDS)
            return wait
        if own.is_open() and sum(made.drop_damaged() for made in work.values()) == 0:
            self._publish(job, path, work, own)
            own.remove()
        return True

    def _publish(self, job: EvaluationJob, path: Path, work: dict[Path, WorkFolder], own: WorkFolder) -> None:
        job.read_features(work)
        images = job.sides["--samples"].given.images
        assert isinstance(images, CheckpointImages)
        (score,) = compute_scores(
            job.metrics,
            Comparison(
                samples=job.sides["--samples"],
                reference=job.sides["--reference"],
                seed=0,
                kid_subsets=1,
                kid_subset_size=2,
                device=job.device,
                encoder=job.encoder_name,
            ),
        )
        write_json(
            path,
            {
                "format": FORMAT,
                "version": VERSION,
                "request": job.score_request,
                "metric": score.name,
                "value": score.value,
                "passes": passes_per_image(images.job.generator),
                "recipe": images.job.recipe,
            },
            work_folder=own.path,  # which goes, with whatever a kill leaves in it
        )

    def _job_of(self, setting: Setting, seed: int) -> EvaluationJob:
        """The evaluation of one point; networks are read again only for other weights."""
        asked = _evaluation(self.options, setting, seed)
        images = self._job.sides["--samples"].given.images
        assert isinstance(images, CheckpointImages)
        if setting.weights == self._weights:
            images = with_settings(images, asked)
        else:
            images = open_checkpoint(self.options.checkpoint, asked)
        samples = Side(replace(self._job.sides["--samples"].given, images=images))
        sides = {"--samples": samples, "--reference": self._job.sides["--reference"]}
        self._weights = setting.weights
        self._job = replace(self._job, sides=sides)
        return self._job


def _check_inputs(options: TuneOptions) -> None:
    """Raise UserError for what dit-evaluate would call by other names."""
    if kind_of(options.checkpoint, "--checkpoint") != "checkpoint":
        raise UserError(f"--checkpoint {options.checkpoint} is no run or checkpoint; give what is to be sampled from")
    if kind_of(options.reference, "--reference") == "checkpoint":
        raise UserError(
            f"--reference {options.reference} is a checkpoint; give real images: a folder, an .npz or a latent store"
        )
    spec = METRICS[_metric(options)]
    if options.num_samples < spec.fewest:
        raise UserError(
            f"--num-samples {options.num_samples} are too few: {spec.title.format(encoder=options.features)} needs "
            f"{spec.fewest} images at least"
        )


def _metric(options: TuneOptions) -> str:
    """The first metric of the features, which is a distance."""
    return next(name for name, spec in METRICS.items() if spec.kind == feature_kind(options.features))


def _evaluation(options: TuneOptions, setting: Setting, seed: int) -> EvaluateOptions:
    """What dit-evaluate would be asked for one point."""
    return EvaluateOptions(
        samples=options.checkpoint,
        reference=options.reference,
        metrics=_metric(options),
        features=options.features,
        inception=options.inception,
        image_size=options.image_size,
        num_samples=options.num_samples,
        labels=options.labels,
        weights=setting.weights,
        vae=options.vae,
        allow_other_vae=options.allow_other_vae,
        work=str(Path(options.out) / WORK),
        workers=options.workers,
        reverse=ReverseOptions(
            sampler=setting.sampler,
            steps=setting.steps,
            eta=options.eta,
            guidance=setting.guidance,
            guide=options.guide,
            guidance_source=options.guidance_source,
            middle_guidance=options.middle_guidance,
            guidance_channels=options.guidance_channels,
            guidance_interval=setting.interval,
            objective=options.objective,
            num_heads=options.num_heads,
            seed=seed,
        ),
        compute=options.compute,
    )
