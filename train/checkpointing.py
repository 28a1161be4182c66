"""Everything a run is at one step: taken in memory, written as plain safetensors and JSON, and put back exactly.

A checkpoint's state/ folder holds optimizer.safetensors (NAME.exp_avg, NAME.exp_avg_sq), trainer.json (counters) and
files.json (size and SHA-256 of every other file, checked before resuming). Tensors are whole, so a run goes on
with any number of processes, sharded or not. There are no random-number states: draws depend on the step alone.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.averages import MovingAverage
from pipeline.checkpoint.folder import STATE_FILES, describe_files, write_model_files
from pipeline.checkpoint.tensor_files import save_safetensors
from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import (
    explained_writes,
    make_folder,
    publish_folder,
    read_json,
    remove_folder,
    write_json,
)
from train.distributed import Hardware
from train.kept_checkpoints import checkpoint_path, clean_up, discard
from train.optimizer import Optimizer
from train.options import RunOptions
from train.parallel import Placement, Replicated

FORMAT, VERSION = "dit-train-state", 1
Tensors = dict[str, Tensor]


@dataclass(kw_only=True, slots=True)
class TrainState:
    """What a step changes."""

    placement: Placement
    optimizer: Optimizer
    averages: dict[str, MovingAverage]
    """By the stems of their files: "ema", "ema-NAME"."""
    step: int = 0
    """Optimizer steps done, skipped ones too."""
    batch_offset: int = 0
    """Batches of the data order that rolling back has passed over: step n trains on batch n + batch_offset."""
    rollbacks: int = 0
    seconds: float = 0.0
    """Time spent training, over all commands."""

    @property
    def batch_number(self) -> int:
        """Which global batch, and which draws, the next step takes."""
        return self.step + self.batch_offset


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A copy of the state in main memory, which a thread can write while training goes on."""

    step: int
    files: dict[str, Tensors] = field(default_factory=dict)
    """Tensors by the stem of their file; "optimizer" goes under state/."""
    counters: dict[str, Any] = field(default_factory=dict)


class PinnedStaging:
    """Page-locked main memory that every snapshot of a GPU is copied into: taken by the first, used by all others.

    torch rounds each piece of such memory up to a power of two and keeps it: tensor by tensor that makes 14.2 of
    XL/2's 10.8 GB. So it is taken in slabs of a power of two, and tensors are laid into them one after the other.
    """

    SLAB_BYTES, ALIGNED_TO = 1 << 28, 64

    def __init__(self, *, device: str = "cpu", pin: bool = True) -> None:
        self.slabs: list[Tensor] = []
        self._device, self._pin = device, pin
        self._slab, self._used = 0, 0

    def rewind(self) -> None:
        """Begin again with the first slab: what lies there is overwritten."""
        self._slab, self._used = 0, 0

    def take(self, like: Tensor) -> Tensor:
        """Room for a tensor, in its shape and type."""
        size = like.numel() * like.element_size()
        while self._slab < len(self.slabs) and self._used + size > len(self.slabs[self._slab]):
            self._slab, self._used = self._slab + 1, 0
        if self._slab == len(self.slabs):
            length = max(self.SLAB_BYTES, 1 << max(size - 1, 0).bit_length())
            self.slabs.append(torch.empty(length, dtype=torch.uint8, device=self._device, pin_memory=self._pin))
        room = self.slabs[self._slab][self._used : self._used + size]
        self._used += -(-size // self.ALIGNED_TO) * self.ALIGNED_TO
        return room.view(like.dtype).view(like.shape)


def take_snapshot(state: TrainState, *, keep: bool, staging: PinnedStaging) -> Snapshot:
    """A copy of everything at this step; every process must call it, only those with `keep` hold the result.

    The copy of a GPU's tensors lies in `staging` and is valid until the next one is taken.
    """
    files: dict[str, Tensors] = {}
    staging.rewind()
    if keep or not isinstance(state.placement, Replicated):
        for stem, tensors in _tensor_lists(state):
            file, suffix = _place_in_files(stem)
            for name, tensor in zip(state.placement.names, state.placement.whole(tensors), strict=True):
                if keep:
                    files.setdefault(file, {})[name + suffix] = _copy_to_host(tensor.detach(), staging)
    if state.placement.weights[0].is_cuda:
        torch.cuda.synchronize()
    return Snapshot(step=state.step, files=files if keep else {}, counters=_counters(state))


def _copy_to_host(source: Tensor, staging: PinnedStaging) -> Tensor:
    if not source.is_cuda:
        return source.clone(memory_format=torch.contiguous_format)
    return staging.take(source).copy_(source, non_blocking=True)


def _tensor_lists(state: TrainState) -> Iterator[tuple[str, list[Tensor]]]:
    """(name, this process's tensors in the order of the network's) of the weights, each average, and AdamW's state."""
    yield "model", state.placement.weights
    for name, average in state.averages.items():
        yield name, average.tensors
    yield from state.optimizer.adam_state().items()


def _place_in_files(stem: str) -> tuple[str, str]:
    """(stem of the file, what follows a tensor's name in it) of a list of tensors."""
    return ("optimizer", f".{stem}") if stem.startswith("exp_avg") else (stem, "")


def _counters(state: TrainState) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": state.step,
        "jump": state.batch_offset,
        "rollbacks": state.rollbacks,
        "seconds": state.seconds,
        "optimizer": f"AdamW ({state.optimizer.kernel})",
        "averages": {name: average.decay for name, average in state.averages.items()},
        **state.optimizer.counters(),
    }


def write_snapshot(folder: Path, snapshot: Snapshot, info: Mapping[str, Any]) -> None:
    """Write a checkpoint's files into a folder that the caller publishes."""
    averages = {stem: tensors for stem, tensors in snapshot.files.items() if stem.startswith("ema")}
    write_model_files(folder, info={**info, "step": snapshot.step}, model=snapshot.files["model"], averages=averages)
    inner = folder / "state"
    inner.mkdir()
    save_safetensors(inner / "optimizer.safetensors", snapshot.files["optimizer"])
    write_json(inner / "trainer.json", snapshot.counters)
    listing = describe_files(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    write_json(folder / STATE_FILES, {"format": FORMAT, "version": VERSION, "files": listing})


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
    before, now = counters["optimizer"], f"AdamW ({state.optimizer.kernel})"
    if before != now:
        warn(f"the checkpoint was made with {before}, this is {now}: the run goes on, but not to the last bit")
    for stem, tensors in _tensor_lists(state):
        file, suffix = _place_in_files(stem)
        path = folder / ("state" if file == "optimizer" else "") / f"{file}.safetensors"
        state.placement.put(_read(path, [name + suffix for name in state.placement.names]), tensors)
    state.optimizer.restore_counters(counters)
    state.step, state.batch_offset = int(counters["step"]), int(counters["jump"])
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


class Saver:
    """Takes a snapshot, which is all that training waits for, and writes it in the background.

    One checkpoint is written at a time; the next one waits for it. An error while writing is raised at the next call.
    """

    def __init__(self, options: RunOptions, hardware: Hardware, info: Mapping[str, Any]) -> None:
        self._paused_seconds = 0.0
        self.saved_step: int | None = None
        self._options, self._hardware, self._info = options, hardware, info
        self._staging = PinnedStaging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Save this step, once; every process calls it.

        Args:
            wait: until the checkpoint is in place, as before leaving.
        """
        if self.saved_step != state.step:
            started = time.perf_counter()
            self.finish()
            snapshot = take_snapshot(state, keep=self._hardware.is_main, staging=self._staging)
            paused = time.perf_counter() - started
            self._paused_seconds += paused
            self.saved_step = state.step
            if self._hardware.is_main:
                self._thread = threading.Thread(target=self._write, args=(snapshot, paused), name="checkpoint writer")
                self._thread.start()
        if wait:
            self.finish()
            self._hardware.barrier()

    def take_pause(self) -> float:
        """How long training stood still for checkpoints since this was last asked, in seconds."""
        paused, self._paused_seconds = self._paused_seconds, 0.0
        return paused

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Raise UserError if a checkpoint could not be written so far; does not wait for one."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot, paused: float) -> None:
        started = time.perf_counter()
        final = checkpoint_path(self._options.out, snapshot.step)
        temporary = final.with_name(f".{final.name}.partial")
        try:
            remove_folder(temporary)
            with explained_writes(final):
                make_folder(temporary)
                write_snapshot(temporary, snapshot, self._info)
            if final.exists():  # only a checkpoint that this run has rolled back behind can be there
                discard(final)
            publish_folder(temporary, final)
            clean_up(self._options)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that trains
            remove_folder(temporary)
            self._error = error
            return
        written = time.perf_counter() - started
        say(f"checkpoint {final.name}: training paused {paused:.2f} s, written in {written:.1f} s")
