"""A latent store in words and pictures: what it is, counts per class, statistics, checksums, a contact sheet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.classes import brief, describe_class, find_classes, short_name
from pipeline.features.manifest import FeatureManifest
from pipeline.features.store import features_faults, features_of
from pipeline.inspect.options import InspectOptions
from pipeline.inspect.tables import facts, shortened, table
from pipeline.latents import LatentStore, Manifest
from pipeline.latents.manifest import FORMAT, VERSION
from pipeline.latents.names import FEATURES_FOLDER, is_store
from pipeline.runtime.errors import UserError
from pipeline.runtime.publish import making
from pipeline.runtime.units import factors, size

_SHOWN_CLASSES = 10
_DECODED_AT_ONCE = 16


def store_beside(path: str) -> str:
    """The store whose features a folder holds; the path itself where it is no such folder.

    Raises:
        UserError: the features are not finished.
    """
    folder, _, last = path.rstrip("/").rpartition("/")
    if last != FEATURES_FOLDER or not folder or not is_store(folder):
        return path
    if features_of(folder) is None:
        raise UserError(f"the features in {path} are not finished; run the command that began them again")
    return folder


def describe_store(path: str) -> list[str]:
    """What a finished store holds, images per class, and the statistics of its latents.

    Raises:
        UserError: it is not finished, damaged, or of an unknown version.
    """
    with LatentStore(path) as store:
        manifest, labels = store.manifest, store.labels().numpy()
    counts = counts_of(manifest.classes, manifest.class_ids, labels)
    statistics = manifest.statistics
    rows = [
        (str(channel), f"{mean:+.6f}", f"{std:.6f}")
        for channel, (mean, std) in enumerate(zip(statistics.mean, statistics.std, strict=True))
    ]
    features = features_of(path)
    return [
        *facts(facts_of(path, manifest, features)),
        "",
        *table(("channel", "mean", "std"), rows),
        "",
        *table(("label", "id", "class", "samples"), counts, left=3),
    ]


def facts_of(path: str, manifest: Manifest, features: FeatureManifest | None) -> dict[str, object]:
    """What a store is, by name, in words, and the features beside it."""
    latent, vae, image = manifest.latent, manifest.vae, manifest.image
    total = sum(shard.bytes for shard in manifest.shards)
    shape = f"{latent.channels}×{latent.height}×{latent.width}"
    return {
        "store": path,
        "format": f"{FORMAT} version {VERSION}, {manifest.shard_format} shards",
        "samples": f"{manifest.samples:,} ({manifest.split}), {manifest.skipped:,} inputs skipped",
        "views": f"{len(manifest.views)}: {', '.join(manifest.views)}",
        "latent": f"{shape} {latent.kind}, {latent.dtype}, one cell for {latent.downsample} px",
        "image": f"{image.size} px, {image.crop}",
        "classes": shortened(list(manifest.classes)) if manifest.classes else "none (unlabelled)",
        "VAE": (
            f"{vae.name or 'not recorded'} ({vae.class_name}), scale {factors(vae.scaling_factor)}, "
            f"shift {factors(vae.shift_factor)}, sha256 {vae.sha256 or 'not recorded'}"
        ),
        "seed": manifest.seed,
        "size": f"{size(total)} in {len(manifest.shards):,} shards",
        **({} if features is None else _facts_of_features(features)),
    }


def _facts_of_features(features: FeatureManifest) -> dict[str, object]:
    encoder, columns, pca = features.encoder, features.columns, features.pca
    total = sum(shard.bytes for shard in features.shards)
    reduced = f" of {encoder.width}, which keep {pca.kept_variance:.2%} of the variance" if pca else ""
    patches = f"{encoder.grid[0]}×{encoder.grid[1]} patches of {columns.dim} numbers{reduced}, {columns.dtype}"
    token = f"class token of {columns.cls}" if columns.cls else "no class token"
    return {
        "features": f"{patches if columns.dim else 'no patches'}; {token}; {size(total)}",
        "encoder": f"{encoder.name} ({encoder.class_name}), {encoder.resolution} px, sha256 {encoder.sha256}",
    }


def counts_of(
    classes: Sequence[str], class_ids: Sequence[str], labels: NDArray[np.int64]
) -> list[tuple[str, str, str, str]]:
    """(label, folder name, readable name, samples) of every class, and of what has none."""
    count = max(len(classes), len(class_ids))
    per_class = np.bincount(labels[labels >= 0], minlength=count)
    rows = [
        (str(label), brief("".join(class_ids[label : label + 1])), short_name(label, classes, ()), f"{number:,}")
        for label, number in enumerate(per_class)
    ]
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        rows.append(("-1", "", "unlabelled", f"{unlabelled:,}"))
    return rows


def verify_store(path: str) -> list[str]:
    """That every shard is what the manifest says.

    Raises:
        UserError: a shard is missing or differs; each is named.
    """
    from pipeline.latents.verify import verify

    with LatentStore(path) as store:
        manifest = store.manifest
    faults = [*verify(path), *features_faults(path, manifest)]
    if faults:
        raise UserError(f"{path} is damaged: {'; '.join(faults)}; remove what is named and run dit-extract again")
    return ["", "verified: every shard has the checksum that the manifest and its record give"]


def draw_store(path: str, picture: Path, options: InspectOptions) -> list[str]:
    """Decode the first samples of some classes and write them as a contact sheet, one class in a row.

    Raises:
        UserError: a class is unknown, the VAE cannot be found or is another, or the picture cannot be written.
    """
    from pipeline.image_grid import grid, save_png

    with LatentStore(path) as store:
        rows = _rows(store, options, path)
        images = _decoded(store, np.concatenate(list(rows.values())), options.vae)
        manifest = store.manifest
    columns = options.per_class
    if None not in rows:
        images = _padded(images, [len(indices) for indices in rows.values()], columns)
    names = [short_name(label, manifest.classes, manifest.class_ids) for label in rows if label is not None]
    sheet = grid(images, columns, row_labels=names or None, title=f"{Path(path).name}: decoded latents")
    with making(picture.absolute(), overwrite=True) as stage:
        save_png(stage.place(picture.absolute()), sheet, {"vae": str(manifest.vae.name)})
    return ["", f"written: {picture}, {len(images)} images"]


def _rows(store: LatentStore, options: InspectOptions, path: str) -> dict[int | None, NDArray[np.int64]]:
    """The samples to draw of each class; of a store without classes, {None: the first ones}."""
    classes, class_ids = store.manifest.classes, store.manifest.class_ids
    labels = store.labels().numpy()
    count = max(len(classes), len(class_ids))
    if not count and options.classes is not None:
        raise UserError(f"{path} has no classes; drop --classes")
    if not count:
        return {None: np.arange(min(len(store), 8 * options.per_class))}
    if options.classes is None:
        chosen = [int(label) for label in np.unique(labels[labels >= 0])[:_SHOWN_CLASSES]]
    else:
        chosen = list(dict.fromkeys(find_classes(options.classes, classes, class_ids, count=count)))
    rows: dict[int | None, NDArray[np.int64]] = {
        label: np.flatnonzero(labels == label)[: options.per_class] for label in chosen
    }
    empty = [describe_class(label, classes, class_ids) for label in chosen if not len(rows[label])]
    if empty:
        raise UserError(f"{path} has no samples of class {', '.join(empty)}; choose other --classes")
    return rows


def _decoded(store: LatentStore, indices: NDArray[np.int64], vae: str | None) -> NDArray[np.uint8]:
    """The images of these samples' first views, from the means of their posteriors."""
    from pipeline.vae import find_vae

    decoder = find_vae(store.manifest.vae, vae)
    channels = store.manifest.latent.channels
    batches = []
    for start in range(0, len(indices), _DECODED_AT_ONCE):
        latents, _ = store.gather(indices[start : start + _DECODED_AT_ONCE])
        batches.append(decoder.decode(latents[:, :channels].float()).numpy())
    return np.concatenate(batches)


def _padded(images: NDArray[np.uint8], counts: Sequence[int], columns: int) -> NDArray[np.uint8]:
    """The images with every class filled up to a whole row with white."""
    rows, start = [], 0
    for count in counts:
        row = np.full((columns, *images.shape[1:]), 255, dtype=np.uint8)
        row[:count] = images[start : start + count]
        rows.append(row)
        start += count
    return np.concatenate(rows)
