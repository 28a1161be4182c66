"""The checkpoint folder: written, listed, its files compared with what was written (`info` is its config.json).

It holds config.json (network, process, classes, latent, VAE, …), model.safetensors (raw weights), ema.safetensors,
further averages as ema-NAME.safetensors, and state/ (what only resuming needs); each of these files may be cut into
shards. The size and SHA-256 of every file stand in state/files.json, which training writes, or under `files` in a
config.json that a conversion wrote.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from torch import Tensor

from pipeline.checkpoint.tensor_files import INDEX, save_safetensors, shard_path, write_index
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import flush_file, read_json, sha256_of, write_json
from pipeline.runtime.gate import Count, shortened, typed

FORMAT: Final = "dit-checkpoint"
VERSION: Final = 1
STATE_FILES: Final = "state/files.json"
CONFIG, METRICS = "config.yaml", "metrics.jsonl"
"""Of a run: its settings and its log, beside checkpoints/."""
WEIGHTS: Final = re.compile(r"(model|ema(-.+)?)(?<!-\d{5}-of-\d{5})\.safetensors")
"""Names of the files of weights, not of their shards."""
_STEP_FOLDER = re.compile(r"step-(\d+)")
_IN_RUN = re.compile(r"checkpoints/step-(\d+)/.+")


class FileRecord(msgspec.Struct, frozen=True):
    """What `describe_files` says of a file."""

    bytes: Count
    sha256: str


class _Listing(msgspec.Struct, frozen=True):
    files: dict[str, FileRecord] | None = None


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
    assert all(name == "ema" or name.startswith("ema-") for name in averages), f"averages named {list(averages)}"
    for name, tensors in {**({"model": model} if model is not None else {}), **averages}.items():
        save_safetensors(folder / f"{name}.safetensors", tensors)
    rest = {key: value for key, value in info.items() if key not in {"format", "version", "files"}}
    files = {"files": describe_files(folder, weight_files(folder).values())} if sums else {}
    write_json(folder / "config.json", {"format": FORMAT, "version": VERSION, **rest, **files})


class Shard(NamedTuple):
    """A file that a process has written of its part of a checkpoint; names are from the checkpoint's folder."""

    whole: str
    """The file that it is a shard of."""
    name: str
    tensors: list[str]
    size: int
    """Bytes of its tensors."""
    about: dict[str, Any]
    """As `describe_files` has it."""


def write_shards(folder: Path, files: Mapping[Path, Mapping[str, Tensor]], number: int, count: int) -> list[Shard]:
    """Write a part of each of these files, flushed.

    Args:
        folder: the checkpoint's.
        files: the tensors of this part by the file that all of them would be.
        number: which part this is, from 1.
        count: how many parts there are.

    Raises:
        UserError: a file cannot be written.
    """
    shards = []
    for whole, tensors in files.items():
        path = shard_path(whole, number, count)
        save_safetensors(path, tensors)
        flush_file(path)
        [(name, about)] = describe_files(folder, [path]).items()
        size = sum(tensor.nbytes for tensor in tensors.values())
        shards.append(Shard(whole.relative_to(folder).as_posix(), name, list(tensors), size, about))
    return shards


def write_indexes(folder: Path, shards: Iterable[Shard]) -> None:
    """Write, for each file of which these are all shards, where its tensors are."""
    by_file: dict[str, list[Shard]] = {}
    for shard in shards:
        by_file.setdefault(shard.whole, []).append(shard)
    for whole, own in by_file.items():
        places = {tensor: Path(shard.name).name for shard in own for tensor in shard.tensors}
        write_index(folder / whole, places, sum(shard.size for shard in own))


def describe_files(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{name in the folder: {"bytes", "sha256"}} of these files."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files
    }


def recorded_files(folder: Path) -> dict[str, FileRecord] | None:
    """What `describe_files` gave when the checkpoint was written; None if nothing was recorded.

    Raises:
        UserError: the record is damaged or cannot be read.
    """
    record = folder / STATE_FILES
    if not record.exists():
        record = folder / "config.json"
    advice = "restore the checkpoint"
    files = typed(read_json(record), _Listing, f"{record} is damaged", advice=advice).files
    if files is None and record.name != "config.json":
        raise UserError(f"{record} is damaged: files is missing; {advice}")
    for name in files or {}:
        if not is_inside(name):
            raise UserError(f"{record} is damaged: {shortened(name)} is no file of its folder; {advice}")
    return files


def is_inside(name: str) -> bool:
    """Whether a name with slashes, as a record writes it, stays within its folder."""
    return name.isprintable() and "\\" not in name and all(part not in {"", ".", ".."} for part in name.split("/"))


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
        elif path.stat().st_size != known.bytes:
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {known.bytes}")
        elif sha256_of(path) != known.sha256:
            faults.append(f"{name} has other contents than were written")
    return "; ".join(faults) or None


def checkpoint_name(step: int) -> str:
    """Where in its run the checkpoint of a step lies."""
    return f"checkpoints/step-{step:07d}"


def step_of(name: str) -> int | None:
    """The step of the checkpoint that a file of a run belongs to, by its name; None if to none."""
    found = _IN_RUN.fullmatch(name)
    return None if found is None else int(found[1])


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
    """{"raw", "ema", "ema-NAME": file} of the weights that a checkpoint folder has.

    Of weights that are cut into shards it is the name of the whole file, which is not there (`tensor_files.files_of`).
    """
    names = sorted({path.name.removesuffix(INDEX) for path in folder.glob("*.safetensors*") if path.is_file()})
    files = [folder / name for name in names if WEIGHTS.fullmatch(name)]
    return {"raw" if file.stem == "model" else file.stem: file for file in files}
