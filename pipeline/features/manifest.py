"""What the features beside a store are: `STORE/features/manifest.json`, written last, as the store's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipeline.latents.manifest import ShardEntry, is_intact, sealed
from pipeline.latents.names import FEATURES_FORMAT, MANIFEST_FILE, PCA_FILE, FeatureDtype, is_plain_name
from pipeline.latents.safetensors_shards import Described
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import Count, Sha256, parse_json, read_regular, shortened, typed

VERSION = 1
SCALE = "features_scale"
"""The tensor of a shard of int8 features that says what a step of each of a patch's numbers is."""
_CODES = {"float16": "F16", "int8": "I8"}
_BYTES = {"float16": 2, "int8": 1}
_AGAIN = "restore it, or make the features again by dit-extract --add-features"
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1.001)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """What is stored of a sample: `features` [V, T, K] and, where the encoder has a class token, `cls` [V, D].

    The class token may stand alone: K is 0 then.
    """

    views: int
    """V, in the store's order."""
    tokens: int
    """T, patches of an image, row by row."""
    dim: int
    """K, numbers for a patch."""
    cls: int
    """D, numbers of the class token; 0 where there is none."""
    dtype: FeatureDtype = "float16"
    """Of the patches; the class token is always float16."""

    @property
    def sample_bytes(self) -> int:
        return self.views * sum(self.widths.values())

    @property
    def dtypes(self) -> dict[str, str]:
        """{column: dtype}."""
        return {"cls": "float16", "features": self.dtype}

    @property
    def widths(self) -> dict[str, int]:
        """{column: bytes of one view}, in the order of the file."""
        widths = {"cls": self.cls, "features": self.tokens * self.dim}
        return {name: values * _BYTES[self.dtypes[name]] for name, values in widths.items() if values}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{column: shape of one view}."""
        return {name: (self.cls,) if name == "cls" else (self.tokens, self.dim) for name in self.widths}

    def tensors(self, samples: int) -> list[Described]:
        """The tensors of a shard: `index` [N], `cls` [N, V, D], `features` [N, V, T, K], and the scale [K] of int8."""
        columns = [
            (name, _CODES[self.dtypes[name]], (samples, self.views, *self.shapes[name]), samples * self.views * width)
            for name, width in self.widths.items()
        ]
        scale = [(SCALE, "F32", (self.dim,), 4 * self.dim)] if self.dtype == "int8" else []
        return [("index", "I64", (samples,), 8 * samples), *columns, *scale]

    def to_json(self) -> dict[str, Any]:
        """The manifest's `columns`, by the names of the tensors."""
        return {
            name: {"dtype": self.dtypes[name], "shape": [self.views, *self.shapes[name]]}
            for name in reversed(self.widths)
        }


class Encoder(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest's `encoder`: what made the features."""

    name: str
    class_name: str = msgspec.field(name="class")
    sha256: Sha256
    """Over its configuration and every tensor, as a VAE's."""
    resolution: _Size
    """Side of the square that it is shown, in pixels."""
    grid: tuple[_Size, _Size]
    """Patches from top to bottom and from left to right."""
    width: _Size
    """D, numbers for a patch as the encoder gives it."""
    mean: tuple[float, float, float]
    """What is subtracted from red, green and blue in 0 … 1, which are then divided by `std`."""
    std: tuple[float, float, float]


class Reduction(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest's `pca`: how K numbers were made of a patch's D."""

    file: str
    sha256: Sha256
    components: _Size
    kept_variance: _Share
    """Of the sample that it was fitted to."""
    images: Count
    """How many that were."""


class _Column(msgspec.Struct, frozen=True):
    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(min_length=1)]


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest as it stands in its file."""

    split: str
    samples: Count
    views: tuple[str, ...]
    encoder: Encoder
    columns: dict[str, _Column]
    pca: Reduction | None
    plan: str
    extraction: dict[str, Any]
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureManifest:
    """The features of all of a store's samples, in its order."""

    split: str
    views: tuple[str, ...]
    encoder: Encoder
    columns: Columns
    pca: Reduction | None
    plan: str
    """The store's own: features of another store are told by it."""
    extraction: Mapping[str, Any]
    """All that decides about the bytes, by flag."""
    shards: tuple[ShardEntry, ...]
    """One for each of the store's, with as many samples."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def to_bytes(self) -> bytes:
        """The file: the same values give the same bytes."""
        return sealed(
            {
                "format": FEATURES_FORMAT,
                "version": VERSION,
                "split": self.split,
                "samples": self.samples,
                "views": list(self.views),
                "encoder": msgspec.to_builtins(self.encoder),
                "columns": self.columns.to_json(),
                "pca": msgspec.to_builtins(self.pca),
                "extraction": dict(self.extraction),
                "plan": self.plan,
                "shards": [
                    {"file": s.file, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256} for s in self.shards
                ],
            }
        )


def parse_features(data: bytes, origin: str, *, check_seal: bool = True) -> FeatureManifest:
    """The manifest in a file's bytes.

    Raises:
        UserError: it is damaged, or of a format or version that is not known.
    """
    values = parse_json(data, origin, advice=_AGAIN)
    found = values if isinstance(values, dict) else {}
    if found.get("format") != FEATURES_FORMAT or found.get("version") != VERSION:
        raise UserError(
            f"{origin} has format {shortened(found.get('format'))} version {shortened(found.get('version'))}, but this "
            f"program knows {FEATURES_FORMAT!r} version {VERSION}; install a dit-pipeline that knows it, or {_AGAIN}"
        )
    if check_seal and not is_intact(data):
        raise UserError(f"{origin} was changed after it was written (its checksum differs); {_AGAIN}")
    file = typed(values, _File, f"{origin} is damaged", advice=_AGAIN)
    manifest = FeatureManifest(
        split=file.split,
        views=file.views,
        encoder=file.encoder,
        columns=_columns_of(file, origin),
        pca=file.pca,
        plan=file.plan,
        extraction=file.extraction,
        shards=file.shards,
    )
    names = [shard.file for shard in manifest.shards]
    if manifest.samples != file.samples or not all(map(is_plain_name, names)) or len({*names}) < len(names):
        raise UserError(f"{origin} is damaged: its shards contradict it; {_AGAIN}")
    if manifest.pca is not None and (manifest.pca.file, manifest.pca.components) != (PCA_FILE, manifest.columns.dim):
        raise UserError(f"{origin} is damaged: its pca contradicts its columns; {_AGAIN}")
    return manifest


def read_features(folder: Path) -> FeatureManifest:
    """The manifest in a folder of features.

    Raises:
        UserError: they are not finished, or it is damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        return parse_features(read_regular(path), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): the features are not finished; {_AGAIN}") from error


def _columns_of(file: _File, origin: str) -> Columns:
    shapes = {name: column.shape for name, column in file.columns.items()}
    tokens = file.encoder.grid[0] * file.encoder.grid[1]
    views, dim = len(file.views), shapes.get("features", (0,))[-1]
    said = file.columns["features"].dtype if dim else ""
    dtype: FeatureDtype = "int8" if said == "int8" else "float16"
    columns = Columns(views=views, tokens=tokens, dim=dim, cls=shapes.get("cls", (0,))[-1], dtype=dtype)
    is_empty = not dim and (not columns.cls or file.pca is not None)
    if not views or is_empty or dim > file.encoder.width or file.columns != _as_columns(columns):
        raise UserError(f"{origin} is damaged: its columns contradict its encoder or views; {_AGAIN}")
    return columns


def _as_columns(columns: Columns) -> dict[str, _Column]:
    return msgspec.convert(columns.to_json(), dict[str, _Column])
