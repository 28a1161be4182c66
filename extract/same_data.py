"""Whether an extraction goes on with what it was begun with: the same settings, and a few inputs' bytes as recorded."""

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from extract.inputs import Loader
from extract.plan import Plan
from extract.sources.listing import UnreadableInputError
from pipeline.latents.records import ShardRecord
from pipeline.randomness import Permutation
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import Passed, typed

LANE, AS_SERVED = "batch-size", "data (by size, ETag and time on the server)"
"""Settings that are compared only where both the store and this command have them."""
_CHECKED_SHARDS, _CHECKED_INPUTS = 8, 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Begun(Passed):
    """The settings that a store was begun with, by flag: settings.json. All are compared, one is asked for."""

    split: str | None = None


def begun(value: Any, place: object) -> Begun:
    """What settings.json there says.

    Raises:
        UserError: it is no object, or its split no text.
    """
    return typed(value, Begun, f"{place} is damaged", advice="restore it, or remove it and use --overwrite")


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting that was another one."""
    return [
        f"--{key} {_short(recorded.get(key))} there, {_short(wanted[key])} now"
        for key in wanted
        if recorded.get(key) != wanted[key] and (key in recorded or key not in (LANE, AS_SERVED))
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text if len(text) <= 60 else f"{text[:57]}…"


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
