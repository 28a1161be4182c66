"""What is said before the first step: the run in a few aligned lines, and where it leaves its preset."""

from collections.abc import Mapping

import yaml

from pipeline.dit import DiTConfig
from pipeline.dit.macs import count_macs, count_parameters
from pipeline.latents import Manifest
from pipeline.runtime.console import say, warn
from train.build import PRESETS_FOLDER
from train.checkpointing import TrainState
from train.data import BatchShard, DataOrder
from train.distributed import Hardware
from train.options import TrainOptions, plain_values

# The images a preset is meant for; its settings are tuned to them.
_MEANT_FOR_PX = {"paper-256": 256, "paper-512": 512}


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
            "optimizer": f"AdamW ({state.optimizer.kernel}), lr {optimizer.lr:g} {optimizer.lr_schedule}",
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
    latent, vae = manifest.latent, manifest["vae"]
    parts = f"{shard.micro_size} per process × {shard.accumulation} accumulation × {shard.processes} processes"
    return {
        "model": f"{options.model.model}, {count_parameters(config) / 1e6:.1f} M parameters, "
        f"{count_macs(config) / 1e9:.2f} GFLOPs forward (multiply-adds) per image",
        "batch": f"{parts} = {shard.batch_size}",
        "store": f"{options.data.latents}: {order.samples:,} samples, {len(manifest['classes'])} classes",
        "latents": f"{latent.channels}×{latent.height}×{latent.width} {latent.dtype}, "
        f"views {', '.join(manifest['views'])}",
        "vae": f"{vae['name']} ({(vae['sha256'] or 'fingerprint not recorded')[:24]}), "
        f"scale {vae['scaling_factor']}, shift {vae['shift_factor']}",
        "device": hardware.reason,
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
    meant, now = yaml.safe_load(path.read_text()), plain_values(options)
    found = [
        f"--{name} is {now[name]}, but {options.recipe} means {value}"
        for name, value in meant.items()
        if now[name] != value
    ]
    size = manifest["image"]["size"]
    if _MEANT_FOR_PX.get(options.recipe, size) != size:
        found.append(f"the store's images have {size} px, but {options.recipe} means {_MEANT_FOR_PX[options.recipe]}")
    if meant.get("flip") and not any(view.endswith("-hflip") for view in manifest["views"]):
        found.append(f"the store has no mirrored views, but {options.recipe} means flips; extract with --flip")
    return found
