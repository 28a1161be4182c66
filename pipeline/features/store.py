"""Reading the features beside a store: any samples in any order, by one sorted read per batch; every byte checked."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int8, Int64
from numpy.typing import NDArray
from torch import Tensor

from pipeline.features.manifest import SCALE, FeatureManifest, parse_features
from pipeline.features.pca import Projection, read_projection
from pipeline.features.writer import row_checksum
from pipeline.latents.manifest import Manifest, ShardEntry
from pipeline.latents.names import FEATURES_FOLDER, MANIFEST_FILE, record_of
from pipeline.latents.records import parse_record
from pipeline.latents.remote import Folder, open_folder
from pipeline.latents.safetensors_shards import starts_of
from pipeline.latents.shard_reader import ShardReader
from pipeline.latents.shards import Run, ShardFile, read_runs, runs_of
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of

AGAIN = "make them again by dit-extract --add-features --overwrite"


@dataclass(frozen=True, kw_only=True, slots=True)
class Starts:
    """Where a shard's columns begin, and how many bytes a sample takes in each."""

    starts: dict[str, int]
    strides: dict[str, int]
    scale: Float[Tensor, " dim"] | None = None
    """Of int8: what a step is of each of a patch's numbers."""

    def row_at(self, offset: int) -> int:
        """The sample that a byte belongs to."""
        name = max((name for name in self.starts if self.starts[name] <= offset), key=self.starts.__getitem__)
        return (offset - self.starts[name]) // self.strides[name]


class FeatureStore(ShardReader[Starts]):
    """The features of a store's samples: `features.gather(indices, views)`; positions are those of the store.

    Samples are read with `pread` at known offsets, none stays in memory.
    """

    def __init__(self, path: str | Path, store: Manifest, cache: str | Path | None = None) -> None:
        """Open the features of a store, a folder or URL.

        Args:
            path: the store.
            store: its manifest, which the features must belong to.
            cache: as of `LatentStore`.

        Raises:
            UserError: the store has none, they are damaged, or they are of other samples than the store's.
        """
        place = f"{str(path).rstrip('/')}/{FEATURES_FOLDER}"
        folder = open_folder(place, cache)
        data = folder.small_file(MANIFEST_FILE)
        if data is None:
            raise UserError(
                f"{path} has no features: there is no {folder.describe(MANIFEST_FILE)}; make them by "
                "dit-extract --features ENCODER --add-features STORE"
            )
        self.path = place
        self.manifest = parse_features(data, folder.describe(MANIFEST_FILE))
        check_same_samples(self.manifest, store, place)
        super().__init__(folder, self.manifest.shards)
        self.projection: Projection | None = (
            None if self.manifest.pca is None else read_projection(folder, self.manifest.pca, self.manifest.encoder)
        )

    def gather(
        self,
        indices: Int64[np.ndarray, " n"],
        views: Int64[np.ndarray, " n"] | None = None,
        out: dict[str, Tensor] | None = None,
    ) -> dict[str, Float[Tensor, "n ..."]]:
        """{"features": [n, T, K], "cls": [n, D]} of one view per sample, read in the order they lie on the disk.

        Both are float16; where they are stored as int8, the patches are given back times their scale.

        Args:
            indices: positions in store order.
            views: the view of each sample; the first one if left out.
            out: contiguous CPU tensors to read into, of some of the columns: the others are not read.

        Raises:
            IndexError: an index or view is outside the store.
            UserError: a shard is damaged or missing; names shard and row.
        """
        rows = self._positions(indices)
        columns = self.manifest.columns
        views = np.zeros_like(rows) if views is None else np.asarray(views, dtype=np.int64)
        if views.size and (views.min() < 0 or views.max() >= columns.views):
            raise IndexError(f"views must lie in 0 … {columns.views - 1}")
        if out is None:
            out = self.room_for(len(rows))
        if any(tensor.shape != (len(rows), *columns.shapes[name]) for name, tensor in out.items()):
            raise ValueError(f"out is not {len(rows)} of {columns.shapes}")
        if len(rows):
            steps = {
                name: torch.empty(tensor.shape, dtype=torch.int8)
                for name, tensor in out.items()
                if columns.dtypes[name] == "int8"
            }
            self._read(rows, views, out | steps)
            for name, counted in steps.items():
                self._multiply(rows, counted, out[name])
        return out

    def _multiply(self, rows: NDArray[np.int64], steps: Int8[Tensor, "n token dim"], out: Tensor) -> None:
        """Numbers of steps times what a step is in each sample's shard, into `out`."""
        for shard, places in self._by_shard(rows):
            scale, at = self._file(shard)[1].scale, torch.from_numpy(places)
            assert scale is not None, "a shard's layout has it wherever its manifest says int8"
            out[at] = (steps[at].float() * scale).to(out.dtype)

    def room_for(
        self, samples: int, *, columns: Collection[str] | None = None, pin_memory: bool = False
    ) -> dict[str, Tensor]:
        """Uninitialised memory for one view of so many samples, of all columns or those that are named."""
        return {
            name: torch.empty((samples, *shape), dtype=torch.float16, pin_memory=pin_memory)
            for name, shape in self.manifest.columns.shapes.items()
            if columns is None or name in columns
        }

    def _read(self, rows: NDArray[np.int64], views: NDArray[np.int64], out: dict[str, Tensor]) -> None:
        targets = {name: tensor.view(-1).view(torch.uint8).numpy().data for name, tensor in out.items()}
        runs: list[Run] = []
        for shard, places in self._by_shard(rows):
            file, layout = self._file(shard)
            local = self._local(shard, rows[places])
            for name, width in self.manifest.columns.widths.items():  # in the order of the file
                if name in out:
                    begin, stride = layout.starts[name], layout.strides[name]
                    offsets = begin + local * stride + views[places] * width
                    at = targets[name]
                    ranges = [
                        (offset, at[place * width : (place + 1) * width])
                        for offset, place in zip(offsets.tolist(), places.tolist(), strict=True)
                    ]
                    runs += runs_of(file, ranges)
        read_runs(runs)

    def _layout_of(self, shard: int, file: ShardFile) -> Starts:
        return layout_of(self.manifest, self._shards[shard], file)


def layout_of(manifest: FeatureManifest, shard: ShardEntry, file: ShardFile) -> Starts:
    """Where the columns stand in an open shard.

    Raises:
        UserError: its header is damaged.
    """
    strides = {"index": 8} | {name: width * manifest.columns.views for name, width in manifest.columns.widths.items()}
    starts = starts_of(file, manifest.columns.tensors(shard.samples))
    at = starts.pop(SCALE, None)
    scale = (
        None if at is None else torch.from_numpy(np.frombuffer(file.read(at, 4 * manifest.columns.dim), "<f4").copy())
    )
    if scale is not None and not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise UserError(f"{file.path} is damaged: its {SCALE} must be numbers above 0; {AGAIN}")
    return Starts(starts=starts, strides=strides, scale=scale)


def check_same_samples(features: FeatureManifest, store: Manifest, place: str) -> None:
    """Raise UserError unless the features are of the store's samples, as far as the two manifests tell."""
    ours = (features.plan, features.views, [shard.samples for shard in features.shards])
    theirs = (store.get("plan", ""), tuple(store.views), [shard.samples for shard in store.shards])
    if ours != theirs:
        raise UserError(f"{place} holds features of other samples than the store's, or of the store as it was; {AGAIN}")


def features_of(path: str | Path, cache: str | Path | None = None) -> FeatureManifest | None:
    """The manifest of a store's features, whoever's they are; None where it has none that are finished.

    Raises:
        UserError: it is damaged.
    """
    folder = open_folder(f"{str(path).rstrip('/')}/{FEATURES_FOLDER}", cache)
    data = folder.small_file(MANIFEST_FILE)
    return None if data is None else parse_features(data, folder.describe(MANIFEST_FILE))


def features_faults(path: str | Path, store: Manifest, cache: str | Path | None = None) -> list[str]:
    """A sentence for everything in a store's features that is not as it was written; none where it has none."""
    folder = open_folder(f"{str(path).rstrip('/')}/{FEATURES_FOLDER}", cache)
    try:
        manifest = features_of(path, cache)
        if manifest is None:
            return []
        check_same_samples(manifest, store, folder.describe("").rstrip("/"))
        if manifest.pca is not None:
            read_projection(folder, manifest.pca, manifest.encoder)
    except UserError as error:
        return [str(error)]
    beside = open_folder(path, cache)
    pairs = zip(manifest.shards, store.shards, strict=True)
    return [fault for ours, theirs in pairs for fault in _shard_faults(folder, manifest, ours, beside, theirs)]


def _shard_faults(
    folder: Folder, manifest: FeatureManifest, shard: ShardEntry, beside: Folder, latents: ShardEntry
) -> Iterator[str]:
    """What is wrong with a shard of features or its record."""
    place, data = folder.describe(record_of(shard.file)), folder.small_file(record_of(shard.file))
    of_latents = beside.small_file(record_of(latents.file))
    if data is None:
        yield f"{place} is missing: the commit record of {shard.file}"
        return
    try:
        record = parse_record(data, Path(place))
        if (record.samples, record.bytes, record.sha256) != (shard.samples, shard.bytes, shard.sha256):
            yield f"{place} and the manifest disagree about {shard.file}"
        if of_latents is not None and parse_record(of_latents, Path(latents.file)).keys != record.keys:
            yield f"{place} names other samples than the store's record of {latents.file}"
        path = folder.fetch(shard)
        file = ShardFile(path, size=shard.bytes)
        if sha256_of(path) != shard.sha256:
            damaged = _damaged_row(file, manifest, shard, record.crc32)
            where = "" if damaged is None else f": row {damaged} ({record.keys[damaged]}) is damaged"
            yield f"{folder.describe(shard.file)} has not the SHA-256 of the manifest{where}"
    except (UserError, OSError) as error:
        yield str(error)


def _damaged_row(
    file: ShardFile, manifest: FeatureManifest, shard: ShardEntry, checksums: tuple[int, ...]
) -> int | None:
    layout = layout_of(manifest, shard, file)
    for row, expected in enumerate(checksums):
        data = {
            name: np.frombuffer(file.read(start + row * layout.strides[name], layout.strides[name]), dtype=np.uint8)
            for name, start in layout.starts.items()
        }
        index = int(data.pop("index").view("<i8")[0])
        if row_checksum([data[name] for name in manifest.columns.widths], index) != expected:
            return row
    return None
