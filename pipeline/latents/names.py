"""Names in a store's folder: the manifest, and of every shard its file and its commit record. Free of torch.

`FORMATS` is the one list of shard formats: a new one is a row here and a file `NAME_shards.py` beside this one, with
the verbs of the two that are there (`pieces`, `read_layout`, `decode_integers`; `dataset_card` where `datasets` reads
it).
"""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pipeline.runtime.remote_files import UrlFolder, is_url

MANIFEST_FILE = "manifest.json"
SKIPPED_FILE = "skipped.jsonl"
CARD_FILE = "README.md"
WORK_FOLDER = ".work"
RECORD_SUFFIX = ".json"
FEATURES_FOLDER = "features"
"""Within a store: an encoder's features of the same samples, with a manifest, shards and records of their own."""
PCA_FILE = "pca.safetensors"
"""Among them: the directions that features were reduced to."""
STORE_FORMAT, FEATURES_FORMAT = "dit-latents", "dit-features"
FeatureDtype = Literal["float16", "int8"]
FORMATS = {"safetensors": ".safetensors", "webdataset": ".tar"}
"""Shard formats by name, each with the suffix of its files."""

if TYPE_CHECKING:
    ShardFormat = str
else:
    ShardFormat = Literal[tuple(FORMATS)]

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Numbered(NamedTuple):
    """What the name of a shard or of a record says."""

    split: str
    shard: int
    is_record: bool


def format_of(name: str) -> ModuleType:
    """The file that writes and reads shards of a format; it is imported when it is needed."""
    return importlib.import_module(f"pipeline.latents.{name}_shards")


def shard_name(split: str, shard: int, shard_format: str) -> str:
    """The file name of a shard, as `train-00000.safetensors`."""
    return f"{split}-{shard:05d}{FORMATS[shard_format]}"


def record_name(split: str, shard: int) -> str:
    """The file name of a shard's commit record, as `train-00000.json`."""
    return f"{split}-{shard:05d}{RECORD_SUFFIX}"


def record_of(shard_file: str) -> str:
    """The file name of the record that belongs to a shard's file."""
    return str(Path(shard_file).with_suffix(RECORD_SUFFIX))


def parse_name(name: str) -> Numbered | None:
    """What a file's name says, or None if it is none of a shard or a record."""
    suffixes = "|".join(re.escape(suffix) for suffix in (*FORMATS.values(), RECORD_SUFFIX))
    match = re.fullmatch(rf"({_PLAIN_NAME.pattern})-(\d{{5}}|[1-9]\d{{5,}})({suffixes})", name)
    return match and Numbered(match[1], int(match[2]), match[3] == RECORD_SUFFIX)


def recorded_shards(names: Iterable[str], split: str) -> set[int]:
    """The shards of a split whose records are among the names."""
    found = (parse_name(name) for name in names if name.startswith(f"{split}-"))
    return {one.shard for one in found if one and one.split == split and one.is_record}


def is_plain_name(name: Any) -> bool:
    """Whether a name stays inside its folder on every system: no separator, no leading dot."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def is_store(path: str) -> bool:
    """Whether a path is, or was going to be, a latent store: it has a manifest, or shards with their records.

    Behind a URL everything is one that is no run and no checkpoint, which have settings.
    """
    if is_url(path):
        far = UrlFolder(path)
        return far.read("config.json") is None and far.read("config.yaml") is None
    folder = Path(path.removeprefix("file://"))
    return (folder / MANIFEST_FILE).exists() or any(folder.glob(f"*-[0-9][0-9][0-9][0-9][0-9]{RECORD_SUFFIX}"))
