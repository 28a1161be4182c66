"""Which weights of a network are matrices that map tokens to tokens, and where several of them lie in one tensor.

An optimizer that moves whole matrices (Muon) takes those of the blocks' attention and MLP. Embeddings, modulation and
the final layer are none of them: they read or write something else than tokens.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping

from pipeline.dit.config import DiTConfig
from pipeline.dit.model import on_meta

_PARTS = {
    "attn.qkv": 3,
    "attn.proj": 1,
    "cross_attn.q": 1,
    "cross_attn.kv": 2,
    "cross_attn.proj": 1,
    "mlp.fc1": 1,
    "mlp.fc2": 1,
}
"""Matrices that lie one below the other in a layer's weight. A gated MLP's fc1 is gate and value: see below."""
_BLOCK_WEIGHT = re.compile(r"((?:head\.)?blocks\.\d+\.)(.+)\.weight")


def logical_matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """{name: number of matrices in it, of equal rows} of the weights that are matrices, in the order given.

    Args:
        shapes: whole shapes of all parameters, by name. Where fc1 has twice the rows that fc2 has columns, it is a
            gated MLP's, whose two products are two matrices.
    """
    found = {}
    for name, shape in shapes.items():
        match = _BLOCK_WEIGHT.fullmatch(name)
        if match is None or match[2] not in _PARTS:
            continue
        found[name] = _PARTS[match[2]]
        if match[2] == "mlp.fc1":
            found[name] = shape[0] // shapes[f"{match[1]}mlp.fc2.weight"][1]
    return found


def count_in_matrices(config: DiTConfig) -> int:
    """How many of a network's parameters lie in such matrices."""
    return sum(_counts_by_shape(config).values())


def most_of_a_shape(config: DiTConfig) -> int:
    """How many parameters the matrices of one shape have at most, which are computed together."""
    return max(_counts_by_shape(config).values())


def _counts_by_shape(config: DiTConfig) -> Counter[tuple[tuple[int, ...], int]]:
    shapes = {name: tuple(parameter.shape) for name, parameter in on_meta(config).named_parameters()}
    counts: Counter[tuple[tuple[int, ...], int]] = Counter()
    for name, parts in logical_matrices(shapes).items():
        counts[shapes[name], parts] += math.prod(shapes[name])
    return counts
