"""The end of an extraction: once every shard is in place, whichever process sees it first writes the manifest."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from extract.options import ExtractOptions
from extract.output import OutputFolder
from extract.plan import Plan
from pipeline.console import say
from pipeline.errors import UserError
from pipeline.latents.manifest import LatentSpec
from pipeline.latents.records import ShardRecord, read_record
from pipeline.latents.writer import StoreDescription, finish_store
from pipeline.vae import Vae


def finish(output: OutputFolder, plan: Plan, description: StoreDescription, *, allow_skips: float) -> int:
    """Write the manifest if every shard is in place and few enough inputs were left out; gives the exit status.

    Raises:
        UserError: more inputs were left out than --allow-skips permits, or a shard is damaged.
    """
    missing = plan.shards - len(output.done(range(plan.shards)))
    if missing:
        say(
            f"{missing} of {plan.shards} shards are not in place yet: other processes are at them, or they are outside "
            "--shard-range; whichever process makes the last one finishes the store"
        )
        return 0
    with output.turn("finish"):
        records = [_record(output, shard, description.plan) for shard in range(plan.shards)]
        skipped = [entry for record in records for entry in record.skipped]
        if len(skipped) > allow_skips * plan.samples:
            raise UserError(_too_many(output, plan, records, allow_skips))
        manifest = finish_store(output.path, description, shards=plan.shards)
    assert manifest is not None
    left_out = f"; {len(skipped)} left out, skipped.jsonl says why" if skipped else ""
    finished = f"{output.path} is finished: {manifest.samples:,} samples, {plan.shards} shards{left_out}"
    say(finished, every_process=True)
    return 0


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


def _record(output: OutputFolder, shard: int, plan_hash: str) -> ShardRecord:
    record = read_record(output.path, output.split, shard, plan=plan_hash)
    if record is None:
        output.forget(shard)
        raise UserError(
            f"shard {shard} in {output.path} is missing or has another size than its record says; the record has been "
            "removed, run the same command again to make the shard anew"
        )
    return record


def _too_many(output: OutputFolder, plan: Plan, records: Sequence[ShardRecord], allowed: float) -> str:
    """The sentence for too many bad inputs; they are listed in skipped.jsonl all the same."""
    path = output.write_skipped(records)
    skipped = [reason for record in records for _, reason in record.skipped]
    share = len(skipped) / plan.samples
    reasons = Counter(skipped).most_common(3)
    return (
        f"{len(skipped)} of {plan.samples} inputs ({share:.1%}) were left out, more than --allow-skips {allowed:g} "
        f"permits ({'; '.join(f'{count}× {reason}' for reason, count in reasons)}); {path} lists them. Every shard is "
        f"in place, but the store has no manifest: run the same command with --allow-skips {_above(share)} to finish "
        "it as it is, or mend the inputs and start anew with --overwrite"
    )


def _above(share: float) -> str:
    """The share, rounded up to a number that is easy to type."""
    return f"{min(1.0, (int(share * 1000) + 1) / 1000):g}"
