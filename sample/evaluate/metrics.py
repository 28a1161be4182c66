"""The metrics, one row of METRICS each, and their arithmetic on features; all sums are float64.

The table loads without torch, so that the command's options can ask it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sample.evaluate.scoring import Comparison
else:
    Comparison = object

FeatureName = Literal[
    "features_768", "features_2048", "spatial", "logits_unbiased", "logits", "pixels", "encoder", "embedding"
]
"""What is made of an image: the FID network's pooled features, a map's first channels, class scores; its pixels; an
encoder's class token, CLIP's embedding; `logits` are also those of an encoder's classifier."""

FeatureKind = Literal["inception", "pixels", "encoder"]
"""Where features come from: the FID network, small pixels, which need no weights, or a vision encoder of the user's."""


def feature_kind(features: str) -> FeatureKind:
    """Of which kind a --features is: its name, or the name of an encoder."""
    return "inception" if features == "inception" else "pixels" if features == "pixels" else "encoder"


Rows = NDArray[np.floating]
"""Features [n, width]."""

NEIGHBOURS = 3
FEWEST_FOR_FID = 2048
INCEPTION_SCORE_SPLIT = 5_000
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1_000
CMMD_WIDTH, CMMD_ROWS = 10.0, 1_000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gaussian:
    """Mean [width] and unbiased covariance [width, width] of a set of features."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A mean over parts of the data, and the standard deviation over those parts."""

    mean: float
    std: float
    parts: int
    part_size: int


def fit_gaussian(blocks: Iterable[Rows]) -> Gaussian:
    """The Gaussian of a set of features: mean, and Σ (x − mean)(x − mean)ᵀ / (n − 1).

    Two passes over the blocks, the mean first: the one-pass formula Σ x xᵀ − n·mean·meanᵀ loses digits where
    the mean is large beside the spread.

    Raises:
        ValueError: fewer than two rows.
    """
    count, total = 0, np.float64(0)
    for block in blocks:
        count += len(block)
        total = total + block.sum(axis=0, dtype=np.float64)
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 rows, not {count}")
    mean = np.asarray(total / count, dtype=np.float64)
    scatter = np.zeros((len(mean), len(mean)))
    for block in blocks:
        centered = block.astype(np.float64) - mean
        scatter += centered.T @ centered
    return Gaussian(mean=mean, covariance=scatter / (count - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """‖m₁ − m₂‖² + Tr(S₁ + S₂ − 2 (S₁ S₂)^½), the squared Fréchet distance of two Gaussians (Dowson & Landau 1982).

    With S₁ = F₁ F₁ᵀ and S₂ = F₂ F₂ᵀ, Tr (S₁ S₂)^½ is the sum of the singular values of F₁ᵀ F₂. Unlike the square root
    of the product, which is not symmetric, this is real for every pair of covariances, singular ones too, and rounding
    errors stay errors instead of becoming their square roots.
    """
    difference = first.mean - second.mean
    cross = np.linalg.svd(_factor(first.covariance).T @ _factor(second.covariance), compute_uv=False)
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross.sum()
    return max(0.0, float(difference @ difference + spread))


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """F [width, rank] with F Fᵀ = S to rounding, by Cholesky's method with pivots, which ends at the rank."""
    from scipy import linalg

    triangle, pivots, rank, info = linalg.lapack.dpstrf(covariance, lower=1)
    assert info >= 0, f"LAPACK's dpstrf refuses its argument {-info}"
    factor = np.empty((len(covariance), rank))
    factor[pivots - 1] = np.tril(triangle)[:, :rank]
    return factor


def inception_score(logits: Iterable[Rows], *, split_size: int = INCEPTION_SCORE_SPLIT) -> Spread:
    """Exp E[KL(p(y|x) ‖ p(y))], mean and standard deviation over splits in the given order (Salimans et al. 2016).

    The splits have 5,000 images as in ADM; a last, shorter split counts like the others, as there.
    """
    scores = [_score_of_split(split) for split in _splits(logits, split_size)]
    return Spread(mean=float(np.mean(scores)), std=float(np.std(scores)), parts=len(scores), part_size=split_size)


def _splits(blocks: Iterable[Rows], size: int) -> Iterable[Rows]:
    """Cut rows that come in blocks of any length into splits of `size` rows; the last may be shorter."""
    pending: list[Rows] = []
    waiting = 0
    for block in blocks:
        rest = block
        while waiting + len(rest) >= size:
            taken = size - waiting
            yield np.concatenate([*pending, rest[:taken]])
            pending, waiting, rest = [], 0, rest[taken:]
        if len(rest):
            pending.append(rest)
            waiting += len(rest)
    if pending:
        yield np.concatenate(pending)


def _score_of_split(logits: Rows) -> float:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    # A class that underflows to zero for every image adds nothing: 0 · log 0 is 0 here.
    entropy_of_mean = -(marginal * np.log(np.where(marginal > 0, marginal, 1))).sum()
    mean_entropy = -(p * log_p).sum(axis=1).mean()
    return float(np.exp(entropy_of_mean - mean_entropy))


def kernel_distance(
    first: Rows, second: Rows, *, seed: int, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE
) -> Spread:
    """The unbiased squared MMD under the kernel (x·y / width + 1)³, over random subsets (Bińkowski et al. 2018).

    Unlike FID it has no bias from small samples, so it can be negative where the sets agree. Subsets are
    drawn without replacement, subset k from (seed, k); sets smaller than `subset_size` shrink it.
    """
    import torch

    from pipeline.randomness import generator

    size = min(subset_size, len(first), len(second))
    if size == len(first) == len(second):
        subsets = 1  # every subset would be the same
    estimates = []
    for k in range(subsets):
        draw = generator(seed, "kid-subset", k)
        ours = torch.randperm(len(first), generator=draw)[:size].numpy()
        theirs = torch.randperm(len(second), generator=draw)[:size].numpy()
        estimates.append(unbiased_mmd(first[ours], second[theirs]))
    return Spread(mean=float(np.mean(estimates)), std=float(np.std(estimates)), parts=subsets, part_size=size)


def unbiased_mmd(first: Rows, second: Rows) -> float:
    """The unbiased estimate of the squared MMD of two sets of at least two rows each, cubic polynomial kernel."""
    x, y = first.astype(np.float64), second.astype(np.float64)
    within = _mean_off_diagonal(_cubic_kernel(x, x)) + _mean_off_diagonal(_cubic_kernel(y, y))
    return float(within - 2 * _cubic_kernel(x, y).mean())


def _cubic_kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """(x·y / width + 1)³ of every pair of rows; products are some ten times quicker than NumPy's power."""
    base = x @ y.T / x.shape[1] + 1
    return base * base * base


def _mean_off_diagonal(kernel: NDArray[np.float64]) -> np.float64:
    n = len(kernel)
    return np.float64((kernel.sum() - np.trace(kernel)) / (n * (n - 1)))


def clip_mmd(first: Rows, second: Rows) -> float:
    """CMMD: 1000 times the squared MMD of embeddings under exp(−‖x − y‖² / 200), the biased estimate (all pairs).

    Jayasumana et al. 2024 (arXiv 2401.09603); in blocks of rows, so that no table of all pairs is held.
    """
    x, y = (rows.astype(np.float64) for rows in (first, second))
    return 1000 * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    lengths = (y * y).sum(1)
    total = 0.0
    for start in range(0, len(x), CMMD_ROWS):
        rows = x[start : start + CMMD_ROWS]
        distances = (rows * rows).sum(1)[:, None] + lengths - 2 * rows @ y.T
        total += np.exp(-distances / (2 * CMMD_WIDTH**2)).sum()
    return total / (len(x) * len(y))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a metric gives."""

    value: float
    std: float | None = None
    """Standard deviation over splits or subsets, where the metric has them."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else its definition depends on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSpec:
    """A metric: all that help, checks, plans and results know of it."""

    title: str
    """Its name in results, {encoder} in it for the encoder's; the number of images is added to it."""
    function: Callable[[Comparison], Outcome]
    features: FeatureName
    """What it needs of every image."""
    compares: bool = True
    """Whether it needs a reference."""
    of_gaussian: bool = False
    """Whether mean and covariance of the features are enough; they mean something from thousands of images on."""
    arrays: str = "images or the features of --reference-features"
    """What a file of statistics has to hold for it, as words."""
    fewest: int = 1
    """The fewest images on either side."""
    kind: FeatureKind = "inception"
    """The --features it is of."""
    standard: bool = True
    """Whether ADM's protocol has it: what is computed when nothing is asked for."""


def _frechet_of(feature: FeatureName) -> Callable[[Comparison], Outcome]:
    def compute(compared: Comparison) -> Outcome:
        value = frechet_distance(compared.samples.gaussian(feature), compared.reference.gaussian(feature))
        return Outcome(value=value, details={"features": feature, "covariance": "unbiased"})

    return compute


def _inception(compared: Comparison) -> Outcome:
    logits, shuffled = compared.logits
    spread = inception_score(logits)
    order = "shuffled" if shuffled else "as given"
    details = {"splits": spread.parts, "split_size": spread.part_size, "order": order, "logits": "without bias"}
    return Outcome(value=spread.mean, std=spread.std, details=details)


def _kernel(compared: Comparison) -> Outcome:
    ours, theirs, seed = compared.samples.features, compared.reference.features, compared.seed
    spread = kernel_distance(
        ours, theirs, seed=seed, subsets=compared.kid_subsets, subset_size=compared.kid_subset_size
    )
    sizes = {"subsets": spread.parts, "subset_size": spread.part_size}
    return Outcome(value=spread.mean, std=spread.std, details={**sizes, "kernel": "(x·y / 2048 + 1)^3", "seed": seed})


def _share(which: int) -> Callable[[Comparison], Outcome]:
    def compute(compared: Comparison) -> Outcome:
        return Outcome(value=compared.shares_inside[which], details={"neighbours": NEIGHBOURS})

    return compute


def _frechet_of_pixels(compared: Comparison) -> Outcome:
    first, second = compared.pixel_gaussians
    details = {"features": "pixels", "axes": len(first.mean), "covariance": "unbiased"}
    return Outcome(value=frechet_distance(first, second), details=details)


def _share_of_pixels(which: int) -> Callable[[Comparison], Outcome]:
    def compute(compared: Comparison) -> Outcome:
        return Outcome(
            value=compared.pixel_shares_inside[which], details={"features": "pixels", "neighbours": NEIGHBOURS}
        )

    return compute


def _pixel_metric(title: str, function: Callable[[Comparison], Outcome], fewest: int) -> MetricSpec:
    return MetricSpec(
        title=f"{title}-pixels", function=function, features="pixels", kind="pixels", arrays="images", fewest=fewest
    )


def _share_of_encoder(which: int) -> Callable[[Comparison], Outcome]:
    def compute(compared: Comparison) -> Outcome:
        return Outcome(value=compared.encoder_shares_inside[which], details={"neighbours": NEIGHBOURS})

    return compute


def _clip_mmd(compared: Comparison) -> Outcome:
    ours, theirs = (side.blocks["embedding"].rows() for side in (compared.samples, compared.reference))
    return Outcome(value=clip_mmd(ours, theirs), details={"kernel": "exp(-|x - y|^2 / 200)", "scale": 1000})


def _recognised(compared: Comparison) -> Outcome:
    scores = compared.samples.blocks["logits"].rows()
    right = scores.argmax(axis=1) == compared.samples.labels
    return Outcome(value=float(right.mean()), details={"classes": scores.shape[1]})


def _encoder_metric(title: str, function: Callable[[Comparison], Outcome], fewest: int, **about: Any) -> MetricSpec:
    about = {"features": "encoder", **about}
    return MetricSpec(title=title, function=function, kind="encoder", arrays="images", fewest=fewest, **about)


METRICS: dict[str, MetricSpec] = {
    "fid": MetricSpec(
        title="FID",
        function=_frechet_of("features_2048"),
        features="features_2048",
        of_gaussian=True,
        arrays="mu and sigma",
        fewest=FEWEST_FOR_FID,
    ),
    "sfid": MetricSpec(
        title="sFID",
        function=_frechet_of("spatial"),
        features="spatial",
        of_gaussian=True,
        arrays="mu_s and sigma_s",
        fewest=FEWEST_FOR_FID,
    ),
    "is": MetricSpec(title="IS", function=_inception, features="logits_unbiased", compares=False, arrays="images"),
    "precision": MetricSpec(title="Precision", function=_share(0), features="features_2048", fewest=NEIGHBOURS + 1),
    "recall": MetricSpec(title="Recall", function=_share(1), features="features_2048", fewest=NEIGHBOURS + 1),
    "kid": MetricSpec(title="KID", function=_kernel, features="features_2048", fewest=2, standard=False),
    "fd-pixels": _pixel_metric("FD", _frechet_of_pixels, 2),
    "precision-pixels": _pixel_metric("Precision", _share_of_pixels(0), NEIGHBOURS + 1),
    "recall-pixels": _pixel_metric("Recall", _share_of_pixels(1), NEIGHBOURS + 1),
    "fd-encoder": _encoder_metric("FD-{encoder}", _frechet_of("encoder"), 2),
    "precision-encoder": _encoder_metric("Precision-{encoder}", _share_of_encoder(0), NEIGHBOURS + 1),
    "recall-encoder": _encoder_metric("Recall-{encoder}", _share_of_encoder(1), NEIGHBOURS + 1),
    "cmmd": _encoder_metric("CMMD", _clip_mmd, 1, features="embedding", standard=False),
    "recognised": _encoder_metric(
        "Recognised-{encoder}", _recognised, 1, features="logits", compares=False, standard=False
    ),
}
"""By name, in the order in which they are reported."""

_STANDARD = [name for name, spec in METRICS.items() if spec.standard and spec.kind == "inception"]
METRICS_HELP = (
    f"Metrics of --features, separated by commas: {', '.join(METRICS)}. Default {','.join(_STANDARD)} on inception, "
    "all on pixels, those of its kind on an encoder (cmmd on CLIP alone; recognised where it is named), as far as a "
    "reference of statistics alone allows."
)
