"""Which metrics two inputs allow, and their values under names that carry the number of images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.randomness import Permutation
from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError
from sample.evaluate.features import Blocks
from sample.evaluate.inception import FeatureName
from sample.evaluate.inputs import Input
from sample.evaluate.metrics import (
    NEIGHBOURS,
    Gaussian,
    fit_gaussian,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_and_recall,
)

FEWEST_FOR_FID = 2048
FEW_FOR_FID = 10_000
FEWEST = {
    "fid": FEWEST_FOR_FID,
    "sfid": FEWEST_FOR_FID,
    "precision": NEIGHBOURS + 1,
    "recall": NEIGHBOURS + 1,
    "kid": 2,
}
GAUSSIAN_OF: dict[str, FeatureName] = {"fid": "features_2048", "sfid": "spatial"}
TITLES = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "Precision", "recall": "Recall", "kid": "KID"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One number of the result."""

    name: str
    """The metric and how many images were judged: FID-50k."""
    value: float
    std: float | None = None
    """Standard deviation over splits or subsets, where the metric has them."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else its definition depends on."""


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
        if statistics is None or metric == "is":
            return False
        return statistics.has_gaussian(GAUSSIAN_OF[metric]) if metric in GAUSSIAN_OF else statistics.has_features

    def needs(self, metric: str) -> FeatureName | None:
        """The feature that has to be made from images for the metric, if any."""
        if self.from_file(metric):
            return None
        return "logits_unbiased" if metric == "is" else GAUSSIAN_OF.get(metric, "features_2048")

    def lacks(self, metric: str) -> str | None:
        """What is missing for the metric, as words, if anything is."""
        if self.given.images is not None or self.from_file(metric):
            return None
        arrays = {"fid": "mu and sigma", "sfid": "mu_s and sigma_s", "is": "images"}
        return arrays.get(metric, "images or the features of --reference-features")

    def count(self, metric: str) -> int | None:
        """How many images the metric sees on this side; None where a file of statistics does not say."""
        if self.from_file(metric) and self.given.statistics is not None:
            return self.given.statistics.count
        return None if self.given.images is None else self.given.images.count

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
    def features(self) -> NDArray[np.floating]:
        """The pooled features of every image."""
        statistics = self.given.statistics
        if statistics is not None and statistics.has_features:
            return statistics.features()
        return self.blocks["features_2048"].rows()


def count_name(metric: str, count: int | None) -> str:
    """The metric's name with its count: FID-50k, FID-2500; FID alone where the count is not known."""
    if count is None:
        return TITLES[metric]
    return f"{TITLES[metric]}-{f'{count // 1000}k' if count % 1000 == 0 else count}"


def settle_metrics(wanted: Sequence[str], samples: Side, reference: Side | None, *, asked: bool) -> tuple[str, ...]:
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
        sides = [samples] if metric == "is" or reference is None else [samples, reference]
        lacking = [f"{lack}, which {side.label} does not hold" for side in sides if (lack := side.lacks(metric))]
        if lacking and (asked or metric == "fid"):
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
    fewest = FEWEST.get(metric, 1)
    counts = {side.label: side.count(metric) for side in sides}
    short = [f"{label} has {count}" for label, count in counts.items() if count is not None and count < fewest]
    if not short:
        return None
    advice = (
        "a covariance of so few means nothing: give more images, or use --metrics kid"
        if metric in GAUSSIAN_OF
        else "give more images"
    )
    return f"at least {fewest} images are needed, but {' and '.join(short)}; {advice}"


def warn_of_few(metrics: Sequence[str], samples: Side, reference: Side) -> None:
    """Warn where FID is dominated by its bias from small samples."""
    for metric in (metric for metric in metrics if metric in GAUSSIAN_OF):
        for side in (samples, reference):
            count = side.count(metric)
            if count is not None and count < FEW_FOR_FID:
                warn(
                    f"{TITLES[metric]} is biased upwards with few images, and {side.label} has {count}, fewer than "
                    f"{FEW_FOR_FID}: compare it only with numbers from as many images, or use kid"
                )


def _score_inception(name: str, samples: Side) -> Score:
    """The Inception Score; its splits must not be single classes, so a folder's images are shuffled first."""
    logits: Iterable[NDArray[np.floating]] = samples.blocks["logits_unbiased"]
    shuffled = samples.given.images is not None and samples.given.images.sorted_by_name
    if shuffled:
        rows = samples.blocks["logits_unbiased"].rows()
        logits = [rows[Permutation(len(rows), 0, "inception-score-order")[np.arange(len(rows))]]]
    spread = inception_score(logits)
    details = {
        "splits": spread.parts,
        "split_size": spread.part_size,
        "order": "shuffled" if shuffled else "as given",
        "logits": "without bias",
    }
    return Score(name=name, value=spread.mean, std=spread.std, details=details)


def compute_scores(
    metrics: Sequence[str],
    samples: Side,
    reference: Side | None,
    *,
    seed: int,
    kid_subsets: int,
    kid_subset_size: int,
    device: str,
) -> list[Score]:
    """The metrics' values in the given order; all arithmetic is in float64."""
    scores: list[Score] = []
    shares: tuple[float, float] | None = None
    for metric in metrics:
        name = count_name(metric, samples.count(metric))
        if metric == "is":
            scores.append(_score_inception(name, samples))
            continue
        assert reference is not None, "settled: only the Inception Score does without a reference"
        if metric in GAUSSIAN_OF:
            feature = GAUSSIAN_OF[metric]
            value = frechet_distance(samples.gaussian(feature), reference.gaussian(feature))
            scores.append(Score(name=name, value=value, details={"features": feature, "covariance": "unbiased"}))
        elif metric == "kid":
            spread = kernel_distance(
                samples.features, reference.features, seed=seed, subsets=kid_subsets, subset_size=kid_subset_size
            )
            details = {
                "subsets": spread.parts,
                "subset_size": spread.part_size,
                "kernel": "(x·y / 2048 + 1)^3",
                "seed": seed,
            }
            scores.append(Score(name=name, value=spread.mean, std=spread.std, details=details))
        else:
            shares = shares or precision_and_recall(reference.features, samples.features, device=device)
            value = shares[0] if metric == "precision" else shares[1]
            scores.append(Score(name=name, value=value, details={"neighbours": NEIGHBOURS}))
    return scores
