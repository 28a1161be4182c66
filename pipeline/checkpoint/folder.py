"""The checkpoint folder: written, listed, its config.json checked, its files compared with what was written.

It holds config.json (network, process, classes, latent, VAE, …), model.safetensors (raw weights), ema.safetensors,
further averages as ema-NAME.safetensors, and state/ (what only resuming needs). The size and SHA-256 of every file
stand in state/files.json, which training writes, or under `files` in a config.json that a conversion wrote.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from pipeline.checkpoint.tensor_files import join_names, save_safetensors
from pipeline.diffusion.process import make_process
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, sha256_of, write_json

FORMAT: Final = "dit-checkpoint"
VERSION: Final = 1
STATE_FILES: Final = "state/files.json"
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


def write_model_files(
    folder: Path,
    *,
    info: Mapping[str, Any],
    model: Mapping[str, Tensor] | None,
    averages: Mapping[str, Mapping[str, Tensor]],
    sums: bool = False,
) -> None:
    """Write config.json and the weight files into a folder that the caller publishes.

    Args:
        info: the content of config.json; format, version and files are set here.
        model: the raw weights, or None where only averages are known.
        averages: {"ema": …, "ema-NAME": …}.
        sums: record the weights' SHA-256 in config.json, where no state/files.json will.

    Raises:
        UserError: the disk is full or read-only.
    """
    missing = [key for key in _NEEDED if key not in info]
    assert not missing, f"a checkpoint's info lacks {missing}"
    assert all(name == "ema" or name.startswith("ema-") for name in averages), f"averages named {list(averages)}"
    for name, tensors in {**({"model": model} if model is not None else {}), **averages}.items():
        save_safetensors(folder / f"{name}.safetensors", tensors)
    rest = {key: value for key, value in info.items() if key not in {"format", "version", "files"}}
    files = {"files": describe_files(folder, weight_files(folder).values())} if sums else {}
    write_json(folder / "config.json", {"format": FORMAT, "version": VERSION, **rest, **files})


def describe_files(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{name in the folder: {"bytes", "sha256"}} of these files."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files
    }


def recorded_files(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What `describe_files` gave when the checkpoint was written; None if nothing was recorded.

    Raises:
        UserError: the record is damaged or cannot be read.
    """
    record = folder / STATE_FILES
    if not record.exists():
        record = folder / "config.json"
    content = read_json(record)
    files = content.get("files") if isinstance(content, dict) else {}
    if files is None and record.name == "config.json":
        return None
    if not isinstance(files, dict) or not all(
        isinstance(known, dict) and {"bytes", "sha256"} <= known.keys() for known in files.values()
    ):
        raise UserError(f"{record} is damaged: its files are not each a size and a SHA-256; restore the checkpoint")
    return files


def find_damage(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What differs from the record, or None if all is as it was written, or nothing was recorded.

    Args:
        names: look at these files alone; one that the record does not know is passed over.

    Raises:
        OSError: a file is there and cannot be read, which says nothing about its contents.
    """
    try:
        files = recorded_files(folder) or {}
    except UserError as error:
        if isinstance(error.__cause__, PermissionError):
            raise error.__cause__ from None
        return str(error)
    faults = []
    for name, known in files.items():
        path = folder / name
        if names is not None and name not in names:
            continue
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != known["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {known['bytes']}")
        elif sha256_of(path) != known["sha256"]:
            faults.append(f"{name} has other contents than were written")
    return "; ".join(faults) or None


def checkpoint_folders(run: Path, *, whole: bool = True) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, oldest first.

    Args:
        whole: only those that have a config.json; else everything that is named like a checkpoint.
    """
    named = [(_STEP_FOLDER.fullmatch(folder.name), folder) for folder in (run / "checkpoints").glob("step-*")]
    return sorted(
        (int(match[1]), folder)
        for match, folder in named
        if match and ((folder / "config.json").is_file() if whole else folder.is_dir())
    )


def newest_checkpoint(run: Path) -> Path | None:
    """The folder of a run's last whole checkpoint, or None."""
    folders = checkpoint_folders(run)
    return folders[-1][1] if folders else None


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
