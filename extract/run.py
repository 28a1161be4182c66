"""One extraction from its options to its exit status: list, plan, check, preview, fill, finish."""

import dataclasses
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from extract.encoder import Encoder, arithmetic, cores_of_this_process, lane_of
from extract.features import add_features, features_bytes
from extract.fill import ExtractJob, fill, write_latents
from extract.inputs import Inputs, Loader, list_inputs
from extract.options import ExtractOptions
from extract.plan import Plan
from extract.preview import draw_preview
from extract.progress import Amount, ExtractProgress, Output
from extract.same_data import AS_SERVED, LANE, check_inputs, shards_to_check
from extract.sources.listing import Source
from extract.sources.selection import open_source
from extract.store_folder import BEGINNING, OutputFolder
from pipeline.latents.manifest import LatentSpec, read_manifest
from pipeline.latents.records import ShardRecord, read_record
from pipeline.latents.writer import DTYPES, StoreDescription, finish_store
from pipeline.runtime.console import say
from pipeline.runtime.devices import choose_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.launchers import say_unfollowed
from pipeline.runtime.processes import Launch, StopRequest, launch
from pipeline.runtime.units import duration
from pipeline.vae import Vae, load_vae
from pipeline.vae_folder import find_folder, fingerprint


def extract(options: ExtractOptions, *, began: float) -> int:
    """Make the store that the options describe, or continue it; gives the exit status.

    Args:
        options: what is asked for.
        began: when this process started, in seconds since 1970.

    Raises:
        UserError: something the user can mend.
    """
    place = launch()
    if options.add_features is not None:
        return add_features(options, options.add_features, place, began=began)
    if options.store is None:
        with tempfile.TemporaryDirectory(prefix="dit-extract-") as folder:
            source = open_source(options.source, Path(folder))
            return preview(options, list_inputs(options, source, None), place)

    output = OutputFolder(path=options.store, split=options.source.split)
    status = _make_store(options, output, place, began)
    while options.features is not None and status == 0 and not output.is_finished:
        if options.shards.shard_range is not None:
            say("--features come when all latents are there: run the same command again then")
            return 0
        output.wait_for_others()
        status = _make_store(dataclasses.replace(options, overwrite=False), output, place, began)
    return status if status or options.features is None else add_features(options, options.store, place, began=began)


def _make_store(options: ExtractOptions, output: OutputFolder, place: Launch, began: float) -> int:
    """Make or continue the store of latents; gives the exit status."""
    # Which store it is, and what others have done about it
    if options.overwrite and not place.is_main:
        output.wait_for_main(began)
    output.check()
    output.put_in_place()
    source = open_source(options.source, output.remote_copies, left_out=options.store)
    is_anew = options.overwrite and place.is_main and output.holds_store
    if not is_anew and output.has_manifest and not output.lost_shards() and _is_done(options, output, source, place):
        return 0

    # The work, with others
    with output.occupied() as here:
        if is_anew:
            with output.exclusive(BEGINNING):
                inputs = _shared_inputs(options, output, source)
                output.begin_anew(here, _check(options, inputs, place))
        else:
            inputs = _shared_inputs(options, output, source)
        if options.preview is not None and place.is_main:
            preview(options, inputs, place)
        return _make(options, output, inputs, place)


def _is_done(options: ExtractOptions, output: OutputFolder, source: Source, place: Launch) -> bool:
    """Whether the finished store in the folder is the one that is asked for, and nothing is to replace it.

    Raises:
        UserError: it is another one.
    """
    inputs = None if source.is_remote else list_inputs(options, source, None)
    settings = settings_of(options, source, inputs)
    if output.replaces_by(settings):
        return False
    output.clean_up()
    output.check_settings(settings, read_manifest(output.path).extraction)
    if inputs is not None and output.is_finished:
        check_same_data(output, inputs.plan, inputs.loader)
    say(f"{output.path} is already finished; nothing to do")
    if inputs is not None and options.preview is not None and place.is_main:
        preview(options, inputs, place)
    return True


def check_same_data(output: OutputFolder, plan: Plan, loader: Loader) -> None:
    """Raise UserError unless a few inputs, of a few of the shards that are there, still have the bytes they had."""
    with output.unmoved():
        shards = shards_to_check(output.done(range(plan.shards)))
        records = [(shard, read_record(output.place, output.split, shard)) for shard in shards]
    check_inputs(records, plan, loader, output.path)


def _check(options: ExtractOptions, inputs: Inputs, place: Launch) -> dict[str, Any]:
    """Find everything that is asked for right before a store is begun anew; gives the settings."""
    settings = settings_of(options, inputs.loader.source, inputs)
    device, _ = choose_device(options.work.device, place)
    with arithmetic(device):
        vae_of(options, device)
    return settings | lane(options, device) | as_served(inputs.loader.source)


def _make(options: ExtractOptions, output: OutputFolder, inputs: Inputs, place: Launch) -> int:
    """Fill the store and finish it."""
    settings = settings_of(options, inputs.loader.source, inputs)
    plan_hash = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    output.check_settings(settings, output.recorded())
    check_same_data(output, inputs.plan, inputs.loader)
    if output.is_finished:
        if not output.lost_shards():
            say(f"{output.path} is already finished; nothing to do")
            return 0
        output.reopen()

    # The shards that are missing
    say_unfollowed({"precision": "--encode-dtype", "dynamo": "--compile"})
    device, reason = choose_device(options.work.device, place)
    settings |= lane(options, device)
    with arithmetic(device):
        beside = features_bytes(options, device)
        vae = vae_of(options, device)
        say(f"encoding on {device} ({reason}) in {options.work.encode_dtype}")
        output.begin(settings | as_served(inputs.loader.source), plan_hash)
        with StopRequest() as stop:
            fill_missing(options, output, inputs, plan_hash, vae, stop, features_bytes=beside)
    if stop.signal:
        done = len(output.done(range(inputs.plan.shards)))
        again = "run the same command again" + (", without --overwrite," if options.overwrite else "")
        say(f"stopped; {done} of {inputs.plan.shards} shards are in place; {again} to continue")
        return stop.exit_status

    # The manifest
    description = describe_store(
        options, settings, plan_hash, vae, classes=inputs.classes, class_ids=inputs.listing.class_ids
    )
    return finish(output, inputs.plan, description, allow_skips=options.work.allow_skips)


def fill_missing(
    options: ExtractOptions,
    output: Output,
    inputs: Inputs,
    plan_hash: str,
    vae: Vae,
    stop: StopRequest,
    *,
    features_bytes: int = 0,
) -> None:
    """Make the shards that are missing."""
    span = options.shards.span(inputs.plan.shards)
    if len(output.done(span)) == len(span):
        return
    with Encoder(
        vae,
        batch_size=options.work.batch_size,
        flip=options.pixels.flip,
        store_dtype=DTYPES[options.shards.store_dtype],
        views=len(options.pixels.views),
        image_px=options.pixels.image_size,
        compiled=options.work.compile,
    ) as encoder:
        job = ExtractJob(
            output=output,
            span=span,
            rows=inputs.plan.rows,
            load=inputs.loader,
            key=inputs.loader.key,
            encoder=encoder,
            write=partial(
                write_latents,
                output,
                inputs.loader,
                shard_format=options.shards.format,
                kind=vae.kind,
                plan=plan_hash,
            ),
            store_dtype=options.shards.store_dtype,
            workers=options.work.workers or cores_of_this_process(),
            fail_on_error=options.work.on_error == "fail",
        )
        amount = Amount(plan=inputs.plan, span=span, sample_bytes=encoder.sample_bytes, features_bytes=features_bytes)
        with ExtractProgress(
            output, amount, batches_ahead=encoder.batches_ahead, anyway=options.source.anyway
        ) as progress:
            fill(job, stop, progress)
    say(f"{progress.images:,} images encoded here in {duration(progress.seconds)}, {progress.skipped} left out")


def finish(output: OutputFolder, plan: Plan, description: StoreDescription, *, allow_skips: float) -> int:
    """Write the manifest if every shard is in place and few enough inputs were left out; gives the exit status.

    Raises:
        UserError: more inputs were left out than --allow-skips permits, or a shard is damaged.
    """
    if output.lacks_shards(plan.shards):
        return 0
    with output.exclusive("finish"):
        output.put_in_place()  # by a process that was killed meanwhile
        records = [_record(output, shard, description.plan) for shard in range(plan.shards)]
        skipped = [entry for record in records for entry in record.skipped]
        if len(skipped) > allow_skips * plan.samples:
            raise UserError(too_many(plan, records, allow_skips, listed_in=output.write_skipped(records)))
        manifest = finish_store(output.place, description, shards=plan.shards)
        output.put_in_place()
    assert manifest is not None
    left_out = f"; {len(skipped)} left out, skipped.jsonl says why" if skipped else ""
    finished = f"{output.path} is finished: {manifest.samples:,} samples, {plan.shards} shards{left_out}"
    say(finished, every_process=True)
    return 0


def preview(options: ExtractOptions, inputs: Inputs, place: Launch) -> int:
    """Draw what --preview asks for; the exit status."""
    assert options.preview is not None
    device, _ = choose_device(options.work.device, place)
    with arithmetic(device):
        draw_preview(options.preview, inputs.loader, inputs.plan, vae_of(options, device), count=options.preview_images)
    return 0


# ---- what is asked for


def _shared_inputs(options: ExtractOptions, output: OutputFolder, source: Source) -> Inputs:
    """The inputs, listed by one process and read from its cache by the others."""
    with output.exclusive("listing"):
        return list_inputs(options, source, output.listing_cache)


def settings_of(options: ExtractOptions, source: Source, inputs: Inputs | None) -> dict[str, Any]:
    """All that decides about a store's bytes, by flag; without what the data decides where it is not listed."""
    pixels, shards = options.pixels, options.shards
    settings: dict[str, Any] = {
        "split": options.source.split,
        "limit": options.source.limit,
        "vae": fingerprint(find_folder(options.vae)[0]),
        "image-size": pixels.image_size,
        "crop": pixels.crop,
        "crops": pixels.crop_count,
        "flip": pixels.flip,
        "format": shards.format,
        "samples-per-shard": shards.samples_per_shard,
        "encode-dtype": options.work.encode_dtype,
        "store-dtype": shards.store_dtype,
        "seed": shards.seed,
    }
    settings |= source.settings
    if inputs is not None:
        names = json.dumps(inputs.classes).encode()
        settings |= {
            "data": inputs.listing.sha256,
            "class-names": hashlib.sha256(names).hexdigest(),
        }
    return settings


def lane(options: ExtractOptions, device: torch.device) -> dict[str, Any]:
    """The setting that keeps batches of two sizes out of one store, where the default depends on the image's size."""
    return {} if device.type == "cpu" else {LANE: options.work.batch_size or lane_of(device, options.pixels.image_size)}


def as_served(source: Source) -> dict[str, Any]:
    """The setting that keeps tars of before and after they were replaced on a server out of one store."""
    served = source.as_served
    return {} if served is None else {AS_SERVED: hashlib.sha256(served.encode()).hexdigest()}


def vae_of(options: ExtractOptions, device: torch.device) -> Vae:
    """The encoder, on its device.

    Raises:
        UserError: it is not to be found, or the image size does not suit it.
    """
    vae = load_vae(options.vae, device=device, dtype=DTYPES[options.work.encode_dtype])
    vae.check_size(options.pixels.image_size, options.pixels.image_size)
    return vae


def describe_store(
    options: ExtractOptions,
    settings: Mapping[str, Any],
    plan_hash: str,
    vae: Vae,
    *,
    classes: Sequence[str],
    class_ids: Sequence[str],
) -> StoreDescription:
    """What the manifest will say, apart from the shards.

    Args:
        options: what was asked for.
        settings: all that decides about the store's bytes; kept in the manifest to know the store again.
        plan_hash: what marks the shards of this store.
        vae: what made the latents.
        classes: readable names, index = label.
        class_ids: folder names or synsets, same order.
    """
    side = options.pixels.image_size // vae.downsample
    return StoreDescription(
        split=options.source.split,
        shard_format=options.shards.format,
        latent=LatentSpec(
            kind=vae.kind,
            channels=vae.channels,
            height=side,
            width=side,
            dtype=options.shards.store_dtype,
            downsample=vae.downsample,
        ),
        views=options.pixels.views,
        image={"size": options.pixels.image_size, "crop": options.pixels.crop},
        vae=vae.describe(),
        classes=classes,
        class_ids=class_ids,
        seed=options.shards.seed,
        plan=plan_hash,
        extra={"extraction": dict(settings)},
    )


# ---- what is there


def _record(output: OutputFolder, shard: int, plan_hash: str) -> ShardRecord:
    record = read_record(output.place, output.split, shard, plan=plan_hash)
    if record is None:
        output.forget(shard)
        raise UserError(
            f"shard {shard} in {output.path} is missing or has another size than its record says; the record has been "
            "removed, run the same command again to make the shard anew"
        )
    return record


def too_many(plan: Plan, records: Sequence[ShardRecord], allowed: float, *, listed_in: object) -> str:
    """The sentence for too many bad inputs; they are listed in skipped.jsonl all the same."""
    skipped = [reason for record in records for _, reason in record.skipped]
    share = len(skipped) / plan.samples
    reasons = Counter(skipped).most_common(3)
    return (
        f"{len(skipped)} of {plan.samples} inputs ({share:.1%}) were left out, more than --allow-skips {allowed:g} "
        f"permits ({'; '.join(f'{count}× {reason}' for reason, count in reasons)}); {listed_in} lists them. Every "
        f"shard is in place, but the store has no manifest: run the same command with --allow-skips {_above(share)} to "
        "finish it as it is, or mend the inputs and start anew with --overwrite"
    )


def _above(share: float) -> str:
    """The share, rounded up to a number that is easy to type."""
    return f"{min(1.0, (int(share * 1000) + 1) / 1000):g}"
