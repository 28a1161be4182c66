"""Options and what lies at their paths into a job: metrics chosen, images and statistics checked, work planned."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from pipeline.features.encoder import EncoderFolder, find_encoder
from pipeline.latents.remote import cache_folder as latents_cache
from pipeline.runtime.console import warn
from pipeline.runtime.devices import choose_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, sha256_of
from pipeline.runtime.publish import sweep
from pipeline.runtime.remote_files import is_url
from pipeline.runtime.remote_output import RemoteOutput
from sample.evaluate import report
from sample.evaluate.encoder import CLIPS, name_of
from sample.evaluate.features import DIGESTS, Blocks
from sample.evaluate.image_set import ImageSet, digest_of
from sample.evaluate.inception_weights import InceptionWeights, cache_folder, find_inception
from sample.evaluate.inputs import open_inputs
from sample.evaluate.metrics import METRICS, FeatureName, feature_kind
from sample.evaluate.options import EvaluateOptions
from sample.evaluate.reference import read_written
from sample.evaluate.scoring import Side, resolve_metrics
from sample.sidecar import sidecar_of
from sample.work_folder import WorkFolder

FEATURE_BATCH = {"cpu": 32, "cuda": 256}
REFERENCE_FEATURES: tuple[FeatureName, ...] = ("features_2048", "spatial")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Extraction:
    """Features to be made of one set of images."""

    images: ImageSet
    wanted: tuple[FeatureName, ...]
    plan: dict[str, Any]
    """All that the features depend on."""

    @property
    def parts(self) -> int:
        return -(-self.images.count // self.images.part_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationJob:
    """What is to be done, resolved and checked."""

    options: EvaluateOptions
    sides: Mapping[str, Side]
    metrics: tuple[str, ...]
    weights: InceptionWeights | None
    """None where files of statistics say everything, and on other features."""
    encoder: EncoderFolder | None
    """The encoder of --features, if it is one."""
    device: str
    batch_size: int
    remote: Mapping[str, RemoteOutput]
    """By flag: outputs that go behind a URL when they are made."""

    @property
    def out(self) -> Path | None:
        """Where the result is written on this machine."""
        return self._local("--out", self.options.out)

    @property
    def make_reference(self) -> Path | None:
        """Where the reference is written on this machine."""
        return self._local("--make-reference", self.options.make_reference)

    def _local(self, flag: str, given: str | None) -> Path | None:
        if flag in self.remote:
            return self.remote[flag].local
        return None if given is None else Path(given)

    @property
    def weights_sha256(self) -> str | None:
        """What makes the features: the digest of its weights, None for pixels."""
        made_by = self.weights or self.encoder
        return None if made_by is None else made_by.sha256

    @property
    def encoder_name(self) -> str:
        """What the encoder is called in metrics' names."""
        return "encoder" if self.encoder is None else name_of(self.encoder)

    @property
    def reference_source(self) -> Side:
        """The side that --make-reference describes."""
        return self.sides.get("--reference") or self.sides["--samples"]

    @property
    def samples(self) -> list[Side]:
        """The images that are judged: one set, or one of each seed."""
        return [side for flag, side in self.sides.items() if flag != "--reference"]

    @cached_property
    def score_request(self) -> str:
        """A digest of all that the numbers depend on but the libraries' versions."""
        sides = {flag: side.key for flag, side in self.sides.items()}
        kid = [self.options.reverse.seed, self.options.kid_subsets, self.options.kid_subset_size]
        kid_asked = kid if "kid" in self.metrics else None
        return digest_of([sides, self.metrics, kid_asked, self.weights_sha256, self.batch_size])

    @cached_property
    def reference_request(self) -> str:
        """A digest of all that the reference depends on but the libraries' versions."""
        made_of = [self.reference_source.key, self.weights_sha256]
        return digest_of([*made_of, self.batch_size, self.options.reference_features])

    @cached_property
    def writes_reference(self) -> bool:
        """Whether --make-reference is to be written."""
        return self.options.make_reference is not None and not self.reference_is_there()

    @cached_property
    def scores(self) -> bool:
        """Whether numbers are to be computed."""
        return bool(self.metrics) and not self.result_is_there()

    def reference_is_there(self) -> bool:
        """Whether --make-reference holds what is asked for just now, whoever wrote it; never with --overwrite.

        Raises:
            UserError: it holds something else.
        """
        path = self.make_reference or Path()
        sweep(path)
        if self.options.overwrite or not path.exists():
            return False
        sidecar = sidecar_of(path)
        written = read_written(sidecar)
        intact = written.sha256 in {None, sha256_of(path)}  # sidecars of before have none
        if intact and written.request == self.reference_request:
            return True
        raise UserError(
            f"--make-reference {self.options.make_reference} is there already and holds something else; choose another "
            "name or --overwrite"
        )

    def result_is_there(self) -> bool:
        """Whether --out holds the answer just now, whoever wrote it; never with --overwrite.

        Raises:
            UserError: it holds another result.
        """
        path = self.out
        if path is None:
            return False
        sweep(path)
        if self.options.overwrite or not path.exists():
            return False
        there = report.read_result(path)
        if there is not None and there.request == self.score_request:
            return True
        raise UserError(
            f"--out {self.options.out} is there already and holds another result; choose another name or --overwrite"
        )

    @cached_property
    def extractions(self) -> dict[Path, Extraction]:
        """The features to be made, by work folder; two sides that are the same images share one."""
        return self._extractions(self.writes_reference, self.scores)

    def superseded(self) -> set[Path]:
        """Where a killed command has features that nobody needs: of what is there by now, or --overwrite drops them."""
        asked = (self.options.make_reference is not None, bool(self.metrics))
        done = product(*((True, False) if each else (False,) for each in asked))
        folders = {folder for reference, scores in done for folder in self._extractions(reference, scores)}
        is_own = self.options.work is None and (self.options.out or self.options.make_reference) is not None
        if self.options.overwrite and is_own and self.work_base.exists():
            folders |= {folder for folder in self.work_base.iterdir() if folder.is_dir()}
        return folders - self.extractions.keys()

    def _extractions(self, reference: bool, scores: bool) -> dict[Path, Extraction]:
        by_key: dict[str, tuple[ImageSet, set[FeatureName]]] = {}
        for side in self.sides.values():
            if side.given.images is not None and (wanted := self._wanted_of(side, reference, scores)):
                by_key.setdefault(side.images_key, (side.given.images, set()))[1].update(wanted)
        extractions = {}
        for key, (images, wanted) in by_key.items():
            plan = {
                "images": key,
                "count": images.count,
                "part_size": images.part_size,
                "features": sorted(wanted),
                "inception": self.weights_sha256,
                "batch_size": self.batch_size,
                "device": self.device.partition(":")[0],
            }
            folder = self.work_base / digest_of(plan)[:16]
            extractions[folder] = Extraction(images=images, wanted=tuple(sorted(wanted)), plan=plan)
        return extractions

    def folder_of(self, side: Side) -> Path | None:
        """Where the features of a side are; None where a file of statistics says everything."""
        if side.given.images is None or not self._wanted_of(side, self.writes_reference, self.scores):
            return None
        return next(folder for folder, made in self.extractions.items() if made.plan["images"] == side.images_key)

    def read_features(self, work: Mapping[Path, WorkFolder]) -> None:
        """Let every side read its features from the work folders, which are complete."""
        for side in self.sides.values():
            folder = self.folder_of(side)
            if folder is not None:
                names = (*self.extractions[folder].wanted, DIGESTS)
                side.blocks = {name: Blocks(work=work[folder], name=name) for name in names}

    def _wanted_of(self, side: Side, reference: bool, scores: bool) -> set[FeatureName]:
        """The features that have to be made of a side's images for the reference, the numbers, or both."""
        wanted: set[FeatureName] = set()
        for metric in self.metrics if scores else ():
            if METRICS[metric].compares or side is not self.sides.get("--reference"):
                wanted |= {name for name in [side.needs(metric)] if name is not None}
        if reference and side is self.reference_source:
            wanted |= set(REFERENCE_FEATURES)
        return wanted

    @property
    def work_base(self) -> Path:
        """Where the features stand, each plan's in a folder of its own."""
        out = self.out or self.make_reference
        if self.options.work is not None:
            return Path(self.options.work)
        return cache_folder() / "evaluate" if out is None else out.with_name(f".{out.name}.features")


def resolve_job(options: EvaluateOptions) -> EvaluationJob:
    """Open the inputs and make every choice that the command line left open.

    Raises:
        UserError: an input is not what it must be, or the weights of the network are missing.
    """
    sides = {flag: Side(given) for flag, given in open_inputs(options).items()}
    encoder = find_encoder(options.features) if feature_kind(options.features) == "encoder" else None
    metrics = _resolve_metrics(options, sides, encoder)
    source = sides.get("--reference") or sides["--samples"]
    if options.make_reference is not None and source.given.images is None:
        raise UserError(f"--make-reference needs images, but {source.label} holds statistics alone; give the images")
    needs_network = options.features == "inception" and (
        options.make_reference is not None
        or any(
            side.needs(metric)
            for metric in metrics
            for side in sides.values()
            if METRICS[metric].compares or side is sides.get("--samples")
        )
    )
    weights = find_inception(options.inception) if needs_network else None
    _check_same_network(sides, weights)
    _check_sizes(sides, options, encoder)
    named = {"--out": options.out, "--make-reference": options.make_reference}
    remote = {
        flag: RemoteOutput(path, latents_cache(None))
        for flag, path in named.items()
        if path is not None and is_url(path)
    }
    for flag, path in named.items():
        if path is not None:
            make_folder(remote[flag].local.parent if flag in remote else Path(path).parent)
    device = str(choose_device(options.compute.device)[0])
    batch_size = options.compute.batch_size or FEATURE_BATCH.get(device.partition(":")[0], 256)
    return EvaluationJob(
        options=options,
        sides=sides,
        metrics=metrics,
        weights=weights,
        encoder=encoder,
        device=device,
        batch_size=batch_size,
        remote=remote,
    )


def _resolve_metrics(
    options: EvaluateOptions, sides: Mapping[str, Side], encoder: EncoderFolder | None
) -> tuple[str, ...]:
    if options.only_makes_reference:
        return ()
    wanted, asked = options.wanted, options.metrics is not None
    if encoder is not None and encoder.kind in CLIPS:
        wanted = wanted if asked else (*wanted, "cmmd")
    elif "cmmd" in wanted:
        raise UserError(f"cmmd is of CLIP's image embeddings, but --features {options.features} is no CLIP")
    if "recognised" in wanted and encoder is not None:
        _check_recognisable(sides["--samples"], encoder)
    return resolve_metrics(wanted, sides["--samples"], sides.get("--reference"), asked=asked)


def _check_recognisable(side: Side, encoder: EncoderFolder) -> None:
    """Refuse to count what a classifier recognises where there is none, or where it does not know the classes."""
    if not encoder.classes:
        raise UserError(
            f"recognised is what a classifier names, but --features {encoder.name} has none (its config.json says no "
            f"…ForImageClassification); leave recognised out"
        )
    labels = side.labels
    if labels is None or labels.min() < 0:
        raise UserError(
            f"recognised compares with the classes that images were made for, which {side.label} does not say; give "
            f"a checkpoint, a store or an .npz with arr_1, or leave recognised out"
        )
    if labels.max() >= encoder.classes:
        raise UserError(
            f"{side.label} has classes up to {labels.max()}, but the classifier of --features {encoder.name} knows "
            f"{encoder.classes}; give one that was trained on the same classes"
        )


def _check_same_network(sides: Mapping[str, Side], weights: InceptionWeights | None) -> None:
    """Refuse statistics that other weights made: numbers of two networks cannot be compared."""
    known = {} if weights is None else {"--inception": weights.sha256}
    for side in sides.values():
        recorded = None if side.given.statistics is None else side.given.statistics.provenance.inception
        if recorded is not None and recorded.sha256:
            known[side.label] = recorded.sha256
    if len(set(known.values())) > 1:
        found = ", ".join(f"{label} {sha256[:12]}…" for label, sha256 in known.items())
        raise UserError(
            f"the statistics come from different Inception weights ({found}); "
            f"make the reference again with the same file"
        )


def _check_sizes(sides: Mapping[str, Side], options: EvaluateOptions, encoder: EncoderFolder | None) -> None:
    sizes = {side.label: side.given.images.size for side in sides.values() if side.given.images is not None}
    if len(set(sizes.values())) > 1:
        found = " and ".join(f"{label} has {width}×{height} pixels" for label, (width, height) in sizes.items())
        if options.features == "pixels":
            raise UserError(f"{found}, but --features pixels compares images of one size; give --image-size")
        side = 299 if encoder is None else encoder.resolution
        warn(
            f"{found}: both are resized to the network's {side}, but sizes that differ move the distance; "
            f"--image-size crops folders alike"
        )
