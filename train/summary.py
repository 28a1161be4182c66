"""What is said before the first step: the run in a few aligned lines, and where it leaves its preset."""

from collections.abc import Mapping

import yaml

from pipeline.dit import DiTConfig
from pipeline.dit.macs import count_macs, count_parameters
from pipeline.latents import Manifest
from pipeline.runtime.console import say, warn
from pipeline.runtime.units import factors, size
from train.build import PRESETS_FOLDER
from train.checkpointing import TrainState
from train.data import BatchShard, DataOrder
from train.distributed import Hardware
from train.options import ModelOptions, TrainOptions, plain_values

# The images a preset is meant for; its settings are tuned to them.
_MEANT_FOR_PX = {"paper-256": 256, "paper-512": 512, "modern-256": 256, "modern-512": 512}


def say_summary(
    options: TrainOptions,
    manifest: Manifest,
    config: DiTConfig,
    state: TrainState,
    hardware: Hardware,
    shard: BatchShard,
    order: DataOrder,
    *,
    origin: str,
) -> None:
    """The start-up summary."""
    optimizer, epochs = options.optimizer, options.optimizer.steps * shard.batch_size / order.samples
    say_aligned(
        describe_work(options, manifest, config, hardware, shard, order)
        | {
            "processes": state.placement.description,
            "optimizer": f"{state.optimizer.description}, lr {optimizer.lr:g} {optimizer.lr_schedule}",
            "run": f"{options.run.out}, {origin}; until step {optimizer.steps:,} ({epochs:,.1f} epochs)",
        }
    )
    for difference in differences_from_preset(options, manifest):
        warn(difference)


def describe_work(
    options: TrainOptions,
    manifest: Manifest,
    config: DiTConfig,
    hardware: Hardware,
    shard: BatchShard,
    order: DataOrder,
) -> dict[str, str]:
    """{name: text} of what is trained on what and where."""
    latent, vae = manifest.latent, manifest.vae
    parts = f"{shard.micro_size} per process × {shard.accumulation} accumulation × {shard.processes} processes"
    return {
        "model": f"{options.model.title}, {count_parameters(config) / 1e6:.1f} M parameters, "
        f"{count_macs(config) / 1e9:.2f} GFLOPs forward (multiply-adds) per image",
        "batch": f"{parts} = {shard.batch_size}",
        "store": f"{options.data.latents}: {order.samples:,} samples, {len(manifest.classes)} classes",
        "latents": f"{latent.channels}×{latent.height}×{latent.width} {latent.dtype}, "
        f"views {', '.join(manifest.views)}",
        "vae": f"{vae.name} ({(vae.sha256 or 'fingerprint not recorded')[:24]}), "
        f"scale {factors(vae.scaling_factor)}, shift {factors(vae.shift_factor)}",
        "device": hardware.reason,
        **_describe_features(options.model, config),
        **_describe_class_token(options.model, config),
        **_describe_averages(options, config),
    }


def _describe_features(options: ModelOptions, config: DiTConfig) -> dict[str, str]:
    """What --align-features does, if it is asked for."""
    if not config.align_features:
        return {}
    until = "to the end" if options.features_until is None else f"until step {options.features_until:,}"
    return {
        "features": f"{config.align_features} numbers for a token after block {config.middle_block}, "
        f"weight {options.features_weight:g}, {until}"
    }


def _describe_class_token(options: ModelOptions, config: DiTConfig) -> dict[str, str]:
    """What --class-token adds, if it is asked for."""
    if not config.class_token:
        return {}
    return {"class token": f"{config.class_token} numbers as one more token, weight {options.class_token_weight:g}"}


def _describe_averages(options: TrainOptions, config: DiTConfig) -> dict[str, str]:
    """What the snapshots of power-function averages will take, which --keep-last never removes, if any are taken."""
    average, steps = options.average, options.optimizer.steps
    every = options.run.save_every if average.ema_snapshot_every is None else average.ema_snapshot_every
    if not average.sigmas or not every:
        return {}
    one = 2 * len(average.sigmas) * count_parameters(config)
    widths = ", ".join(f"{sigma:g}" for sigma in average.sigmas)
    return {
        "averages": f"of widths {widths} every {every:,} steps in {options.run.out}/averages: {size(one)} each time, "
        f"{size(one * (steps // every))} until step {steps:,}, all kept"
    }


def say_aligned(lines: Mapping[str, str]) -> None:
    """One line per name, texts aligned."""
    width = max(map(len, lines))
    say(*(f"{name:<{width}}  {text}" for name, text in lines.items()))


def differences_from_preset(options: TrainOptions, manifest: Manifest) -> list[str]:
    """One sentence per setting, and per property of the store, that is not what the named preset means."""
    if options.recipe is None:
        return []
    path = PRESETS_FOLDER / f"{options.recipe}.yaml"
    if not path.is_file():
        return [f"there is no preset {options.recipe}, so nothing is compared with it"]
    meant, now = yaml.safe_load(path.read_text(encoding="utf-8")), plain_values(options)
    found = [
        f"--{name} is {now[name]}, but {options.recipe} means {value}"
        for name, value in meant.items()
        if now[name] != value
    ]
    pixels = manifest.image.size
    if _MEANT_FOR_PX.get(options.recipe, pixels) != pixels:
        found.append(f"the store's images have {pixels} px, but {options.recipe} means {_MEANT_FOR_PX[options.recipe]}")
    if meant.get("flip") and not any(view.endswith("-hflip") for view in manifest.views):
        found.append(f"the store has no mirrored views, but {options.recipe} means flips; extract with --flip")
    return found
