"""Where a conversion may write: a new place, or what an earlier conversion left, and never what it reads."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from pipeline.checkpoint.folder import WEIGHTS, weight_files
from pipeline.checkpoint.weight_files import holds_tensors
from pipeline.convert.card import PICTURE, README
from pipeline.convert.options import ConvertOptions
from pipeline.hub import look_up
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import shortened, typed

_CARD = {README, PICTURE}
_PIPELINE = {"model_index.json", "scheduler", "transformer", "vae", *_CARD}


def check_target(target: Path, form: str, *, overwrite: bool) -> None:
    """Raise UserError unless the target is free, or holds what an earlier conversion left and may be replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if form != "facebook" and target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} exists; choose another --to, or pass --overwrite to replace it")
    if form == "facebook":
        if target.is_dir():
            raise UserError(f"{target} is a folder, but --format facebook writes one file; choose another --to")
        if not holds_tensors(target):
            raise UserError(f"{target} is no file of weights, so it is not replaced; choose another --to")
        return
    foreign_files = _foreign_files(target) if target.is_dir() else ["a file"]
    if foreign_files:
        raise UserError(
            f"{target} is not what a conversion leaves (there is {', '.join(foreign_files[:3])}), so it is not "
            f"replaced; choose another --to"
        )


def check_repository(options: ConvertOptions) -> None:
    """Raise UserError unless the Hub's repository is free, or holds what a conversion left and may be replaced."""
    name = options.hub_name
    assert name is not None
    found = look_up(name)
    if found is None:
        return
    if options.private and not found.is_private:
        raise UserError(f"{options.to} is there and public, so --private cannot hold; make it private on the Hub first")
    if found.files and not options.overwrite:
        raise UserError(f"{options.to} holds files; choose another name, or pass --overwrite to replace them")
    known = {"config.json", *_PIPELINE}
    others = [file for file in found.files if file.split("/")[0] not in known and not WEIGHTS.fullmatch(file)]
    if others:
        there = ", ".join(map(shortened, others[:3]))
        raise UserError(
            f"{options.to} is not what a conversion leaves (there is {there}), so it is not replaced; choose another "
            f"name"
        )


def check_sources(target: Path, sources: Iterable[Path], given: str) -> None:
    """Raise UserError unless replacing the target leaves alone what is read."""
    place = target.resolve()
    for source in sources:
        if place.exists() and (place == source.resolve() or place in source.resolve().parents):
            raise UserError(f"--to {target} is, or holds, what --from {given} reads; choose another --to")


def _foreign_files(folder: Path) -> list[str]:
    """What stands in the folder that no conversion puts there; all of it, if its settings are none of ours."""
    names = {path.name for path in folder.iterdir()}
    if "model_index.json" in names:
        known, is_ours = _PIPELINE, _is(_MadePipeline, folder / "model_index.json")
    else:
        weights = {file.name for file in weight_files(folder).values()}
        known = {"config.json", *weights, *_CARD}
        is_ours = bool(weights) or _is(_Checkpoint, folder / "config.json")
    return sorted(names - known if is_ours else names) or ([] if is_ours else ["nothing"])


class _MadePipeline(msgspec.Struct, frozen=True):
    """What a pipeline says that a conversion wrote."""

    made_of: dict[str, Any] = msgspec.field(name="_dit")


class _Checkpoint(msgspec.Struct, frozen=True):
    format: Literal["dit-checkpoint"]


def _is(kind: type[msgspec.Struct], path: Path) -> bool:
    try:
        typed(read_json(path), kind, f"{path} is none", advice="")
    except UserError:
        return False
    return True
