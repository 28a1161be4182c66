"""The two shard formats by name; both modules have the same verbs."""

from types import ModuleType

from pipeline.latents import safetensors_shards, webdataset_shards
from pipeline.latents.manifest import DTYPE_BYTES, LatentSpec
from pipeline.latents.shards import RowType

FORMATS: dict[str, ModuleType] = {"safetensors": safetensors_shards, "webdataset": webdataset_shards}


def shard_name(split: str, shard: int, shard_format: str) -> str:
    """The file name of a shard, as `train-00000.safetensors`."""
    return f"{split}-{shard:05d}{FORMATS[shard_format].SUFFIX}"


def record_name(split: str, shard: int) -> str:
    """The file name of a shard's commit record, as `train-00000.json`."""
    return f"{split}-{shard:05d}.json"


def row_type(latent: LatentSpec, views: int) -> RowType:
    """What is stored per sample."""
    return row_type_of(latent.tensor, latent.dtype, latent.row_shape(views))


def row_type_of(tensor: str, dtype: str, shape: tuple[int, int, int, int]) -> RowType:
    """What is stored per sample, from the tensor's name, type and shape without the first axis."""
    views, values, height, width = shape
    return RowType(tensor=tensor, dtype=dtype, shape=shape, bytes=views * values * height * width * DTYPE_BYTES[dtype])
