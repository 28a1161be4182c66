"""Whether an extraction goes on with the data that it was begun with: a few inputs' bytes against the records."""

import zlib
from collections.abc import Iterable

import numpy as np

from extract.inputs import Loader
from extract.plan import Plan
from extract.sources.listing import UnreadableInputError
from extract.store_folder import OutputFolder
from pipeline.latents.records import ShardRecord, read_record
from pipeline.randomness import Permutation
from pipeline.runtime.errors import UserError

_CHECKED_SHARDS, _CHECKED_INPUTS = 8, 8


def check_same_data(output: OutputFolder, plan: Plan, loader: Loader) -> None:
    """Raise UserError unless a few inputs, of a few of the shards that are there, still have the bytes they had."""
    with output.unmoved():
        shards = shards_to_check(output.done(range(plan.shards)))
        records = [(shard, read_record(output.place, output.split, shard)) for shard in shards]
    check_inputs(records, plan, loader, output.path)


def shards_to_check(done: list[int]) -> list[int]:
    """Which of the shards that are there tell whether the data is the same."""
    return _few(done, _CHECKED_SHARDS)


def check_inputs(records: Iterable[tuple[int, ShardRecord | None]], plan: Plan, loader: Loader, place: object) -> None:
    """Raise UserError unless a few inputs of each of these shards still have the bytes that its record tells."""
    for shard, record in records:
        if record is None or not record.input_crc32:
            continue
        left_out = {key for key, _ in record.skipped}
        kept = [int(index) for index in plan.rows(shard) if loader.key(int(index)) not in left_out]
        known = dict(zip(kept, record.input_crc32, strict=False))
        for index in _few(kept, _CHECKED_INPUTS):
            if _checksum(loader, index) != known.get(index):
                raise UserError(_changed(place, loader.key(index)))


def _few(numbers: list[int], count: int) -> list[int]:
    """Some of the numbers, always the same ones."""
    chosen = Permutation(len(numbers), 0, "check of inputs")[np.arange(min(count, len(numbers)), dtype=np.int64)]
    return [numbers[k] for k in chosen.tolist()]


def _checksum(loader: Loader, index: int) -> int | None:
    try:
        return zlib.crc32(loader.source.read(loader.listing, index))
    except UnreadableInputError:
        return None


def _changed(out: object, key: str) -> str:
    return (
        f"{out} was begun with other data: {key} is not the image that its latent was made from; give the data that it "
        f"was begun with, name another --out, or start anew with --overwrite"
    )
