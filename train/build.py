"""The parts of a run from its options: the store, checked, the network for it, the process, and the first weights."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import Stored, read_stored
from pipeline.diffusion.process import Process, process_from_flags
from pipeline.dit import PRESETS, DiT, DiTConfig
from pipeline.dit.config import BlockOptions
from pipeline.latents import LatentStore, Manifest
from pipeline.runtime.console import nearest, say, warn
from pipeline.runtime.errors import UserError
from train.data import check_labels
from train.init_from import fit_weights
from train.losses import LatentNormalization
from train.options import DataOptions, ModelOptions, ObjectiveOptions, TrainOptions

PRESETS_FOLDER = Path(__file__).parent / "presets"


def open_store(path: str, options: DataOptions) -> LatentStore:
    """The store, its labels (and with --verify-data its every byte) checked.

    Raises:
        UserError: it is not finished or damaged, or holds labels that are no classes of it.
    """
    store = LatentStore(path, cache=options.cache)
    if options.verify_data:
        say(f"comparing {len(store.manifest.shards)} shards of {path} with their checksums")
        store.verify()
    if "://" not in path:  # a remote store's are checked batch by batch: all labels at once are all of its shards
        check_labels(store.labels().numpy(), len(store.manifest["classes"]), path)
    return store


def data_identity(manifest: Manifest) -> str:
    """A fingerprint of a store's contents, wherever it lies."""
    return hashlib.sha256(json.dumps(dict(manifest), sort_keys=True).encode()).hexdigest()


def network_config(options: ModelOptions, manifest: Manifest, process: Process) -> DiTConfig:
    """The network for this store and objective.

    Raises:
        UserError: there is no such model, or the store's grid does not divide by its patch.
    """
    if options.model not in PRESETS:
        close = nearest(options.model, PRESETS)
        raise UserError(
            f"--model {options.model} does not exist; {f'did you mean {close[0]}? ' if close else ''}"
            f"there are {', '.join(PRESETS)}"
        )
    latent = manifest.latent
    return DiTConfig.from_preset(
        options.model,
        input_size=latent.height if latent.height == latent.width else (latent.height, latent.width),
        in_channels=latent.channels,
        num_classes=len(manifest["classes"]),
        class_dropout_prob=options.class_dropout,
        learn_sigma=process.learns_variance,
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(BlockOptions)},
    )


def process_of(options: ObjectiveOptions) -> Process:
    """The process to learn."""
    return process_from_flags(options.objective, options)


def normalization_of(manifest: Manifest, device: torch.device) -> LatentNormalization:
    """How the store's latents become the network's."""

    def on_device(factor: float | list[float] | None) -> float | Tensor | None:
        return torch.tensor(factor, device=device) if isinstance(factor, list) else factor

    scale = on_device(manifest["vae"]["scaling_factor"])
    assert scale is not None, "a manifest is checked when it is read"
    return LatentNormalization(
        kind=manifest.latent.kind, scaling_factor=scale, shift_factor=on_device(manifest["vae"]["shift_factor"])
    )


def start_weights(network: DiT, options: ModelOptions, manifest: Manifest, process: Process) -> None:
    """Fill the network from --init-from, as far as it fits, and print what became of each tensor.

    Raises:
        UserError: the checkpoint cannot be read or does not fit, or was made with other latents than the store's.
    """
    if options.init_from is None:
        return
    stored = read_stored(options.init_from, weights=options.init_weights, verify=options.verify_weights)
    if not options.allow_other_vae:
        _check_vae(options.init_from, stored.info.get("vae") or {}, manifest["vae"])
    _say_other_objective(options.init_from, stored, process)
    report = fit_weights(
        stored.state,
        network,
        source_config=stored.config,
        source_names=(stored.info["classes"], stored.info["class_ids"]),
        target_names=(manifest["classes"], manifest["class_ids"]),
        origin=options.init_from,
    )
    first, *rest = report.lines()
    say(f"weights from {options.init_from}: {first}", *rest)


def _say_other_objective(origin: str, stored: Stored, process: Process) -> None:
    """A word where the weights were, or may have been, trained to give something else than this run wants of them."""
    before, wanted = stored.info["diffusion"]["objective"], process.objective
    if stored.origin.known and stored.origin.note is None and before != wanted:
        warn(f"--init-from {origin} was trained for --objective {before}, this run is for {wanted}: it learns anew")
    elif not stored.origin.known:
        say(f"note: {origin} does not say what it was trained for; this run goes on from it only if for {wanted}")


def _check_vae(origin: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    known = [key for key in ("sha256", "scaling_factor") if theirs.get(key) is not None and ours.get(key) is not None]
    known += ["shift_factor"] if "scaling_factor" in known else []  # None is a shift of 0, not an unknown one
    differing = [
        f"its {key} is {theirs.get(key)} and the store's is {ours.get(key)}"
        for key in known
        if (theirs.get(key) or 0) != (ours.get(key) or 0)
    ]
    if differing:
        raise UserError(
            f"--init-from {origin} was trained on latents of the VAE {theirs.get('name')}, the store's are of "
            f"{ours.get('name')}: {'; '.join(differing)}; extract with its VAE, or pass --allow-other-vae"
        )


def checkpoint_info(options: TrainOptions, manifest: Manifest, config: DiTConfig, process: Process) -> dict[str, Any]:
    """What a checkpoint says about itself, all but the step."""
    latent = manifest.latent
    return {
        "step": 0,
        "model": config.to_json(),
        "diffusion": process.to_json(),
        "classes": list(manifest["classes"]),
        "class_ids": list(manifest["class_ids"]),
        "latent": {
            "kind": latent.kind,
            "channels": latent.channels,
            "height": latent.height,
            "width": latent.width,
            "downsample": latent.downsample,
        },
        "vae": dict(manifest["vae"]),
        "image": dict(manifest["image"]),
        "training": {
            "model": options.model.model,
            "seed": options.data.seed,
            "batch_size": options.optimizer.batch_size,
            "lr": options.optimizer.lr,
            "lr_schedule": options.optimizer.lr_schedule,
            "ema_decay": options.average.ema_decay,
            "ema_warmup": options.average.ema_warmup,
            "class_dropout": options.model.class_dropout,
            "mixed_precision": options.hardware.mixed_precision,
            "samples": manifest.samples,
            "views": list(manifest["views"]),
            "data_identity": data_identity(manifest),
        },
    }


def check_same_kind(ours: Manifest, theirs: Manifest, path: str) -> None:
    """Raise UserError unless a validation store holds the same kind of latents and classes as the training store."""
    pairs = {
        "the VAE's sha256": (ours["vae"]["sha256"], theirs["vae"]["sha256"]),
        "the latent's kind": (ours.latent.kind, theirs.latent.kind),
        "the latent's shape": (_shape(ours), _shape(theirs)),
        "the classes": (list(ours["class_ids"]), list(theirs["class_ids"])),
    }
    differing = [name for name, (here, there) in pairs.items() if here != there]
    if differing:
        raise UserError(
            f"--validation {path} does not fit --latents: they differ in {', '.join(differing)}; extract both with the "
            f"same VAE, image size and classes"
        )


def _shape(manifest: Manifest) -> tuple[int, int, int]:
    return manifest.latent.channels, manifest.latent.height, manifest.latent.width
