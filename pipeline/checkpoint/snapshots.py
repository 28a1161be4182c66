"""Snapshots of power-function averages beside a run's checkpoints, and any other such average made of them.

RUN/averages/step-0010000-sigma-0.05.safetensors holds an average in half precision under the network's names, and
NAME.json beside it what it is, its size and SHA-256. The record is written last: without it there is no snapshot.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from torch import Tensor

from pipeline.checkpoint.averages import WIDEST, gamma_of, reconstruction_weights
from pipeline.checkpoint.folder import describe_files
from pipeline.checkpoint.tensor_files import files_of, read_tensors, save_safetensors
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, read_json, remove_folder, replacing, sha256_of, write_json
from pipeline.runtime.gate import Sha256, typed

FORMAT: Final = "dit-average"
VERSION: Final = 1
_NAME = re.compile(r"step-(\d+)-sigma-([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\.safetensors")
_ASKED = re.compile(r"sigma=([0-9.e+-]+)(?:@(\d{1,18}))?")


@dataclass(frozen=True, slots=True)
class SavedAverage:
    """A power-function average on disk."""

    step: int
    sigma: float
    path: Path
    check: Callable[[], str | None] | None
    """Reads the file again and says what differs from what was written; None where the checkpoint's record does."""


def stem_of(sigma: float) -> str:
    """The stem of the average's file within a checkpoint."""
    return f"ema-sigma-{sigma:g}"


def snapshot_path(run: Path, step: int, sigma: float) -> Path:
    """Where a snapshot lies."""
    return run / "averages" / f"step-{step:07d}-sigma-{sigma:g}.safetensors"


def write_average(path: Path, tensors: Mapping[str, Tensor], *, step: int, sigma: float) -> None:
    """Write a snapshot and then its record, each whole or not at all.

    Raises:
        UserError: the disk is full or read-only.
    """
    make_folder(path.parent)
    record = _record_of(path)
    record.unlink(missing_ok=True)  # of one that this replaces
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")  # where safetensors leaves a file if the disk fails
    make_folder(work)
    try:
        with replacing(path, work_folder=work) as temporary:
            save_safetensors(temporary, tensors)
    finally:
        remove_folder(work)
    about = {"format": FORMAT, "version": VERSION, "step": step, "sigma": sigma, "gamma": gamma_of(sigma)}
    write_json(record, {**about, **describe_files(path.parent, [path])[path.name]})


def snapshots(run: Path) -> list[SavedAverage]:
    """A run's snapshots that have their record, by step and width."""
    found = []
    for path in (run / "averages").glob("step-*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match and _record_of(path).is_file():
            found.append(SavedAverage(int(match[1]), float(match[2]), path, partial(_damage, path)))
    return sorted(found, key=lambda one: (one.step, one.sigma))


def discard_snapshots_after(run: Path, step: int) -> None:
    """Remove the snapshots of what was rolled back behind, each one's record first."""
    for one in snapshots(run):
        if one.step > step:
            _record_of(one.path).unlink()
            one.path.unlink()


def asked_average(weights: str) -> tuple[float, int | None] | None:
    """(sigma, step) of "sigma=0.08" or "sigma=0.08@20000"; None where other weights are named.

    Raises:
        UserError: the width is none that a power function has.
    """
    match = _ASKED.fullmatch(weights)
    if not match:
        return None
    try:
        sigma = float(match[1])
    except ValueError:
        sigma = -1.0
    check_sigma(sigma, weights)
    return sigma, int(match[2]) if match[2] else None


def check_sigma(sigma: float, given: str) -> None:
    """Raise UserError unless there is a power function of this relative width."""
    if not 0 < sigma < WIDEST:
        raise UserError(f"{given}: an average's relative width must lie above 0 and below {WIDEST:.3f}, as in 0.08")


def reconstruct(
    checkpoint: Path, sigma: float, step: int | None, *, own_step: int, held: Iterable[float]
) -> tuple[dict[str, Tensor], dict[str, Any], list[Callable[[], str | None]]]:
    """(float32 tensors, what they are made of, checks of the files) of the average of width sigma at a step.

    It is made of the run's snapshots up to that step, and of those that the checkpoint itself holds.

    Args:
        checkpoint: a checkpoint folder of a run.
        step: None for the checkpoint's own, `own_step`.
        held: the widths of the averages that the checkpoint itself holds, in float32.

    Raises:
        UserError: there are no averages at that step, or files are damaged.
    """
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    paths = {width: checkpoint / f"{stem_of(width)}.safetensors" for width in held}
    inside = [SavedAverage(own_step, width, path, None) for width, path in paths.items() if files_of(path)[0].is_file()]
    step = own_step if step is None else step
    known = {(one.step, one.sigma): one for one in [*snapshots(run), *inside]}  # the checkpoint's are better
    usable = [one for one in known.values() if one.step <= step]
    if not any(one.step == step for one in usable):
        raise UserError(_nothing_at(run, step, sorted({one.step for one in known.values()})))
    weights = reconstruction_weights([(one.step, one.sigma) for one in usable], step=step, sigma=sigma)
    total: dict[str, Tensor] = {}
    for one, weight in zip(usable, weights, strict=True):
        for name, tensor in read_tensors(one.path).items():
            if name in total:
                total[name].add_(tensor.float(), alpha=weight)
            else:
                total[name] = tensor.float().mul_(weight)
    about = {"sigma": sigma, "step": step, "snapshots": len(usable)}
    return total, about, [one.check for one in usable if one.check is not None]


def _nothing_at(run: Path, step: int, steps: list[int]) -> str:
    there = ", ".join(f"{known:,}" for known in steps)
    if not there:
        return f"{run} keeps no power-function averages to make one of; dit-train --ema-sigma 0.05,0.10 keeps them"
    return (
        f"{run} has no power-function averages at step {step:,}; it has them at {there}: name one of those, as in "
        f"sigma=0.08@{max(steps)}, or dit-convert --at-step {max(steps)}"
    )


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


class _Record(msgspec.Struct, frozen=True):
    """What of a snapshot's record is asked again; step and width stand in its name, too."""

    format: Literal["dit-average"]
    version: Literal[1]
    sha256: Sha256


def _damage(path: Path) -> str | None:
    record = _record_of(path)
    refusal = f"{record.name} is no record of an average that this program knows"
    try:
        known = typed(read_json(record), _Record, refusal, advice="remove it and the average, or restore it").sha256
    except UserError as error:
        return str(error)
    return None if sha256_of(path) == known else f"{path.name} has other contents than were written"
