"""The parts of a run from its options: the store, checked, the network for it, the process, and the first weights."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from pipeline.checkpoint import Stored, read_stored
from pipeline.checkpoint.info import read_info
from pipeline.diffusion.flow import shift_for
from pipeline.diffusion.process import Process, process_from_flags
from pipeline.dit import PRESETS, DiT, DiTConfig
from pipeline.dit.config import BlockOptions
from pipeline.features.store import FeatureStore, features_faults
from pipeline.features.targets import LEAST_DEVIATION, FeatureTargets, TokenNormalization
from pipeline.latents import LatentStore, Manifest
from pipeline.latents.manifest import make_manifest
from pipeline.recorded import Factor, RecordedVae
from pipeline.runtime.console import nearest, refuse_unless, say, warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.units import factors
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
        check_labels(store.labels().numpy(), len(store.manifest.classes), path)
    return store


def open_features(options: TrainOptions, manifest: Manifest) -> FeatureStore | None:
    """The features beside the store that --align-features or --class-token ask for, all bytes checked by --verify-data.

    Raises:
        UserError: the store has none, or they are damaged or of other samples, or have no class token and need one.
    """
    if not options.model.align_features and not options.model.class_token:
        return None
    path, cache = options.data.latents, options.data.cache
    features = FeatureStore(path, manifest, cache=cache)
    faults = features_faults(path, manifest, cache) if options.data.verify_data else []
    if faults:
        raise UserError(f"{features.path} is damaged: {'; '.join(faults)}; restore what is named, or make it again")
    if options.model.align_features and not features.manifest.columns.dim:
        raise UserError(
            f"--align-features needs patches, and {features.path} holds the class token alone; make features "
            f"with patches by dit-extract --add-features --features-dim 64 --overwrite, or leave the flag away"
        )
    if options.model.class_token and not features.manifest.columns.cls:
        raise UserError(
            f"--class-token needs one stored, and {features.path} has none, as its encoder "
            f"{features.manifest.encoder.name} has none; take an encoder that has, or leave the flag away"
        )
    return features


def token_normalization(
    features: FeatureStore | None, config: DiTConfig, going_on_from: Path | None, device: torch.device
) -> TokenNormalization | None:
    """How --class-token's tokens are fed: as the checkpoint records it that a run goes on from, else as measured.

    Raises:
        UserError: the checkpoint does not say it.
    """
    if features is None or not config.class_token:
        return None
    if going_on_from is None:
        return TokenNormalization.measured(features).to(device)
    recorded = read_info(going_on_from).training.class_token
    if recorded is None or not len(recorded.mean) == len(recorded.std) == config.class_token:
        raise UserError(
            f"{going_on_from} does not say how its {config.class_token} numbers of a class token are fed "
            f"(training.class_token of its config.json); restore it, or go on from another checkpoint"
        )
    return TokenNormalization(mean=torch.tensor(recorded.mean), std=torch.tensor(recorded.std)).to(device)


def feature_targets(features: FeatureStore | None, config: DiTConfig, device: torch.device) -> FeatureTargets | None:
    """What --align-features wants, if it is asked for."""
    return None if features is None or not config.align_features else FeatureTargets.on(device, features, config.grid)


def held_out_tokens(path: str, manifest: Manifest, options: TrainOptions, ours: FeatureStore) -> FeatureStore:
    """The class tokens of a --validation store.

    Raises:
        UserError: it has none, or another encoder's than the training store's.
    """
    theirs = FeatureStore(path, manifest, cache=options.data.cache)
    pairs = [(each.manifest.encoder.sha256, each.manifest.columns.cls) for each in (ours, theirs)]
    if pairs[0] != pairs[1]:
        raise UserError(
            f"{theirs.path} are features of another encoder ({theirs.manifest.encoder.name}) than --latents has "
            f"({ours.manifest.encoder.name}), so --class-token cannot be validated on them; make them by that one"
        )
    return theirs


def data_identity(manifest: Manifest, features: FeatureStore | None = None) -> str:
    """A fingerprint of a store's contents, wherever it lies, and of the features that are learned from."""
    digest = hashlib.sha256(json.dumps(dict(manifest), sort_keys=True).encode())
    if features is not None:
        digest.update(features.manifest.to_bytes())
    return digest.hexdigest()


def as_fed(manifest: Manifest, options: DataOptions) -> Manifest:
    """The manifest with the scale and shift by which training feeds the latents, and sampling gives them back.

    With --latent-normalization channel these are 1 / deviation and mean of each channel, from the store's own
    statistics; a channel that does not vary is only shifted.
    """
    if options.latent_normalization == "vae":
        return manifest
    deviations = manifest.statistics.std
    least = LEAST_DEVIATION * max(deviations)
    own = {
        "scaling_factor": [1 / value if value > least else 1.0 for value in deviations],
        "shift_factor": list(manifest.statistics.mean),
    }
    return make_manifest({**manifest, "vae": {**manifest.vae, **own}})


def network_config(
    options: ModelOptions, manifest: Manifest, process: Process, features: FeatureStore | None = None
) -> DiTConfig:
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
        num_classes=len(manifest.classes),
        class_dropout_prob=options.class_dropout,
        learn_sigma=process.learns_variance,
        middle_head=options.middle_head,
        align_latent=options.align_latent,
        align_features=features.manifest.encoder.width if features is not None and options.align_features else 0,
        class_token=features.manifest.columns.cls if features is not None and options.class_token else 0,
        **options.sizes,
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(BlockOptions)},
    )


def refuse_too_wide_latents(config: DiTConfig, process: Process, *, allowed: bool) -> None:
    """Say that a network will not learn to predict noise of more numbers to a token than it is wide.

    Its last layer gives what lies in as many directions as it is wide, and noise lies in all (RAE, arXiv 2510.11690).
    Where smaller patches would do it is only a warning: networks have been compared under it, and learn something.

    Raises:
        UserError: the channels alone are more than the width, and that is not `allowed`.
    """
    width = config.head_width or config.hidden_size
    if process.prediction == "x0" or config.token_values <= width:
        return
    has = f"a token has {config.token_values:,} numbers of the latent and the network is {width:,} wide"
    sentence = f"{has}: too narrow to predict the noise in them, so it is known not to learn"
    instead = f"--prediction x0 with --objective flow, or --head-width of {config.token_values:,} or more"
    if config.in_channels <= width:
        warn(f"{sentence} all of it; use a smaller --patch-size, {instead}")
    else:
        refuse_unless(allowed, sentence, f"; use {instead} (or pass --anyway to try all the same)")


def process_of(options: ObjectiveOptions, manifest: Manifest) -> Process:
    """The process to learn; with --time-shift auto it is shifted by the size of the store's latents."""
    if options.time_shift == "auto":
        options = dataclasses.replace(options, time_shift=shift_for(*_shape(manifest)))
    return process_from_flags(options.objective, options)


def normalization_of(manifest: Manifest, device: torch.device) -> LatentNormalization:
    """How the store's latents become the network's."""

    def on_device(factor: Factor) -> float | Tensor:
        return torch.tensor(factor, device=device) if isinstance(factor, tuple) else factor

    scale, shift = manifest.vae.scaling_factor, manifest.vae.shift_factor
    return LatentNormalization(
        kind=manifest.latent.kind,
        scaling_factor=on_device(scale),
        shift_factor=None if shift is None else on_device(shift),
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
        _check_vae(options.init_from, stored.info.vae, manifest.vae)
    _say_other_objective(options.init_from, stored, process)
    report = fit_weights(
        stored.state,
        network,
        source_config=stored.config,
        source_names=(stored.info.classes, stored.info.class_ids),
        target_names=(manifest.classes, manifest.class_ids),
        origin=options.init_from,
    )
    first, *rest = report.lines()
    say(f"weights from {options.init_from}: {first}", *rest)


def _say_other_objective(origin: str, stored: Stored, process: Process) -> None:
    """A word where the weights were, or may have been, trained to give something else than this run wants of them."""
    theirs = stored.info.process
    same = theirs.objective == process.objective
    flags = {k: v for k, v in {"prediction": "prediction", "path": "flow-path"}.items() if same and hasattr(theirs, k)}
    before, wanted = (
        " ".join([kind.objective, *(f"--{flag} {getattr(kind, name)}" for name, flag in flags.items())])
        for kind in (theirs, process)
    )
    if stored.origin.known and stored.origin.note is None and before != wanted:
        warn(f"--init-from {origin} was trained for --objective {before}, this run is for {wanted}: it learns anew")
    elif not stored.origin.known:
        say(f"note: {origin} does not say what it was trained for; this run goes on from it only if for {wanted}")


def _check_vae(origin: str, theirs: RecordedVae, ours: RecordedVae) -> None:
    pairs = {key: (getattr(theirs, key), getattr(ours, key)) for key in ("sha256", "scaling_factor", "shift_factor")}
    if None in pairs["sha256"]:
        del pairs["sha256"]  # not known; a shift of None is 0
    differing = [
        f"its {key} is {factors(their)} and the store's is {factors(our)}"
        for key, (their, our) in pairs.items()
        if (their or 0) != (our or 0)
    ]
    if differing:
        raise UserError(
            f"--init-from {origin} was trained on latents of the VAE {theirs.name}, the store's are of "
            f"{ours.name}: {'; '.join(differing)}; extract with its VAE, or pass --allow-other-vae"
        )


def checkpoint_info(
    options: TrainOptions,
    manifest: Manifest,
    config: DiTConfig,
    process: Process,
    features: FeatureStore | None,
    class_token: TokenNormalization | None,
    identity: str,
) -> dict[str, Any]:
    """What a checkpoint says about itself, all but the step; the manifest is `as_fed`, `identity` that of the data."""
    latent = manifest.latent
    return {
        "step": 0,
        "model": config.to_json(),
        "diffusion": process.to_json(),
        "classes": list(manifest.classes),
        "class_ids": list(manifest.class_ids),
        "latent": {
            "kind": latent.kind,
            "channels": latent.channels,
            "height": latent.height,
            "width": latent.width,
            "downsample": latent.downsample,
        },
        "vae": dict(manifest.vae),
        "image": dict(manifest.image),
        "training": {
            "model": options.model.title,
            "seed": options.data.seed,
            "batch_size": options.optimizer.batch_size,
            "lr": options.optimizer.lr,
            "lr_schedule": options.optimizer.lr_schedule,
            **({"optimizer": "muon"} if options.optimizer.optimizer == "muon" else {}),
            "ema_decay": options.average.ema_decay,
            "ema_warmup": options.average.ema_warmup,
            **({"ema_sigma": list(options.average.sigmas)} if options.average.sigmas else {}),
            "class_dropout": options.model.class_dropout,
            "mixed_precision": options.hardware.mixed_precision,
            **({} if options.data.latent_normalization == "vae" else {"latent_normalization": "channel"}),
            "samples": manifest.samples,
            "views": list(manifest.views),
            "data_identity": identity,
            **({} if features is None else {"encoder": msgspec.to_builtins(features.manifest.encoder)}),
            **({} if class_token is None else {"class_token": class_token.to_json()}),
        },
    }


def check_same_kind(ours: Manifest, theirs: Manifest, path: str) -> None:
    """Raise UserError unless a validation store holds the same kind of latents and classes as the training store."""
    pairs = {
        "the VAE's sha256": (ours.vae.sha256, theirs.vae.sha256),
        "the latent's kind": (ours.latent.kind, theirs.latent.kind),
        "the latent's shape": (_shape(ours), _shape(theirs)),
        "the classes": (list(ours.class_ids), list(theirs.class_ids)),
    }
    differing = [name for name, (here, there) in pairs.items() if here != there]
    if differing:
        raise UserError(
            f"--validation {path} does not fit --latents: they differ in {', '.join(differing)}; extract both with the "
            f"same VAE, image size and classes"
        )


def _shape(manifest: Manifest) -> tuple[int, int, int]:
    return manifest.latent.channels, manifest.latent.height, manifest.latent.width
