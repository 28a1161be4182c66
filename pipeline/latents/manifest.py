"""What a latent store holds: `manifest.json`, written last, so that a store without it is not finished."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from pipeline.latents.names import FORMATS, MANIFEST_FILE, STORE_FORMAT, WORK_FOLDER, ShardFormat, is_plain_name
from pipeline.recorded import LatentGrid, RecordedImage, RecordedVae
from pipeline.runtime.bounds import Seed
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_bytes
from pipeline.runtime.gate import (
    MOST_FAULTS,
    Count,
    Finite,
    NotNegative,
    Passed,
    Sha256,
    parse_json,
    read_regular,
    shortened,
    typed,
)

FORMAT = STORE_FORMAT
VERSION = 1
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
if TYPE_CHECKING:
    StoredType = str
else:
    StoredType = Literal[tuple(DTYPE_BYTES)]
_SEAL = "checksum"


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpec(LatentGrid):
    """What one latent of a store is."""

    dtype: StoredType

    @property
    def values(self) -> int:
        """Stored values per cell."""
        return self.channels * (2 if self.kind == "moments" else 1)

    @property
    def tensor(self) -> str:
        """The name of the tensor in a shard."""
        return "moments" if self.kind == "moments" else "latent"

    def row_shape(self, views: int) -> tuple[int, int, int, int]:
        """[views, values, height, width] of one sample."""
        return views, self.values, self.height, self.width

    def view_bytes(self) -> int:
        """Bytes of one view of one sample."""
        return self.values * self.height * self.width * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard as the manifest lists it."""

    file: str
    samples: Count
    bytes: Count
    sha256: Sha256


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics(Passed):
    """Of the sampled, unscaled latents, one number for each channel."""

    mean: tuple[Finite, ...]
    std: tuple[NotNegative, ...]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Manifest(Passed):
    """What a store says of itself."""

    shard_format: ShardFormat
    split: str
    samples: Count
    skipped: Count
    classes: tuple[str, ...]
    """Readable names, index = label; empty for unlabelled data."""
    class_ids: tuple[str, ...]
    """Folder names or synsets, in the order of `classes`."""
    image: RecordedImage
    views: Annotated[tuple[str, ...], Meta(min_length=1)]
    latent: LatentSpec
    vae: RecordedVae
    statistics: Statistics
    seed: Seed
    shards: tuple[ShardEntry, ...]
    plan: str = ""
    """The plan that every record must name."""
    extraction: dict[str, Any] = field(default_factory=dict)
    """The flags of the extraction that made it."""

    def __post_init__(self) -> None:
        channels, names = self.latent.channels, [shard.file for shard in self.shards]
        suffix, total = FORMATS[self.shard_format], sum(shard.samples for shard in self.shards)
        faults = [
            f"shards[{number}].file is {shortened(name)}, which is no plain file name of a shard"
            for number, name in enumerate(names)
            if not is_plain_name(name) or not name.endswith(suffix)
        ]
        faults += [f"the shard {name} is listed twice" for name, count in Counter(names).items() if count > 1]
        if self.classes and self.class_ids and len(self.classes) != len(self.class_ids):
            faults.append(f"there are {len(self.classes)} classes and {len(self.class_ids)} class_ids")
        if total != self.samples:
            faults.append(f"samples is {self.samples}, but the shards have {total}")
        faults += [
            f"{name} is {shortened(list(values))}, but must be {channels} numbers, one for each channel"
            for name, values in (
                ("statistics.mean", self.statistics.mean),
                ("statistics.std", self.statistics.std),
                *self.vae.factors_by_channel(),
            )
            if len(values) != channels
        ]
        if faults:
            raise ValueError("; ".join(faults[:MOST_FAULTS]))

    def __repr__(self) -> str:
        latent = self.latent
        shape = f"{latent.channels}×{latent.height}×{latent.width}"
        return f"Manifest({self.samples} samples, {len(self.shards)} shards, {shape} {latent.kind})"

    def to_bytes(self) -> bytes:
        """The file: the same values give the same bytes."""
        return sealed(self)


def make_manifest(values: Mapping[str, Any], *, origin: str = MANIFEST_FILE) -> Manifest:
    """The manifest of these values, checked.

    Raises:
        UserError: an unknown format or version, or values that are missing or make no sense; names all of them.
    """
    if values.get("format") != FORMAT:
        raise UserError(f"{origin} says format {shortened(values.get('format'))}, but a latent store says {FORMAT!r}")
    if values.get("version") != VERSION:
        raise UserError(
            f"{origin} says version {shortened(values.get('version'))} of the latent store, but this program knows "
            f"version {VERSION} only; install a dit-pipeline that knows it, or extract again"
        )
    return typed(values, Manifest, f"{origin} is damaged", advice="restore it or extract again")


def parse_manifest(data: bytes, origin: str, *, check_seal: bool = True) -> Manifest:
    """The manifest in a file's bytes.

    Args:
        data: the file.
        origin: what to call it.
        check_seal: refuse one that was changed after it was written.

    Raises:
        UserError: it is damaged, or of a format or version that is not known.
    """
    values = parse_json(data, origin, advice="restore it or extract again")
    if not isinstance(values, dict):
        raise UserError(f"{origin} holds no JSON object, so it is no manifest of a latent store; check the path")
    manifest = make_manifest(values, origin=origin)
    if check_seal and not is_intact(data):
        raise UserError(
            f"{origin} was changed after it was written: it does not fit its `{_SEAL}`; restore it, or, if it was "
            f"edited on purpose, take the line `{_SEAL}` out"
        )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished store.

    Raises:
        UserError: the folder is missing, or the store is not finished, damaged or of an unknown version.
    """
    return parse_manifest(read_manifest_bytes(folder), str(folder / MANIFEST_FILE))


def read_manifest_bytes(folder: Path) -> bytes:
    """The manifest's bytes.

    Raises:
        UserError: there is no such folder, or the store in it is not finished.
    """
    path = folder / MANIFEST_FILE
    try:
        return read_regular(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(_why_missing(folder)) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its rights") from error


def _why_missing(folder: Path) -> str:
    if not folder.exists():
        return f"there is no latent store at {folder}: the folder does not exist; check the path"
    if not folder.is_dir():
        return f"{folder} is a file, not a latent store; give the folder that holds {MANIFEST_FILE}"
    if any(folder.glob("*-[0-9][0-9][0-9][0-9][0-9]*")) or (folder / WORK_FOLDER).exists():
        return (
            f"the latent store {folder} is not finished: it has no {MANIFEST_FILE} yet; "
            "run the dit-extract command that began it again, and it will continue where it stopped"
        )
    return (
        f"{folder} holds no latent store: it has no {MANIFEST_FILE}, so a store there is not finished; check the path"
    )


def write_manifest(folder: Path, manifest: Manifest, *, work_folder: Path | None = None) -> None:
    """Publish the manifest; the last thing written of a store.

    Raises:
        UserError: the disk is full or read-only.
    """
    write_bytes(folder / MANIFEST_FILE, manifest.to_bytes(), work_folder=work_folder)


def latent_json(latent: LatentSpec) -> dict[str, Any]:
    """The manifest's `latent` object."""
    return {name: getattr(latent, name) for name in ("kind", "channels", "height", "width", "dtype", "downsample")}


def sealed(values: Mapping[str, Any]) -> bytes:
    """The file of a manifest or record, its own checksum last; equal values (in equal order) give equal bytes.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    content = {key: value for key, value in values.items() if key != _SEAL}
    digest = hashlib.sha256(_json_bytes({**content, _SEAL: ""})).hexdigest()
    return _json_bytes({**content, _SEAL: digest})


def is_intact(data: bytes) -> bool:
    """Whether these are, to the byte, the bytes that `sealed` gave; True for JSON that was never sealed."""
    try:
        values = parse_json(data, "it")
    except UserError:
        return False
    if not isinstance(values, dict) or not values:
        return False
    last = list(values)[-1]
    if _SEAL not in values and not (isinstance(values[last], str) and re.fullmatch(r"[0-9a-f]{64}", values[last])):
        return True  # by another program; a bit flipped in our key's name would have left the digest in its place
    try:
        return data == sealed(values)
    except ValueError:
        return False


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
