"""Which metrics two inputs allow, and their values under names that carry the number of images."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.randomness import Permutation
from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError
from sample.evaluate.features import Blocks
from sample.evaluate.inputs import Input
from sample.evaluate.metrics import METRICS, FeatureName, Gaussian, Outcome, fit_gaussian
from sample.sidecar import Recipe

FEW_FOR_FID = 10_000
EQUAL_SHARES = ("balanced", "by-class")
"""Rules by which dit-sample gives every class as many images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score(Outcome):
    """One number of the result."""

    name: str
    """The metric and how many images were judged: FID-50k."""


class Side:
    """One input and what is known of its features."""

    def __init__(self, given: Input) -> None:
        self.given = given
        self.blocks: dict[str, Blocks] = {}
        self._fitted: dict[FeatureName, Gaussian] = {}

    @property
    def label(self) -> str:
        return f"{self.given.flag} {self.given.path}"

    def close(self) -> None:
        """Close what the images are read from."""
        if self.given.images is not None:
            self.given.images.close()

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """The classes of the images, where they are said."""
        return None if self.given.images is None else self.given.images.labels()

    @cached_property
    def images_key(self) -> str:
        """A digest that changes when the images do."""
        return "" if self.given.images is None else self.given.images.key()

    @property
    def key(self) -> str:
        """A digest that changes when anything does that a metric could read."""
        statistics = self.given.statistics
        return self.images_key + ("" if statistics is None else statistics.key())

    def from_file(self, metric: str) -> bool:
        """Whether a file of statistics says all that the metric asks of this side."""
        statistics = self.given.statistics
        spec = METRICS[metric]
        if statistics is None or not spec.compares or spec.kind != "inception":
            return False
        return statistics.has_gaussian(spec.features) if spec.of_gaussian else statistics.has_features

    def needs(self, metric: str) -> FeatureName | None:
        """The feature that has to be made from images for the metric, if any."""
        return None if self.from_file(metric) else METRICS[metric].features

    def lacks(self, metric: str) -> str | None:
        """What is missing for the metric, as words, if anything is."""
        if self.given.images is not None or self.from_file(metric):
            return None
        return METRICS[metric].arrays

    def count(self, metric: str) -> int | None:
        """How many images the metric sees on this side; None where a file of statistics does not say."""
        if self.from_file(metric) and self.given.statistics is not None:
            return self.given.statistics.count
        return None if self.given.images is None else self.given.images.count

    def check(self, metrics: Iterable[str]) -> None:
        """Read what a file of statistics says for the metrics, before anything is computed for the other side.

        Raises:
            UserError: it is damaged or of another network.
        """
        for metric in metrics:
            spec = METRICS[metric]
            if self.from_file(metric) and spec.of_gaussian:
                self.gaussian(spec.features)
            elif self.from_file(metric):
                _ = self.features

    def gaussian(self, feature: FeatureName) -> Gaussian:
        """The Gaussian of a feature, from the file as it stands, else fitted."""
        statistics = self.given.statistics
        if statistics is not None and statistics.has_gaussian(feature):
            return statistics.gaussian(feature)
        return self.fitted(feature)

    def fitted(self, feature: FeatureName) -> Gaussian:
        """The Gaussian of a feature of the images."""
        if feature not in self._fitted:
            self._fitted[feature] = fit_gaussian(self.blocks[feature])
        return self._fitted[feature]

    @cached_property
    def pixel_axes(self) -> NDArray[np.float64]:
        """The principal axes of the images' pixels."""
        from sample.evaluate.pixels import principal_axes

        return principal_axes(self.fitted("pixels"))

    @cached_property
    def features(self) -> NDArray[np.floating]:
        """The pooled features of every image."""
        statistics = self.given.statistics
        if statistics is not None and statistics.has_features:
            return statistics.features()
        return self.blocks["features_2048"].rows()


def count_name(metric: str, count: int | None, recipe: Recipe | None = None, *, encoder: str = "encoder") -> str:
    """The metric's name with its count: FID-50k, FID-2500; FID alone where the count is not known.

    FID-50k-balanced where the recipe says that every class was asked for equally often: that moves FID, too.
    """
    title = METRICS[metric].title.format(encoder=encoder)
    if count is None:
        return title
    labels = None if recipe is None else recipe.labels
    balanced = labels is not None and labels.rule in EQUAL_SHARES
    return f"{title}-{f'{count // 1000}k' if count % 1000 == 0 else count}{'-balanced' if balanced else ''}"


def resolve_metrics(wanted: Sequence[str], samples: Side, reference: Side | None, *, asked: bool) -> tuple[str, ...]:
    """The metrics to compute.

    Args:
        asked: whether the user named them; if not, those that a file of statistics cannot give are left out and told.

    Raises:
        UserError: an input lacks what a metric needs, or has too few images for it; all such metrics are named.
    """
    left_out: dict[str, str] = {}
    complaints: list[str] = []
    few: dict[str, list[str]] = {}
    for metric in wanted:
        sides = [samples] if not METRICS[metric].compares or reference is None else [samples, reference]
        lacking = [f"{lack}, which {side.label} does not hold" for side in sides if (lack := side.lacks(metric))]
        if lacking and (asked or metric == "fid" or METRICS[metric].kind != "inception"):
            complaints.append(f"{metric} needs {' and '.join(lacking)}; give images there or choose other --metrics")
        elif lacking:
            left_out[metric] = f"{metric} is left out: it needs {' and '.join(lacking)}"
        elif short := _too_few(metric, sides):
            few.setdefault(short, []).append(metric)
    complaints += [f"{' and '.join(metrics)}: {short}" for short, metrics in few.items()]
    if complaints:
        raise UserError("; ".join(complaints))
    for text in left_out.values():
        say(f"note: {text}")
    return tuple(metric for metric in wanted if metric not in left_out)


def _too_few(metric: str, sides: Sequence[Side]) -> str | None:
    """Why sides have too few images for the metric, if any has."""
    spec = METRICS[metric]
    counts = {side.label: side.count(metric) for side in sides}
    short = [f"{label} has {count}" for label, count in counts.items() if count is not None and count < spec.fewest]
    if not short:
        return None
    advice = (
        "a covariance of so few means nothing: give more images, or use --metrics kid"
        if spec.of_gaussian
        else "give more images"
    )
    return f"at least {spec.fewest} images are needed, but {' and '.join(short)}; {advice}"


def warn_of_few(metrics: Sequence[str], samples: Side, reference: Side) -> None:
    """Warn where FID is dominated by its bias from small samples."""
    for metric in (metric for metric in metrics if METRICS[metric].of_gaussian):
        for side in (samples, reference):
            count = side.count(metric)
            if count is not None and count < FEW_FOR_FID:
                warn(
                    f"{METRICS[metric].title} is biased upwards with few images, and {side.label} has {count}, fewer "
                    f"than {FEW_FOR_FID}: compare it only with numbers from as many images, or use kid"
                )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two sides, and the settings that metrics read."""

    samples: Side
    reference: Side
    """The samples themselves where no metric compares."""
    seed: int
    kid_subsets: int
    kid_subset_size: int
    device: str
    encoder: str = "encoder"
    """What the encoder is called in names, where there is one."""

    @cached_property
    def shares_inside(self) -> tuple[float, float]:
        """Precision and recall, which are made together."""
        from sample.evaluate.neighbours import precision_and_recall

        return precision_and_recall(self.reference.features, self.samples.features, device=self.device)

    @property
    def pixel_gaussians(self) -> tuple[Gaussian, Gaussian]:
        """The samples' and the reference's pixels along the reference's principal axes."""
        from sample.evaluate.pixels import project

        return (
            project(self.samples.fitted("pixels"), self.reference.pixel_axes),
            project(self.reference.fitted("pixels"), self.reference.pixel_axes),
        )

    @cached_property
    def pixel_shares_inside(self) -> tuple[float, float]:
        """Precision and recall of pixels along the reference's principal axes."""
        from sample.evaluate.neighbours import precision_and_recall

        theirs, ours = (
            np.concatenate([(block @ self.reference.pixel_axes).astype(np.float32) for block in side.blocks["pixels"]])
            for side in (self.reference, self.samples)
        )
        return precision_and_recall(theirs, ours, device=self.device)

    @cached_property
    def encoder_shares_inside(self) -> tuple[float, float]:
        """Precision and recall of an encoder's features."""
        from sample.evaluate.neighbours import precision_and_recall

        theirs, ours = (side.blocks["encoder"].rows() for side in (self.reference, self.samples))
        return precision_and_recall(theirs, ours, device=self.device)

    @property
    def logits(self) -> tuple[Iterable[NDArray[np.floating]], bool]:
        """The class scores, and whether they were shuffled: the splits of IS must not be single classes."""
        blocks = self.samples.blocks["logits_unbiased"]
        if self.samples.given.images is None or not self.samples.given.images.sorted_by_name:
            return blocks, False
        rows = blocks.rows()
        return [rows[Permutation(len(rows), 0, "inception-score-order")[np.arange(len(rows))]]], True


def compute_scores(metrics: Sequence[str], compared: Comparison) -> list[Score]:
    """The metrics' values in the given order; all arithmetic is in float64."""
    return [
        Score(
            name=count_name(
                metric, compared.samples.count(metric), compared.samples.given.recipe, encoder=compared.encoder
            ),
            **dataclasses.asdict(METRICS[metric].function(compared)),
        )
        for metric in metrics
    ]


def over_seeds(runs: Sequence[Sequence[Score]], *, first_seed: int) -> list[Score]:
    """Each metric's mean over runs that differ in their seed alone, its standard deviation, and every run's value."""
    if len(runs) == 1:
        return list(runs[0])
    scores = []
    for same in zip(*runs, strict=True):
        values = [score.value for score in same]
        seeds = {"seeds": list(range(first_seed, first_seed + len(runs))), "values": values}
        details = {**same[0].details, **seeds, "std": "over seeds"}
        scores.append(
            Score(
                name=same[0].name,
                value=float(np.mean(values)),
                std=float(np.std(values, ddof=1)),
                details=details,
            )
        )
    return scores
