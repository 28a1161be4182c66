"""Improved precision and recall: is a feature vector inside the other set's manifold of nearest-neighbour balls?

Kynkäänniemi et al. 2019, arXiv 1904.06991, as ADM computes it: 3 neighbours, every vector of both sets used.
Distances are float64 and made in tiles, so memory does not grow with the number of images.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sample.evaluate.metrics import NEIGHBOURS

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


def _share_inside(rows: Tensor, centers: Tensor, squared_reach: Tensor, tile_rows: int, device: str) -> float:
    """The share of rows that lie in at least one center's ball."""
    inside = 0
    for _, tile in _tiles(rows, tile_rows, device):
        found = torch.zeros(len(tile), dtype=torch.bool, device=device)
        for at, center_tile in _tiles(centers, tile_rows, device):
            reach = squared_reach[at : at + len(center_tile)]
            found |= (_squared_distances(tile, center_tile) <= reach).any(dim=1)
        inside += int(found.sum())
    return inside / len(rows)


def _tiles(rows: Tensor, size: int, device: str) -> Iterator[tuple[int, Tensor]]:
    """Give (position of the first row, rows in float64 on the device), tile after tile."""
    for at in range(0, len(rows), size):
        yield at, rows[at : at + size].to(device, torch.float64)
