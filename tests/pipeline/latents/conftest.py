"""Small stores to read, break and compare."""

import numpy as np
import pytest
import torch

from pipeline.latents import LatentSpec
from pipeline.latents.writer import StoreDescription, finish_store, write_shard
from pipeline.randomness import normal

ROWS = (7, 0, 5)  # samples per shard; one shard is empty
SHAPE = {"moments": (2, 8, 4, 4), "point": (1, 4, 4, 4)}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Sample:
    """The contents of a store, before they are written."""

    def __init__(self, kind="moments", dtype="float16", rows=ROWS):
        self.kind, self.dtype, self.rows = kind, dtype, rows
        shape = SHAPE[kind]
        self.shards = [normal((n, *shape), 7, "test store", i).to(DTYPES[dtype]) for i, n in enumerate(rows)]
        self.latents = torch.cat(self.shards)
        self.indices = (np.arange(sum(rows)) * 37) % 101
        self.labels = np.arange(sum(rows)) % 5 - 1
        self.keys = [f"class ü/{i} \n.png" for i in self.indices]
        self.skipped = [[(f"bad {i}", 'not "an" image')] if i != 1 else [] for i in range(len(rows))]
        self.starts = np.concatenate([[0], np.cumsum(rows)])

    def part(self, shard):
        return slice(self.starts[shard], self.starts[shard + 1])

    def describe(self, shard_format, **changes):
        views, values, height, width = SHAPE[self.kind]
        facts = {
            "split": "train",
            "shard_format": shard_format,
            "latent": LatentSpec(
                kind=self.kind,
                channels=values // 2 if self.kind == "moments" else values,
                height=height,
                width=width,
                dtype=self.dtype,
                downsample=8,
            ),
            "views": ["center", "center-hflip"][:views],
            "image": {"size": 32, "crop": "adm-center"},
            "vae": {
                "name": "demo",
                "class": "AutoencoderKL",
                "sha256": "0" * 64,
                "scaling_factor": 0.5,
                "shift_factor": None,
            },
            "classes": ["tench", "crane", "pot", "cup"],
            "class_ids": ["n01", "n02", "n03", "n04"],
            "seed": 3,
            "plan": "a plan",
        }
        return StoreDescription(**{**facts, **changes})

    def write_shard(self, folder, shard_format, shard, **changes):
        rows = self.part(shard)
        facts = {"kind": self.kind, "skipped": self.skipped[shard], "plan": "a plan", **changes}
        return write_shard(
            folder,
            "train",
            shard,
            shard_format,
            self.shards[shard],
            self.labels[rows],
            self.indices[rows],
            self.keys[rows],
            **facts,
        )

    def write(self, folder, shard_format, order=None):
        folder.mkdir(parents=True, exist_ok=True)
        for shard in range(len(self.rows)) if order is None else order:
            self.write_shard(folder, shard_format, shard)
        finish_store(folder, self.describe(shard_format), shards=len(self.rows))
        return folder


@pytest.fixture(scope="session")
def sample():
    return Sample()


@pytest.fixture(scope="session")
def new_sample():
    return Sample


@pytest.fixture(scope="session", params=["safetensors", "webdataset"])
def shard_format(request):
    return request.param


@pytest.fixture(scope="session")
def whole_store(sample, shard_format, tmp_path_factory):
    """A finished store that no test changes."""
    return sample.write(tmp_path_factory.mktemp("store") / shard_format, shard_format)


@pytest.fixture
def own_store(sample, shard_format, tmp_path):
    """A finished store that the test may break."""
    return sample.write(tmp_path / "store", shard_format)


def contents(folder):
    """Every file's bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def bytes_of():
    return contents
