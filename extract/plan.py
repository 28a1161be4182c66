"""Which inputs make which shard: a pure function of the number of inputs, the seed and the flags.

No process needs to ask another one what to do: any of them can make any shard, and all would make the same bytes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.randomness import Permutation


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Inputs in an order shuffled by the seed, cut into shards; a sequential reader so sees mixed classes."""

    inputs: int
    """Inputs in the sorted listing."""
    seed: int
    samples_per_shard: int
    limit: int | None = None
    """Only the first of the shuffled inputs."""

    @property
    def samples(self) -> int:
        """Inputs that will be tried."""
        return self.inputs if self.limit is None else min(self.limit, self.inputs)

    @property
    def shards(self) -> int:
        return -(-self.samples // self.samples_per_shard)

    def rows(self, shard: int) -> NDArray[np.int64]:
        """The inputs of one shard, in stored order, as positions in the sorted listing.

        Row r of shard s is permutation_seed(s · samples_per_shard + r).

        Raises:
            IndexError: there is no such shard.
        """
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} is not one of {self.shards}")
        first = shard * self.samples_per_shard
        return self.first(min(self.samples, first + self.samples_per_shard), start=first)

    def first(self, end: int, *, start: int = 0) -> NDArray[np.int64]:
        """The inputs at the positions `start` … `end` − 1 of the shuffled order."""
        return Permutation(self.inputs, self.seed, "extract-order")[np.arange(start, end, dtype=np.int64)]
