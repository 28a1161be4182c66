"""A trained DiT on disk: written whole, read strictly, and every other form of it that exists read the same way.

A checkpoint folder holds config.json (network, process, classes, latent, VAE, …), model.safetensors (raw weights),
ema.safetensors, further averages as ema-NAME.safetensors, and state/ (what only resuming needs, never read here).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch import Tensor

from pipeline.checkpoint.tensor_files import SUFFIXES, join_names, load_tensors, read_safetensors, save_safetensors
from pipeline.diffusion.process import Process, make_process
from pipeline.dit import DiT, DiTConfig
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json

FORMAT: Final = "dit-checkpoint"
VERSION: Final = 1
# What config.json must hold, with the type of each value, and what must stand within some of them.
_NEEDED: dict[str, type] = {
    "step": int,
    "model": dict,
    "diffusion": dict,
    "classes": list,
    "class_ids": list,
    "latent": dict,
    "vae": dict,
    "image": dict,
    "training": dict,
}
_WITHIN = {"latent": ("kind", "channels", "height", "width", "downsample"), "image": ("size", "crop")}
_STEP_FOLDER = re.compile(r"step-(\d+)")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Stored(NamedTuple):
    """A network's weights as they lie on disk, in the release's names, and what is known of them."""

    state: dict[str, Tensor]
    config: DiTConfig
    info: dict[str, Any]
    """The content of a checkpoint's config.json; the release's facts for weights that came without one."""
    weights: str
    """Which weights these are: "raw", "ema", "ema-NAME"."""
    folder: Path | None
    """The checkpoint folder they came from; None for other people's forms."""
    diffusers: Path | None = None
    """The diffusers transformer folder they came from, if they did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A network ready to use, in eval mode on the CPU, and all that sampling needs to know."""

    model: DiT
    config: DiTConfig
    info: dict[str, Any]
    process: Process
    weights: str
    folder: Path | None


def write_model_files(
    folder: Path,
    *,
    info: Mapping[str, Any],
    model: Mapping[str, Tensor] | None,
    averages: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write config.json and the weight files into a folder that the caller publishes (`files.publish_folder`).

    Args:
        info: the content of config.json; format and version are set here.
        model: the raw weights, or None where only averages are known.
        averages: {"ema": …, "ema-NAME": …}.

    Raises:
        UserError: the disk is full or read-only.
    """
    missing = [key for key in _NEEDED if key not in info]
    assert not missing, f"a checkpoint's info lacks {missing}"
    assert all(name == "ema" or name.startswith("ema-") for name in averages), f"averages named {list(averages)}"
    for name, tensors in {**({"model": model} if model is not None else {}), **averages}.items():
        save_safetensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / "config.json", {"format": FORMAT, "version": VERSION, **_without_format(info)})


def _without_format(info: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if key not in {"format", "version"}}


def checkpoint_folders(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's whole checkpoints, oldest first."""
    found = []
    for folder in (run / "checkpoints").glob("step-*"):
        match = _STEP_FOLDER.fullmatch(folder.name)
        if match and (folder / "config.json").is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def newest_checkpoint(run: Path) -> Path | None:
    """The folder of a run's last whole checkpoint, or None."""
    folders = checkpoint_folders(run)
    return folders[-1][1] if folders else None


def load_checkpoint(path: str | Path, num_heads: int | None = None) -> tuple[DiT, DiTConfig]:
    """A network in eval mode and its configuration, from any form of checkpoint (see `read_checkpoint`); EMA weights.

    Args:
        num_heads: attention heads; needed only for a bare state dict of unknown width.

    Raises:
        UserError: as `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path, num_heads=num_heads)
    return checkpoint.model, checkpoint.config


def read_checkpoint(path: str | Path, *, weights: str = "ema", num_heads: int | None = None) -> Checkpoint:
    """A network in eval mode with all that sampling needs, from any form that exists.

    Forms: a run folder (its newest checkpoint), a checkpoint folder, one weight file of it, a bare state dict in the
    release's names (.pt, .pth, .safetensors), a diffusers DiT folder (pipeline or transformer), a Hub name of one.

    Args:
        weights: "ema", "raw", or the NAME of a further average.

    Raises:
        UserError: nothing is there, it is damaged or of an unknown version, the weights are not in it, or its tensors
            are not exactly those of its configuration.
    """
    stored = read_stored(path, weights=weights, num_heads=num_heads)
    return Checkpoint(
        model=build_model(stored, origin=path),
        config=stored.config,
        info=stored.info,
        process=make_process(stored.info["diffusion"]),
        weights=stored.weights,
        folder=stored.folder,
    )


def build_model(stored: Stored, *, origin: object) -> DiT:
    """The network of these weights, in eval mode.

    Raises:
        UserError: tensors are missing, surplus or of another shape; every one is listed.
    """
    model = DiT(stored.config, seed=None)
    load_strictly(model, stored.state, origin=origin)
    return model.eval()


def load_strictly(model: DiT, state: Mapping[str, Tensor], *, origin: object) -> None:
    """Copy a state dict into a network, if it has exactly the network's tensors; `pos_embed` is passed over.

    Raises:
        UserError: tensors are missing, surplus or of another shape; every one is listed.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state.items() if name != "pos_embed"}
    shapes = [
        f"{name} {found[name]} instead of {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    faults = {
        "of no floating-point type": [
            f"{name} {tensor.dtype}" for name, tensor in state.items() if not tensor.is_floating_point()
        ],
        "missing": wanted.keys() - found.keys(),
        "surplus": found.keys() - wanted.keys(),
        "of another shape": shapes,
    }
    if any(faults.values()):
        lists = "; ".join(f"{len(names)} {kind}: {join_names(names)}" for kind, names in faults.items() if names)
        raise UserError(f"{origin} does not fit its network and is not loaded: {lists}")
    model.load_state_dict({name: state[name] for name in wanted})


def read_stored(path: str | Path, *, weights: str = "ema", num_heads: int | None = None) -> Stored:
    """Weights and what is known of them, from any form, without building the network.

    Raises:
        UserError: nothing is there, it is damaged or of an unknown version, or the weights are not in it.
    """
    place = Path(path)
    if place.is_dir():
        return _from_folder(place, weights, num_heads)
    if place.is_file():
        return _from_file(place, weights, num_heads)
    if HUB_NAME.fullmatch(str(path)) and place.suffix not in SUFFIXES:
        from pipeline.hub import fetch_pipeline

        return _from_diffusers(fetch_pipeline(str(path)), weights, num_heads, hub_name=str(path))
    raise UserError(
        f"there is no checkpoint at {path}; give a run folder, a checkpoint folder, a weight file "
        f"({', '.join(SUFFIXES)}), a diffusers folder or a Hub name (OWNER/NAME)"
    )


def weight_files(folder: Path) -> dict[str, Path]:
    """{"raw", "ema", "ema-NAME": file} of the weights that a checkpoint folder has."""
    files = sorted(file for file in folder.glob("*.safetensors") if re.fullmatch(r"model|ema(-.+)?", file.stem))
    return {"raw" if file.stem == "model" else file.stem: file for file in files}


def read_info(folder: Path) -> dict[str, Any]:
    """The checked content of a checkpoint folder's config.json.

    Raises:
        UserError: it is missing, damaged, of another format or an unknown version.
    """
    path = folder / "config.json"
    info = read_json(path)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise UserError(
            f"{path} has format {found!r}, not {FORMAT!r}; it does not describe a checkpoint of this project"
        )
    if info.get("version") != VERSION:
        raise UserError(
            f"{path} is a {FORMAT} of version {info.get('version')!r}, but this program reads version {VERSION}; "
            f"update dit-pipeline, or convert the checkpoint with the version that wrote it"
        )
    _check_info(info, path)
    return info


def _check_info(info: Mapping[str, Any], path: Path) -> None:
    missing = [key for key in _NEEDED if key not in info]
    wrong = [
        f"{key} is {type(info[key]).__name__}, not {kind.__name__}"
        for key, kind in _NEEDED.items()
        if key in info and type(info[key]) is not kind
    ]
    missing += [
        f"{key}.{inner}"
        for key, within in _WITHIN.items()
        for inner in within
        if isinstance(info.get(key), dict) and inner not in info[key]
    ]
    faults = [f"it lacks {join_names(missing)}"] * bool(missing) + wrong
    if faults:
        raise UserError(f"{path} is damaged: {'; '.join(faults)}; restore the checkpoint")
    try:
        make_process(info["diffusion"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _from_folder(folder: Path, weights: str, num_heads: int | None) -> Stored:
    if (folder / "model_index.json").is_file() or _is_diffusers_config(folder / "config.json"):
        return _from_diffusers(folder, weights, num_heads)
    if (folder / "config.json").is_file():
        return _from_checkpoint(folder, weights, num_heads)
    run = folder.parent if folder.name == "checkpoints" else folder
    newest = newest_checkpoint(run)
    if newest is not None:
        return _from_checkpoint(newest, weights, num_heads)
    if (run / "checkpoints").is_dir() or (run / "config.yaml").is_file():
        raise UserError(f"{run} is a run without a checkpoint yet; let dit-train go on until it has saved one")
    raise UserError(
        f"{folder} is no checkpoint: it has neither config.json, nor checkpoints/step-… inside, nor model_index.json"
    )


def _from_checkpoint(folder: Path, weights: str, num_heads: int | None) -> Stored:
    have = weight_files(folder)
    name = weights if weights in have else f"ema-{weights}"
    if name not in have:
        read_info(folder)
        names = [known.removeprefix("ema-") for known in have]
        raise UserError(
            f"{folder} has no {weights} weights; pass --weights {' or '.join(names)} (--init-weights to dit-train)"
            if names
            else f"{folder} has no weights (*.safetensors); the checkpoint is not whole, restore it"
        )
    return _own_weights(folder, have[name], name, num_heads)


def _own_weights(folder: Path, file: Path, weights: str, num_heads: int | None) -> Stored:
    info = read_info(folder)
    try:
        config = DiTConfig.from_json(info["model"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    _check_heads(num_heads, config, folder)
    return Stored(read_safetensors(file), config, info, weights, folder)


def _from_file(file: Path, weights: str, num_heads: int | None) -> Stored:
    from pipeline.checkpoint.release import default_info, infer_config

    beside = file.with_name("config.json")
    if file.suffix == ".safetensors" and _is_diffusers_config(beside):
        return _from_diffusers(file.parent, weights, num_heads)
    if file.suffix == ".safetensors" and beside.is_file() and _format_of(beside) == FORMAT:
        return _own_weights(file.parent, file, file.stem.replace("model", "raw"), num_heads)
    if weights not in {"ema", "raw"}:
        raise UserError(f"{file} has no {weights} weights, only its own; pass --weights ema or raw")
    state = load_tensors(file, weights=weights)
    config = infer_config(state, num_heads=num_heads, origin=file)
    return Stored(state, config, default_info(config), weights, None)


def _from_diffusers(folder: Path, weights: str, num_heads: int | None, *, hub_name: str | None = None) -> Stored:
    from pipeline.checkpoint.diffusers_read import read_diffusers, recorded_weights, transformer_folder

    state, config, info = read_diffusers(folder, hub_name=hub_name)
    _check_heads(num_heads, config, hub_name or folder)
    return Stored(state, config, info, recorded_weights(folder) or weights, None, transformer_folder(folder))


def _check_heads(num_heads: int | None, config: DiTConfig, origin: object) -> None:
    if num_heads not in {None, config.num_heads}:
        raise UserError(f"--num-heads {num_heads} contradicts {origin}, whose network has {config.num_heads}; drop it")


def _format_of(path: Path) -> object:
    content = read_json(path)
    return content.get("format") if isinstance(content, dict) else None


def _is_diffusers_config(path: Path) -> bool:
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and "_class_name" in content
