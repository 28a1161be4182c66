"""Improved precision and recall: is a feature vector inside the other set's manifold of nearest-neighbour balls?

Kynkäänniemi et al. 2019, arXiv 1904.06991, as ADM computes it: 3 neighbours, every vector of both sets used.
Distances are float64 and made in tiles, so memory does not grow with the number of images.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.randomness import generator

NEIGHBOURS = 3
TILE_ROWS = 4096
# Squared distances below this share of the vectors' squared lengths are what rounding leaves of equal vectors.
RESOLUTION = 1e-12


def precision_and_recall(
    reference: NDArray[np.floating],
    samples: NDArray[np.floating],
    *,
    neighbours: int = NEIGHBOURS,
    tile_rows: int = TILE_ROWS,
    device: str = "cpu",
) -> tuple[float, float]:
    """(share of samples inside the reference's manifold, share of references inside the samples' manifold).

    A set's manifold is the union of balls around its vectors, each reaching to its vector's k-th nearest
    neighbour in the set.

    Raises:
        ValueError: a set has no more vectors than neighbours.
    """
    ours, theirs = (torch.from_numpy(np.ascontiguousarray(rows)) for rows in (samples, reference))
    for rows in (ours, theirs):
        if len(rows) <= neighbours:
            raise ValueError(f"{neighbours} nearest neighbours need more than {len(rows)} vectors")
    reach_of_ours = _squared_reach(ours, neighbours, tile_rows, device)
    reach_of_theirs = _squared_reach(theirs, neighbours, tile_rows, device)
    precision = _share_inside(ours, theirs, reach_of_theirs, tile_rows, device)
    recall = _share_inside(theirs, ours, reach_of_ours, tile_rows, device)
    return precision, recall


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """‖r‖² + ‖c‖² − 2 r·c for every pair, equal vectors at exactly zero."""
    scale = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)[None, :]
    distances = torch.addmm(scale, rows, columns.T, alpha=-2)
    return distances.masked_fill_(distances < RESOLUTION * scale, 0.0)


def _squared_reach(rows: Tensor, neighbours: int, tile_rows: int, device: str) -> Tensor:
    """Each row's squared distance to its k-th nearest other row [n], float64 on the device."""
    reaches = []
    for at, tile in _tiles(rows, tile_rows, device):
        nearest = torch.full((len(tile), neighbours), torch.inf, dtype=torch.float64, device=device)
        for other_at, other in _tiles(rows, tile_rows, device):
            distances = _squared_distances(tile, other)
            if at == other_at:
                distances.fill_diagonal_(torch.inf)
            candidates = torch.cat([nearest, distances], dim=1)
            nearest = candidates.topk(neighbours, dim=1, largest=False).values
        reaches.append(nearest.max(dim=1).values)
    return torch.cat(reaches)


def _share_inside(rows: Tensor, centres: Tensor, squared_reach: Tensor, tile_rows: int, device: str) -> float:
    """The share of rows that lie in at least one centre's ball."""
    inside = 0
    for _, tile in _tiles(rows, tile_rows, device):
        found = torch.zeros(len(tile), dtype=torch.bool, device=device)
        for at, centre_tile in _tiles(centres, tile_rows, device):
            reach = squared_reach[at : at + len(centre_tile)]
            found |= (_squared_distances(tile, centre_tile) <= reach).any(dim=1)
        inside += int(found.sum())
    return inside / len(rows)


def _tiles(rows: Tensor, size: int, device: str) -> Iterator[tuple[int, Tensor]]:
    """Give (position of the first row, rows in float64 on the device), tile after tile."""
    for at in range(0, len(rows), size):
        yield at, rows[at : at + size].to(device, torch.float64)


Rows = NDArray[np.floating]
"""Features [n, width]."""

INCEPTION_SCORE_SPLIT = 5_000
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1_000


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
        centred = block.astype(np.float64) - mean
        scatter += centred.T @ centred
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
    triangle, pivots, rank, info = scipy.linalg.lapack.dpstrf(covariance, lower=1)
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
