"""What a latent store holds: `manifest.json`, written last, so that a store without it is not finished."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.latents.names import FORMATS, MANIFEST_FILE, WORK_FOLDER, is_plain_name
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_bytes

FORMAT = "dit-latents"
VERSION = 1
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
KINDS = ("moments", "point")
_SEAL = "checksum"
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "shard_format": str,
    "split": str,
    "samples": int,
    "skipped": int,
    "classes": list,
    "class_ids": list,
    "image": dict,
    "views": list,
    "latent": dict,
    "vae": dict,
    "statistics": dict,
    "seed": int,
    "shards": list,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpec:
    """What one latent of a store is."""

    kind: str
    """`moments`: mean and log-variance of the posterior, 2C values per cell; `point`: one latent, C values."""
    channels: int
    """C, the channels of a latent drawn from it."""
    height: int
    """Cells from top to bottom."""
    width: int
    """Cells from left to right."""
    dtype: str
    """`float16`, `bfloat16` or `float32`."""
    downsample: int
    """Pixels along one side of a cell."""

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
    samples: int
    bytes: int
    sha256: str


class Manifest(Mapping[str, Any]):
    """The contents of a manifest: a mapping over the JSON, and the same with types as properties."""

    def __init__(self, values: Mapping[str, Any], *, origin: str = MANIFEST_FILE) -> None:
        """Check the values and keep them.

        Raises:
            UserError: an unknown format or version, or a value that is missing or makes no sense; names all of them.
        """
        self._values = dict(values)
        _check(self._values, origin)
        self.latent = LatentSpec(**{name: self._values["latent"][name] for name in LatentSpec.__dataclass_fields__})
        self.shards = tuple(
            ShardEntry(**{name: entry[name] for name in ShardEntry.__dataclass_fields__})
            for entry in self._values["shards"]
        )

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        latent = self.latent
        shape = f"{latent.channels}×{latent.height}×{latent.width}"
        return f"Manifest({self.samples} samples, {len(self.shards)} shards, {shape} {latent.kind})"

    @property
    def samples(self) -> int:
        return int(self._values["samples"])

    @property
    def skipped(self) -> int:
        return int(self._values["skipped"])

    @property
    def split(self) -> str:
        return str(self._values["split"])

    @property
    def shard_format(self) -> str:
        return str(self._values["shard_format"])

    @property
    def classes(self) -> Sequence[str]:
        """Readable names, index = label; empty for unlabelled data."""
        return tuple(self._values["classes"])

    @property
    def class_ids(self) -> Sequence[str]:
        """Folder names or synsets, in the order of `classes`."""
        return tuple(self._values["class_ids"])

    @property
    def image(self) -> Mapping[str, Any]:
        """`size` in pixels, and `crop`."""
        return dict(self._values["image"])

    @property
    def views(self) -> Sequence[str]:
        return tuple(self._values["views"])

    @property
    def vae(self) -> Mapping[str, Any]:
        """`name`, `class`, `sha256`, `scaling_factor`, `shift_factor`."""
        return dict(self._values["vae"])

    @property
    def statistics(self) -> Mapping[str, Sequence[float]]:
        """`mean` and `std` per channel of the sampled, unscaled latents."""
        return dict(self._values["statistics"])

    @property
    def seed(self) -> int:
        return int(self._values["seed"])

    def to_bytes(self) -> bytes:
        """The file: the same values give the same bytes."""
        return sealed(self._values)


def parse_manifest(data: bytes, origin: str, *, check_seal: bool = True) -> Manifest:
    """The manifest in a file's bytes.

    Args:
        data: the file.
        origin: what to call it.
        check_seal: refuse one that was changed after it was written.

    Raises:
        UserError: it is damaged, or of a format or version that is not known.
    """
    try:
        values = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{origin} is not valid JSON ({error}); it is damaged, restore it or extract again") from error
    if not isinstance(values, dict):
        raise UserError(f"{origin} holds no JSON object, so it is no manifest of a latent store; check the path")
    manifest = Manifest(values, origin=origin)
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
        return path.read_bytes()
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
    return asdict(latent)


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
        values = json.loads(data)
    except (ValueError, RecursionError):
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


def _check(values: Mapping[str, Any], origin: str) -> None:
    if values.get("format") != FORMAT:
        raise UserError(f"{origin} says format {values.get('format')!r}, but a latent store says {FORMAT!r}")
    if values.get("version") != VERSION:
        raise UserError(
            f"{origin} says version {values.get('version')!r} of the latent store, but this program knows version "
            f"{VERSION} only; install a dit-pipeline that knows it, or extract again"
        )
    faults = [f"{key} is missing" for key in _REQUIRED if key not in values]
    faults += [
        f"{key} is {_short(values[key])}"
        for key, kind in _REQUIRED.items()
        if key in values and (not isinstance(values[key], kind) or isinstance(values[key], bool))
    ]
    if not faults:
        faults = [*_latent_faults(values["latent"]), *_shape_faults(values), *_shard_faults(values)]
    if not faults:
        faults = _number_faults(values, values["latent"]["channels"])
    if faults:
        raise UserError(f"{origin} is damaged: {'; '.join(faults[:8])}; restore it or extract again")


def _latent_faults(latent: Mapping[str, Any]) -> list[str]:
    faults = [
        f"latent.{key} is {_short(latent.get(key))}"
        for key in ("channels", "height", "width", "downsample")
        if not _is_count(latent.get(key)) or latent[key] == 0
    ]
    for key, known in (("kind", KINDS), ("dtype", tuple(DTYPE_BYTES))):
        if latent.get(key) not in known:
            faults.append(f"latent.{key} is {_short(latent.get(key))}, known are {', '.join(known)}")
    return faults


def _shape_faults(values: Mapping[str, Any]) -> list[str]:
    faults = []
    if values["shard_format"] not in FORMATS:
        faults.append(f"shard_format is {_short(values['shard_format'])}, known are {', '.join(FORMATS)}")
    if not values["views"] or not all(isinstance(view, str) for view in values["views"]):
        faults.append("views is no list of names")
    faults += [
        f"{key} is no list of names"
        for key in ("classes", "class_ids")
        if not all(isinstance(name, str) for name in values[key])
    ]
    if len(values["classes"]) != len(values["class_ids"]) and values["classes"] and values["class_ids"]:
        faults.append(f"there are {len(values['classes'])} classes and {len(values['class_ids'])} class_ids")
    return faults


def _shard_faults(values: Mapping[str, Any]) -> list[str]:
    faults = []
    total = 0
    seen = set()
    for number, entry in enumerate(values["shards"]):
        if not isinstance(entry, dict):
            faults.append(f"shards[{number}] is no object")
            continue
        name = entry.get("file")
        if not is_plain_name(name) or not str(name).endswith(FORMATS.get(values["shard_format"], "")):
            faults.append(f"shards[{number}].file is {_short(name)}, which is no plain file name of a shard")
        elif name in seen:
            faults.append(f"shards[{number}].file {name} is listed twice")
        seen.add(str(name))
        faults += [
            f"shards[{number}].{key} is {_short(entry.get(key))}"
            for key in ("samples", "bytes")
            if not _is_count(entry.get(key))
        ]
        if not isinstance(entry.get("sha256"), str) or not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
            faults.append(f"shards[{number}].sha256 is {_short(entry.get('sha256'))}")
        total += entry["samples"] if _is_count(entry.get("samples")) else 0
    if total != values["samples"]:
        faults.append(f"samples is {values['samples']}, but the shards have {total}")
    return faults


def _number_faults(values: Mapping[str, Any], channels: int) -> list[str]:
    """What cannot be true of the statistics and of the VAE's factors, whoever wrote them."""
    statistics, vae = values["statistics"], values["vae"]
    scale, shift = vae.get("scaling_factor"), vae.get("shift_factor")
    means, deviations = statistics.get("mean"), statistics.get("std")
    checks = (
        ("statistics.mean", means, _are_numbers(means, channels)),
        ("statistics.std", deviations, _are_numbers(deviations, channels) and min(deviations) >= 0),
        ("vae.scaling_factor", scale, _is_factor(scale, channels) and 0 not in (scale if _is_list(scale) else [scale])),
        ("vae.shift_factor", shift, shift is None or _is_factor(shift, channels)),
    )
    return [f"{name} is {_short(value)}" for name, value, is_good in checks if not is_good]


def _is_factor(value: Any, channels: int) -> bool:
    """Whether it is one finite number, or one for each channel."""
    return _are_numbers(value if _is_list(value) else [value] * channels, channels)


def _are_numbers(values: Any, count: int) -> bool:
    return (
        _is_list(values)
        and len(values) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
