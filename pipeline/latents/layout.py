"""Where things stand inside a shard: every sample takes the same number of bytes, so offsets are products."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RowType:
    """What a shard stores per sample beside its label and index."""

    tensor: str
    """`moments` or `latent`."""
    dtype: str
    """`float16`, `bfloat16` or `float32`."""
    shape: tuple[int, int, int, int]
    """[views, values, height, width]."""
    bytes: int
    """Bytes of one sample's tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A field of every sample: row r's begins at byte start + r · stride and takes `bytes`."""

    start: int
    stride: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The columns of one shard."""

    latents: Column
    labels: Column
    indices: Column

    def row_at(self, offset: int) -> int:
        """The sample that a byte of the latents belongs to; of any byte, where samples lie whole one after another."""
        first = self.indices if self.indices.stride == self.latents.stride else self.latents
        return max(0, (offset - first.start) // max(1, first.stride))
