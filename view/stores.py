"""Stores for the page: what one is and what was left out of it, and its pictures, decoded when they are asked for."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from extract.inputs import StoreInputs, check_same_listing, images_of, list_inputs
from extract.options import ExtractOptions, SourceOptions
from extract.sources.selection import open_source
from pipeline.classes import short_name
from pipeline.features.store import features_of
from pipeline.images import psnr, to_pixels
from pipeline.inspect.store import counts_of, facts_of
from pipeline.latents import LatentStore
from pipeline.latents.names import SKIPPED_FILE, record_of
from pipeline.latents.records import parse_record
from pipeline.latents.remote import open_folder
from pipeline.runtime.devices import choose_device, memory_explained
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import parse_json, typed
from pipeline.vae import Vae, find_vae
from view.given import Given, GivenStore
from view.jobs import Job, Work
from view.options import ViewOptions
from view.sampling import as_png
from view.shelf import scratch

SHOWN = 24
"""Pictures on one page."""
AT_ONCE = 4
SHOWN_SKIPPED = 200
KEPT_LABELS = 4
MOST_DB = 99.0  # JSON has no infinity


_known_labels: dict[tuple[str, ...], NDArray[np.int64]] = {}
"""Of the stores looked at last, by the checksums of their shards: in a store of tars they stand one by one."""
_known_images: dict[str, StoreInputs] = {}
"""What stores were made from, by their paths."""


class BrowseRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which pictures of a store the page asks for."""

    store: Annotated[int, msgspec.Meta(ge=0, le=999)]
    label: Annotated[int, msgspec.Meta(ge=-1, le=1 << 30)] | None = None
    """Of one class; −1 those without one; None of all."""
    view: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    first: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] = 0
    """The first one's number within the class."""
    compared: Literal["", "again", "original"] = ""
    """Say how far every picture is from what it is when it is encoded and decoded once more, or from the image that it
    was made from, which is then shown at its left."""


def describe(given: GivenStore) -> dict[str, Any]:
    """What a store is, samples per class, the statistics of its latents, and what was left out and why.

    Raises:
        UserError: it is not finished, or damaged.
    """
    with LatentStore(given.path) as store:
        manifest, labels = store.manifest, _labels(store)
    statistics = manifest.statistics
    return {
        "facts": {name: str(value) for name, value in facts_of(given.name, manifest, features_of(given.path)).items()},
        "views": list(manifest.views),
        "classes": [
            {"label": int(label), "id": identifier, "name": name, "samples": int(samples.replace(",", ""))}
            for label, identifier, name, samples in counts_of(manifest.classes, manifest.class_ids, labels)
        ],
        "statistics": [
            {"channel": channel, "mean": mean, "std": std}
            for channel, (mean, std) in enumerate(zip(statistics.mean, statistics.std, strict=True))
        ],
        "skipped": skipped(given.path, manifest.skipped),
    }


def _labels(store: LatentStore) -> NDArray[np.int64]:
    """Every sample's label, read once."""
    key = tuple(shard.sha256 for shard in store.manifest.shards)
    if key not in _known_labels:
        if len(_known_labels) >= KEPT_LABELS:
            _known_labels.pop(next(iter(_known_labels)))
        _known_labels[key] = store.labels().numpy()
    return _known_labels[key]


class _Skipped(msgspec.Struct, frozen=True):
    key: str
    reason: str


def skipped(path: str, count: int) -> dict[str, Any]:
    """What was left out of a store: how many for which reason, and the first of them by name.

    Raises:
        UserError: the list is damaged.
    """
    if not count:
        return {"count": 0, "reasons": [], "first": []}
    data = open_folder(path).small_file(SKIPPED_FILE)
    origin = f"{path}/{SKIPPED_FILE}"
    if data is None:
        raise UserError(f"{origin} is missing, though {count:,} inputs were left out; restore it")
    advice = "restore it"
    entries = [
        typed(parse_json(line, origin, advice=advice), _Skipped, f"{origin} is damaged", advice=advice)
        for line in data.splitlines()
    ]
    reasons = Counter(entry.reason for entry in entries)
    return {
        "count": count,
        "reasons": [{"reason": reason, "inputs": inputs} for reason, inputs in reasons.most_common(50)],
        "first": [{"key": entry.key, "reason": entry.reason} for entry in entries[:SHOWN_SKIPPED]],
    }


def browsing(request: BrowseRequest, given: Given, options: ViewOptions) -> tuple[Work, list[str]]:
    """The work that decodes one page of pictures, and as many titles as it can have pictures.

    Raises:
        UserError: there is no such store.
    """
    path = given.store(request.store).path

    def work(job: Job) -> None:
        job.progress(0.0, "reading the store")
        with LatentStore(path) as store, memory_explained(lambda: "out of memory; use another --device"):
            rows = _rows(store, request)
            shown = rows[request.first : request.first + SHOWN]
            job.facts = {"all": len(rows), "first": request.first, "names": _names(store, path, shown)}
            job.pictures = job.pictures[: len(shown)]
            if not len(shown):
                return
            job.progress(0.0, "reading the VAE")
            vae = find_vae(store.manifest.vae, options.vae, device=choose_device(options.device)[0])
            errors = []
            others = _comparison(request, store, path, vae, options)
            for done, (number, picture, error) in enumerate(_decoded(store, vae, shown, request, others)):
                job.show(number, as_png(Image.fromarray(picture)))
                if error is not None:
                    errors.append(error)
                    job.facts = {**job.facts, "errors": list(errors)}
                job.progress((done + 1) / len(shown), f"{done + 1} of {len(shown)} pictures")

    return work, [str(number) for number in range(SHOWN)]


def _rows(store: LatentStore, request: BrowseRequest) -> NDArray[np.int64]:
    """The positions in the store of the class's samples."""
    views = len(store.manifest.views)
    if request.view >= views:
        raise UserError(f"the store has {views} views, and none of number {request.view}; choose another")
    if request.label is None:
        return np.arange(len(store))
    labels = _labels(store)
    return np.flatnonzero(labels < 0 if request.label < 0 else labels == request.label)


def _names(store: LatentStore, path: str, rows: NDArray[np.int64]) -> list[dict[str, str]]:
    """The class of every row, and the input that it was made from, as the shard's record tells it."""
    manifest = store.manifest
    _, labels = store.gather(rows)
    ends = np.cumsum([shard.samples for shard in manifest.shards])
    shards = np.searchsorted(ends, rows, side="right")
    folder, keys = open_folder(path), {}
    for shard in {int(number) for number in shards}:
        name = record_of(manifest.shards[shard].file)
        data = folder.small_file(name)
        keys[shard] = () if data is None else parse_record(data, Path(path, name)).keys
    names = []
    for row, shard, label in zip(rows.tolist(), shards.tolist(), labels.tolist(), strict=True):
        place = row - int(ends[shard] - manifest.shards[shard].samples)
        known = keys[shard][place] if place < len(keys[shard]) else ""
        of_class = short_name(label, manifest.classes, manifest.class_ids) if label >= 0 else "unlabelled"
        names.append({"class": of_class, "key": known or f"sample {row}"})
    return names


Comparison = Callable[[NDArray[np.int64], NDArray[np.uint8]], NDArray[np.uint8]]
"""(rows of the store, their pictures [N, H, W, 3]) → the pictures that those are compared with."""


def _decoded(
    store: LatentStore, vae: Vae, rows: NDArray[np.int64], request: BrowseRequest, others: Comparison | None
) -> Iterator[tuple[int, NDArray[np.uint8], float | None]]:
    """(number, what is shown [H, W, 3], PSNR of the comparison or None) of every row, one by one."""
    channels = store.manifest.latent.channels
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        latents, _ = store.gather(part, np.full_like(part, request.view))
        pictures = vae.decode(latents[:, :channels].float()).numpy()
        if others is None:
            yield from ((start + number, picture, None) for number, picture in enumerate(pictures))
            continue
        for number, (picture, other) in enumerate(zip(pictures, others(part, pictures), strict=True), start):
            shown = np.hstack([other, picture]) if request.compared == "original" else picture
            yield number, shown, min(psnr(picture, other), MOST_DB)


def _comparison(
    request: BrowseRequest, store: LatentStore, path: str, vae: Vae, options: ViewOptions
) -> Comparison | None:
    """What the pictures of a request are compared with.

    Raises:
        UserError: with their originals, and --data does not hold them.
    """
    if request.compared == "again":
        return lambda _, pictures: _once_more(vae, pictures)
    if request.compared == "original":
        images = _originals(store, path, options.data)
        return lambda rows, _: np.stack([_original(store, images, row, request.view) for row in rows.tolist()])
    return None


def _once_more(vae: Vae, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    encoded = vae.encode(torch.from_numpy(to_pixels(pictures)))
    return vae.decode(encoded.chunk(2, dim=1)[0] if vae.kind == "moments" else encoded).numpy()


def _originals(store: LatentStore, path: str, data: str | None) -> StoreInputs:
    """The images that a store was made from, listed once.

    Raises:
        UserError: they are not those, or the store does not say what it was made from.
    """
    made = store.manifest.extraction
    if data is None:
        raise UserError("the images that the store was made from are not here; start dit-view with --data")
    if "://" in path or not isinstance(made.get("data"), str):
        raise UserError(f"{path} is no folder that dit-extract made from images, so its pictures have no originals")
    if path not in _known_images:
        options = ExtractOptions(source=SourceOptions(data=data, split=store.manifest.split), out=path)
        inputs = list_inputs(options, open_source(options.source, scratch(), left_out=Path(path)), None)
        check_same_listing(path, made["data"], inputs)
        _known_images[path] = images_of(Path(path), inputs, image_px=store.manifest.image.size)
    return _known_images[path]


def _original(store: LatentStore, images: StoreInputs, row: int, view: int) -> NDArray[np.uint8]:
    """The crop [H, W, 3] that one view of a row was made from.

    Raises:
        UserError: the image is not there any more, or another one.
    """
    ends = np.cumsum([shard.samples for shard in store.manifest.shards])
    images.rows(int(np.searchsorted(ends, row, side="right")))  # compares names, and notes what to compare images with
    views = list(store.manifest.views)
    crop = view // (2 if any(name.endswith("-hflip") for name in views) else 1)
    crops = images.load(int(images.indices[row])).crops
    assert crops is not None
    return crops[crop][:, ::-1] if views[view].endswith("-hflip") else crops[crop]
