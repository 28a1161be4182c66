"""Every draw as a function of (seed, purpose, numbers), never of a generator's history.

Resuming, another number of processes, another batch size: none of them changes a draw, because a draw
depends on nothing but its key. Purposes keep streams apart, so that run 1's data order is not run 0's noise.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

_ROUNDS = 6
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed that depends on every part of the key; the same for ever on every machine."""
    key = "\x1f".join([str(int(seed)), purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *numbers: int, device: str = "cpu") -> "torch.Generator":
    """A fresh generator for one key. CPU and CUDA generators give different streams for the same key."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, *numbers))


def normal(shape: tuple[int, ...], seed: int, purpose: str, *numbers: int) -> "torch.Tensor":
    """Standard normals, float32 on the CPU, that depend on the key alone."""
    import torch

    return torch.randn(shape, generator=generator(seed, purpose, *numbers), device="cpu")  # whatever the default is


class Permutation:
    """A keyed random order of 0 … length−1 in constant memory: `permutation[positions]` gives the indices.

    A Feistel network over the smallest even number of bits that holds `length`, walked along its cycle until
    the value falls inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"); the round function
    is the finaliser of splitmix64. So a position deep in an epoch costs no more than the first one, and
    100 million samples cost no more memory than ten.
    """

    def __init__(self, length: int, seed: int, purpose: str, *numbers: int) -> None:
        if length < 0:
            raise ValueError(f"length={length} must not be negative")
        self.length = length
        self._half_bits = np.uint64(max(1, (max(length - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._keys = [np.uint64(derive_seed(seed, purpose, *numbers, round_)) for round_ in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices at the given positions, int64, same shape.

        Raises:
            IndexError: a position is outside 0 … length−1.
        """
        return self._walk(positions, self._encrypt)

    def inverse(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions at which the given indices stand, int64, same shape."""
        return self._walk(indices, self._decrypt)

    def _walk(self, values: NDArray[np.int64], step: "_Step") -> NDArray[np.int64]:
        values = np.asarray(values, dtype=np.int64)
        if values.size and (values.min() < 0 or values.max() >= self.length):
            raise IndexError(f"positions must lie in 0 … {self.length - 1}")
        result = step(values.astype(np.uint64).ravel())
        outside = np.flatnonzero(result >= self.length)
        while outside.size:
            result[outside] = step(result[outside])
            outside = outside[result[outside] >= self.length]
        return result.astype(np.int64).reshape(values.shape)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right, key) & self._mask)
        return (left << self._half_bits) | right

    def _decrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in reversed(self._keys):
            left, right = right ^ (_mix(left, key) & self._mask), left
        return (left << self._half_bits) | right


if TYPE_CHECKING:
    from collections.abc import Callable

    _Step = Callable[[NDArray[np.uint64]], NDArray[np.uint64]]


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """splitmix64's finaliser of value + key; multiplication wraps modulo 2^64 by design."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))
