"""The second pass of an extraction: an encoder's features of a finished store's samples, put beside it.

The images are read again, and each is compared with what its latent was made from. Everything else is as for latents:
claims on shards, commit records, the manifest last, and the same bytes however many processes make them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from extract.encoder import Encoder, arithmetic, cores_of_this_process, lane_of
from extract.feature_network import FeatureNetwork, not_storable, projection_of, reduction_in
from extract.fill import Draft, ExtractJob, fill
from extract.inputs import Inputs, StoreInputs, check_same_listing, images_of, list_inputs
from extract.options import ExtractOptions
from extract.plan import Plan
from extract.progress import Amount, ExtractProgress
from extract.same_data import LANE
from extract.sources.selection import open_source
from extract.store_folder import BEGINNING, OutputFolder
from pipeline.features.encoder import EncoderFolder, VisionEncoder, find_encoder, load_encoder
from pipeline.features.manifest import Columns, FeatureManifest, read_features
from pipeline.features.writer import FeatureRows, entries_of, finish_features, write_shard
from pipeline.latents import Manifest, ShardEntry
from pipeline.latents.manifest import read_manifest
from pipeline.latents.names import FEATURES_FOLDER
from pipeline.latents.records import read_record
from pipeline.latents.writer import DTYPES
from pipeline.runtime.console import say
from pipeline.runtime.devices import choose_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import Launch, StopRequest
from pipeline.runtime.units import duration


def add_features(options: ExtractOptions, path: Path, place: Launch, *, began: float) -> int:
    """Make the features of a finished store's samples, or continue; gives the exit status.

    Raises:
        UserError: something the user can mend.
    """
    store = read_manifest(path)
    made = _made_with(options, store, path)
    assert options.features is not None
    folder = find_encoder(options.features)
    output = OutputFolder(path=path / FEATURES_FOLDER, split=store.split, read=_read, elsewhere="")
    if options.overwrite and not place.is_main:
        output.wait_for_main(began)
    output.check()
    output.put_in_place()
    settings = _settings(options, store, folder)
    is_anew = options.overwrite and place.is_main and output.holds_store
    if not is_anew and output.is_finished and not output.lost_shards():
        output.clean_up()
        output.check_settings(settings, output.recorded())
        say(f"{output.path} is already finished; nothing to do")
        return 0

    source = open_source(options.source, output.remote_copies, left_out=path)
    with output.occupied() as here:
        with output.exclusive("listing"):
            inputs = list_inputs(options, source, output.listing_cache)
        check_same_listing(path, made["data"], inputs)
        if is_anew:
            with output.exclusive(BEGINNING):
                output.begin_anew(here, settings | _lane(options, choose_device(options.work.device, place)[0], folder))
        return _make(options, output, store, inputs, folder, place)


def features_bytes(options: ExtractOptions, device: torch.device) -> int:
    """What --features will take of a sample, the encoder found right before the latents are made; 0 without them.

    Raises:
        UserError: the encoder cannot be loaded, or has no more numbers than are to be kept.
    """
    if options.features is None:
        return 0
    encoder = _encoder(options, find_encoder(options.features), device)
    return _columns(len(options.pixels.views), encoder, options).sample_bytes


def _encoder(options: ExtractOptions, folder: EncoderFolder, device: torch.device) -> VisionEncoder:
    encoder = load_encoder(folder, device=device, dtype=DTYPES[options.work.encode_dtype])
    about, dim = encoder.about, options.features_dim
    if dim is not None and dim >= about.width:
        raise UserError(f"--features-dim {dim} is no less than the {about.width} of {about.name}; leave it out")
    if dim == 0 and not encoder.has_cls:
        raise UserError(f"--features-dim 0 keeps the class token alone, and {about.name} has none; keep some numbers")
    return encoder


def _read(folder: Path) -> tuple[Mapping[str, Any], Sequence[ShardEntry]]:
    manifest = read_features(folder)
    return manifest.extraction, manifest.shards


def _made_with(options: ExtractOptions, store: Manifest, path: Path) -> dict[str, Any]:
    """The flags that a store was made with.

    Raises:
        UserError: they are not known, or others are given now that would decide about pixels or shards.
    """
    made = store.extraction
    if not isinstance(made.get("data"), str):
        raise UserError(f"{path} was not made from images by dit-extract, so features of them cannot be added")
    if options.add_features is None:
        return made
    differing = [
        f"--{name} {given} now, {made[name]} there"
        for group in (options.pixels, options.shards)
        for one in fields(group)
        if (given := getattr(group, one.name)) != one.default
        and (name := one.name.replace("_", "-")) in made
        and made[name] != given
    ]
    if differing:
        raise UserError(f"{path} was made with other settings ({'; '.join(differing)}), which decide; leave them out")
    return made


def _settings(options: ExtractOptions, store: Manifest, folder: EncoderFolder) -> dict[str, Any]:
    """All that decides about the features' bytes, by flag."""
    seen = json.dumps([folder.sha256, folder.resolution, folder.mean, folder.std]).encode()
    return {
        "split": store.split,
        "add-features": store.get("plan", ""),
        "features": hashlib.sha256(seen).hexdigest(),
        "features-dim": options.features_dim,
        "encode-dtype": options.work.encode_dtype,
        **({} if options.features_dtype == "float16" else {"features-dtype": options.features_dtype}),
    }


def _lane(options: ExtractOptions, device: torch.device, folder: EncoderFolder) -> dict[str, Any]:
    lane = options.work.batch_size or lane_of(device, folder.resolution)
    return {} if device.type == "cpu" else {LANE: lane}


def _make(
    options: ExtractOptions,
    output: OutputFolder,
    store: Manifest,
    inputs: Inputs,
    folder: EncoderFolder,
    place: Launch,
) -> int:
    """Fill the shards that are missing, and finish."""
    settings = _settings(options, store, folder)
    plan = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    output.check_settings(settings, output.recorded())
    if output.is_finished:
        output.reopen()
    device, reason = choose_device(options.work.device, place)
    with arithmetic(device):
        encoder = _encoder(options, folder, device)
        about = encoder.about
        described = _described(encoder, options.features_dim)
        say(f"features of {about.name} at {about.resolution} px on {device} ({reason}): {described}")
        settings |= _lane(options, device, folder)
        output.begin(settings, plan)
        with StopRequest() as stop:
            _fill(
                options, output, images_of(output.path.parent, inputs, image_px=folder.resolution), encoder, plan, stop
            )
    if stop.signal:
        done = len(output.done(range(len(store.shards))))
        say(f"stopped; {done} of {len(store.shards)} shards of features are in place; run the same command again")
        return stop.exit_status
    return _finish(output, store, encoder, settings, plan, options)


def _described(encoder: VisionEncoder, dim: int | None) -> str:
    rows, columns = encoder.about.grid
    if dim == 0:
        return f"the class token of {encoder.about.width} numbers alone"
    kept = f"{dim} of {encoder.about.width}" if dim else f"{encoder.about.width}"
    return f"{rows}×{columns} patches of {kept} numbers{' and a class token' if encoder.has_cls else ''}"


def _columns(views: int, encoder: VisionEncoder, options: ExtractOptions) -> Columns:
    rows, columns = encoder.about.grid
    return Columns(
        views=views,
        tokens=rows * columns,
        dim=encoder.about.width if options.features_dim is None else options.features_dim,
        cls=encoder.about.width if encoder.has_cls else 0,
        dtype=options.features_dtype,
    )


def _fill(
    options: ExtractOptions,
    output: OutputFolder,
    images: StoreInputs,
    encoder: VisionEncoder,
    plan: str,
    stop: StopRequest,
) -> None:
    """Make the shards that are missing."""
    store, work = images.manifest, options.work
    span = options.shards.span(len(store.shards))
    if len(output.done(span)) == len(span):
        return
    columns, made = _columns(len(store.views), encoder, options), store.extraction
    plan_of_store = Plan(
        inputs=len(images.loader.listing),
        seed=store.seed,
        samples_per_shard=made["samples-per-shard"],
        limit=made["limit"],
    )
    amount = Amount(plan=plan_of_store, span=span, sample_bytes=columns.sample_bytes, what="the features")
    workers = work.workers or cores_of_this_process()
    with ExtractProgress(output, amount, batches_ahead=2, anyway=options.source.anyway) as progress:
        projection = projection_of(output, images, encoder, options, workers)
        if work.compile:
            say("compiling the encoder; the first batch takes a minute or so")
        with Encoder(
            FeatureNetwork(encoder=encoder, projection=projection, with_patches=columns.dim > 0),
            batch_size=work.batch_size,
            flip=images.loader.options.flip,
            store_dtype=torch.float16,
            views=columns.views,
            image_px=encoder.about.resolution,
            compiled=work.compile,
        ) as passes:

            def write(draft: Draft) -> None:
                rows = FeatureRows(
                    columns=columns,
                    values=draft.latents[: len(draft.kept)],
                    indices=np.array(draft.kept, dtype=np.int64),
                    keys=[images.loader.key(index) for index in draft.kept],
                )
                write_shard(output.place, output.split, draft.shard, rows, plan=plan)

            job = ExtractJob(
                output=output,
                span=span,
                rows=images.rows,
                load=images.load,
                key=images.loader.key,
                encoder=passes,
                write=write,
                store_dtype="float16",
                workers=workers,
                fail_on_error=True,
                refusal=not_storable(encoder),
            )
            fill(job, stop, progress)
    say(f"features of {progress.images:,} images made here in {duration(progress.seconds)}")


def _finish(
    output: OutputFolder,
    store: Manifest,
    encoder: VisionEncoder,
    settings: Mapping[str, Any],
    plan: str,
    options: ExtractOptions,
) -> int:
    """Write the manifest if every shard is in place; gives the exit status."""
    shards = len(store.shards)
    if output.lacks_shards(shards, what="shards of features", whole="them"):
        return 0
    with output.exclusive("finish"):
        output.put_in_place()  # by a process that was killed meanwhile
        if not output.is_finished:
            place = output.place
            records = [read_record(place, output.split, shard, plan=plan) for shard in range(shards)]
            whole = [record for record in records if record is not None]
            for shard in (shard for shard, record in enumerate(records) if record is None):
                output.forget(shard)
            if len(whole) < shards:
                raise UserError(f"{shards - len(whole)} shards in {place} are not whole; run the same command again")
            finish_features(
                place,
                FeatureManifest(
                    split=store.split,
                    views=tuple(store.views),
                    encoder=encoder.about,
                    columns=_columns(len(store.views), encoder, options),
                    pca=reduction_in(place) if options.features_dim else None,
                    plan=store.get("plan", ""),
                    extraction=dict(settings),
                    shards=entries_of(whole),
                ),
            )
            output.put_in_place()
    say(f"{output.path} is finished: the features of {store.samples:,} samples", every_process=True)
    return 0
