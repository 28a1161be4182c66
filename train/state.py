"""Everything a run is at one step: taken in memory, written as plain safetensors and JSON, and put back exactly.

A checkpoint's state/ folder holds optimizer.safetensors (NAME.exp_avg, NAME.exp_avg_sq), trainer.json (counters) and
files.json (size and SHA-256 of every other file, checked before resuming). Tensors are whole, so a run goes on
with any number of processes, sharded or not. There are no random-number states: draws depend on the step alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import write_model_files
from pipeline.console import warn
from pipeline.ema import MovingAverage
from pipeline.errors import UserError
from pipeline.files import read_json, sha256_of, write_json
from pipeline.foreign import save_safetensors
from train.optimiser import Optimiser
from train.sharding import Copied, Placement

FORMAT, VERSION = "dit-train-state", 1
Tensors = dict[str, Tensor]


@dataclass(kw_only=True, slots=True)
class TrainState:
    """What a step changes."""

    placement: Placement
    optimiser: Optimiser
    averages: dict[str, MovingAverage]
    """By the stems of their files: "ema", "ema-NAME"."""
    step: int = 0
    """Optimizer steps done, skipped ones too."""
    jump: int = 0
    """Batches of the data order that going back has passed over: step n trains on batch n + jump."""
    rollbacks: int = 0
    seconds: float = 0.0
    """Time spent training, over all sittings."""

    @property
    def batch_number(self) -> int:
        """Which global batch, and which draws, the next step takes."""
        return self.step + self.jump


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A copy of the state in main memory, which a thread can write while training goes on."""

    step: int
    files: dict[str, Tensors] = field(default_factory=dict)
    """Tensors by the stem of their file; "optimizer" goes under state/."""
    counters: dict[str, Any] = field(default_factory=dict)


def take_snapshot(state: TrainState, *, keep: bool) -> Snapshot:
    """A copy of everything at this step; every process must call it, only those with `keep` hold the result."""
    files: dict[str, Tensors] = {}
    if keep or not isinstance(state.placement, Copied):
        for stem, tensors in _parts(state):
            copies = {}
            for name, tensor in zip(state.placement.names, state.placement.whole(tensors), strict=True):
                if keep:
                    copies[name] = _copy_to_host(tensor)
            target, suffix = ("optimizer", f".{stem}") if stem.startswith("exp_avg") else (stem, "")
            files.setdefault(target, {}).update({name + suffix: tensor for name, tensor in copies.items()})
    if state.placement.weights[0].is_cuda:
        torch.cuda.synchronize()
    return Snapshot(step=state.step, files=files if keep else {}, counters=_counters(state))


def _copy_to_host(tensor: Tensor) -> Tensor:
    source = tensor.detach()
    if not source.is_cuda:
        return source.clone(memory_format=torch.contiguous_format)
    host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return host.copy_(source, non_blocking=True)


def _parts(state: TrainState) -> Iterator[tuple[str, list[Tensor]]]:
    yield "model", state.placement.weights
    for name, average in state.averages.items():
        yield name, average.tensors
    yield from state.optimiser.moments().items()


def _counters(state: TrainState) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": state.step,
        "jump": state.jump,
        "rollbacks": state.rollbacks,
        "seconds": state.seconds,
        "optimizer": f"AdamW ({state.optimiser.kernel})",
        "averages": {name: average.decay for name, average in state.averages.items()},
        **state.optimiser.counters(),
    }


def write_snapshot(folder: Path, snapshot: Snapshot, info: Mapping[str, Any]) -> None:
    """Write a checkpoint's files into a folder that the caller publishes."""
    averages = {stem: tensors for stem, tensors in snapshot.files.items() if stem.startswith("ema")}
    write_model_files(folder, info={**info, "step": snapshot.step}, model=snapshot.files["model"], averages=averages)
    inner = folder / "state"
    inner.mkdir()
    save_safetensors(inner / "optimizer.safetensors", snapshot.files["optimizer"])
    write_json(inner / "trainer.json", snapshot.counters)
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in written
    }
    write_json(inner / "files.json", {"format": FORMAT, "version": VERSION, "files": listing})


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None if every one is as it was written.

    Raises:
        OSError: a file is there and cannot be read, which says nothing about its contents.
    """
    try:
        listing = read_json(folder / "state" / "files.json")["files"]
        for name, known in listing.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != known["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {known['bytes']}"
            if sha256_of(path) != known["sha256"]:
                return f"{name} has other contents than were written (SHA-256)"
    except PermissionError:
        raise
    except (UserError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error.__cause__, PermissionError):
            raise error.__cause__ from None
        return f"state/files.json: {error}"
    return None


def restore(folder: Path, state: TrainState) -> None:
    """Make the state what it was when the checkpoint was taken.

    Raises:
        UserError: the checkpoint's state is of another version, or lacks tensors of this network.
    """
    counters = read_json(folder / "state" / "trainer.json")
    if counters.get("format") != FORMAT or counters.get("version") != VERSION:
        raise UserError(
            f"{folder}/state has format {counters.get('format')!r} version {counters.get('version')!r}, but this "
            f"program resumes {FORMAT!r} version {VERSION}; sample from it, or start anew with --init-from {folder}"
        )
    before, now = counters["optimizer"], f"AdamW ({state.optimiser.kernel})"
    if before != now:
        warn(f"the checkpoint was made with {before}, this is {now}: the run goes on, but not to the last bit")
    for stem, tensors in _parts(state):
        if stem.startswith("exp_avg"):
            file, suffix = folder / "state" / "optimizer.safetensors", f".{stem}"
        else:
            file, suffix = folder / f"{stem}.safetensors", ""
        names = [name + suffix for name in state.placement.names]
        state.placement.put(_read(file, names), tensors)
    state.optimiser.restore_counters(counters)
    state.step, state.jump = int(counters["step"]), int(counters["jump"])
    state.rollbacks, state.seconds = int(counters["rollbacks"]), float(counters["seconds"])


def _read(file: Path, names: list[str]) -> Iterator[Tensor]:
    """The named tensors one after the other, so that a whole file never lies in memory."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        missing = sorted(set(names) - set(content.keys()))
        if missing:
            raise UserError(f"{file} lacks {', '.join(missing)}; it belongs to another network")
        for name in names:
            yield content.get_tensor(name)


def is_amid_skips(folder: Path) -> bool:
    """Whether steps had just been skipped when the checkpoint was taken, or it does not tell."""
    try:
        return float(read_json(folder / "state" / "trainer.json")["skipped_in_a_row"]) > 0
    except (UserError, KeyError, TypeError, ValueError):
        return True
