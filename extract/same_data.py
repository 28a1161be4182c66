"""Whether the data is still what the shards that are there were made from, without reading all of it.

Keys, labels and settings may agree while the images are others: another set under the same file names, a table whose
keys are only row numbers. Commit records hold the checksum of every input, so a few are read again and compared.
"""

import zlib
from pathlib import Path

import numpy as np

from extract.output import OutputFolder
from extract.pixels import Loader
from extract.plan import Plan
from extract.sources.listing import UnreadableInputError
from pipeline.errors import UserError
from pipeline.latents.records import read_record
from pipeline.randomness import Permutation

_SHARDS, _INPUTS = 8, 8


def check_same_data(output: OutputFolder, plan: Plan, loader: Loader) -> None:
    """Nothing, if a few inputs, of a few of the shards that are there, still have the bytes they had.

    Raises:
        UserError: one has other bytes, or is gone.
    """
    done = output.done(range(plan.shards))
    for shard in _few(done, _SHARDS):
        record = read_record(output.path, output.split, shard)
        if record is None or not record.input_crc32:
            continue
        left_out = {key for key, _ in record.skipped}
        kept = [int(index) for index in plan.rows(shard) if loader.key(int(index)) not in left_out]
        known = dict(zip(kept, record.input_crc32, strict=False))
        for index in _few(kept, _INPUTS):
            if _checksum(loader, index) != known.get(index):
                raise UserError(_changed(output.path, loader.key(index)))


def _few(numbers: list[int], count: int) -> list[int]:
    """Some of the numbers, always the same ones."""
    chosen = Permutation(len(numbers), 0, "check of inputs")[np.arange(min(count, len(numbers)), dtype=np.int64)]
    return [numbers[k] for k in chosen.tolist()]


def _checksum(loader: Loader, index: int) -> int | None:
    try:
        return zlib.crc32(loader.source.read(loader.listing, index))
    except UnreadableInputError:
        return None


def _changed(out: Path, key: str) -> str:
    return (
        f"{out} was begun with other data: {key} is not the image that its latent was made from; give the data that it "
        f"was begun with, name another --out, or start anew with --overwrite"
    )
