"""Everything a run is at one step: taken in memory, written as plain safetensors and JSON, and put back exactly.

One process takes and writes all of it, or, with --sharded-checkpoints, each a shard of every file.

A checkpoint's state/ folder holds optimizer.safetensors (NAME.exp_avg and NAME.exp_avg_sq, or Muon's NAME.momentum),
trainer.json (counters) and files.json (size and SHA-256 of every other file, checked before resuming). Tensors are
whole, so a run goes on with any number of processes, sharded or not. There are no random-number states: draws depend
on the step alone.
"""

import math
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor

from pipeline.checkpoint.averages import MovingAverage, PowerAverage
from pipeline.checkpoint.folder import (
    STATE_FILES,
    Shard,
    describe_files,
    write_indexes,
    write_model_files,
    write_shards,
)
from pipeline.checkpoint.snapshots import snapshot_path, write_average
from pipeline.checkpoint.tensor_files import each_tensor, save_safetensors
from pipeline.runtime.console import say, warn
from pipeline.runtime.devices import PinnedStaging
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import (
    explained_writes,
    make_folder,
    publish_folder,
    read_json,
    remove_folder,
    write_json,
)
from pipeline.runtime.gate import Count, NotNegative, Whole, shortened, typed
from train.distributed import Hardware
from train.kept_checkpoints import checkpoint_path, clean_up, discard
from train.optimizer import COUNTERS, Optimizer
from train.options import RunOptions
from train.parallel import Holes, Placement, Replicated

if TYPE_CHECKING:
    from pipeline.checkpoint.mirror import Mirror

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


def cut(shapes: Mapping[str, tuple[int, ...]], parts: int) -> list[list[str]]:
    """The names, in order, of the tensors of each part: of about the same size, and fewer where some would be empty."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total, before = sum(sizes.values()), 0
    runs: list[list[str]] = [[] for _ in range(parts)]
    for name, size in sizes.items():
        runs[(2 * before + size) * parts // (2 * total)].append(name)  # where its middle lies
        before += size
    return [names for names in runs if names]


def take_snapshot(state: TrainState, *, keep: Collection[str], staging: PinnedStaging) -> Snapshot:
    """A copy at this step of what is `keep`'s, by the names of weights; every process must call it.

    The copy of a GPU's tensors lies in `staging` and is valid until the next one is taken.
    """
    files: dict[str, Tensors] = {}
    staging.rewind()
    if keep or not isinstance(state.placement, Replicated):
        for stem, tensors in _tensor_lists(state):
            file, suffix = _place_in_files(stem)
            for name, tensor in zip(state.placement.shapes, state.placement.whole(tensors), strict=True):
                if name in keep and tensor is not None:
                    files.setdefault(file, {})[name + suffix] = _copy_to_host(tensor.detach(), staging)
    if state.placement.weights[0].is_cuda:
        torch.cuda.synchronize()
    return Snapshot(step=state.step, files=files, counters=_counters(state))


def take_averages(state: TrainState, *, keep: bool, staging: PinnedStaging) -> dict[float, Tensors]:
    """Copies in half precision of the power-function averages, by their width; as `take_snapshot`."""
    taken: dict[float, Tensors] = {}
    staging.rewind()
    for average in state.averages.values():
        if isinstance(average, PowerAverage) and (keep or not isinstance(state.placement, Replicated)):
            whole = zip(state.placement.shapes, state.placement.whole(average.tensors), strict=True)
            taken[average.sigma] = {
                name: _copy_to_host(tensor.half(), staging) for name, tensor in whole if keep and tensor is not None
            }
    if state.placement.weights[0].is_cuda:
        torch.cuda.synchronize()
    return taken


def _copy_to_host(source: Tensor, staging: PinnedStaging) -> Tensor:
    if not source.is_cuda:
        return source.clone(memory_format=torch.contiguous_format)
    return staging.take(source).copy_(source, non_blocking=True)


def _tensor_lists(state: TrainState) -> Iterator[tuple[str, Holes]]:
    """(name, this process's tensors in the order of the network's) of weights, averages, the optimizer's state."""
    yield "model", state.placement.weights
    for name, average in state.averages.items():
        yield name, average.tensors
    yield from state.optimizer.state_tensors().items()


def _place_in_files(stem: str) -> tuple[str, str]:
    """(stem of the file, what follows a tensor's name in it) of a list of tensors."""
    return ("optimizer", f".{stem}") if stem in {"exp_avg", "exp_avg_sq", "momentum"} else (stem, "")


def _path_of(folder: Path, stem: str) -> Path:
    return folder / ("state" if stem == "optimizer" else "") / f"{stem}.safetensors"


def _counters(state: TrainState) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": state.step,
        "jump": state.batch_offset,
        "rollbacks": state.rollbacks,
        "seconds": state.seconds,
        "optimizer": state.optimizer.description,
        "averages": {name: average.setting for name, average in state.averages.items()},
        **state.optimizer.counters(),
    }


class _Counters(msgspec.Struct, frozen=True, kw_only=True):
    """`_counters` as it is read again."""

    step: Count
    jump: Whole
    rollbacks: Count
    seconds: NotNegative
    optimizer: str
    adamw_steps: NotNegative
    scale: NotNegative
    finite_in_a_row: NotNegative
    skipped_in_a_row: NotNegative
    skipped: NotNegative


def write_snapshot(folder: Path, snapshot: Snapshot, info: Mapping[str, Any]) -> None:
    """Write a checkpoint's files into a folder that the caller publishes."""
    averages = {stem: tensors for stem, tensors in snapshot.files.items() if stem.startswith("ema")}
    write_model_files(folder, info={**info, "step": snapshot.step}, model=snapshot.files["model"], averages=averages)
    inner = folder / "state"
    inner.mkdir()
    save_safetensors(inner / "optimizer.safetensors", snapshot.files["optimizer"])
    _write_counters(folder, snapshot, {})


def _write_counters(folder: Path, snapshot: Snapshot, described: Mapping[str, Any]) -> None:
    """Write the counters, and the list of all files: those that are described already, and the others."""
    write_json(folder / "state" / "trainer.json", snapshot.counters)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    others = (path for path in files if path.relative_to(folder).as_posix() not in described)
    listing = dict(sorted({**described, **describe_files(folder, others)}.items()))
    write_json(folder / STATE_FILES, {"format": FORMAT, "version": VERSION, "files": listing})


def write_beside_shards(folder: Path, snapshot: Snapshot, info: Mapping[str, Any], shards: Sequence[Shard]) -> None:
    """Write what a checkpoint has beside the shards of all processes."""
    write_indexes(folder, shards)
    write_model_files(folder, info={**info, "step": snapshot.step}, model=None, averages={})
    _write_counters(folder, snapshot, {shard.name: shard.about for shard in shards})


def restore(folder: Path, state: TrainState) -> None:
    """Make the state what it was when the checkpoint was taken.

    Raises:
        UserError: the checkpoint's state is of another version, or lacks tensors of this network.
    """
    record = folder / "state" / "trainer.json"
    advice = "restore the checkpoint, or remove it to go on from an older one"
    content = read_json(record)
    if not isinstance(content, dict):
        raise UserError(f"{record} is no JSON object; {advice}")
    kind, version = content.get("format"), content.get("version")
    if kind != FORMAT or version != VERSION:
        raise UserError(
            f"{folder}/state has format {shortened(kind)} version {shortened(version)}, but this "
            f"program resumes {FORMAT!r} version {VERSION}; sample from it, or start anew with --init-from {folder}"
        )
    counters = typed(content, _Counters, f"{record} is damaged", advice=advice)
    before, now = counters.optimizer, state.optimizer.description
    if before.startswith("Muon") != now.startswith("Muon"):
        raise UserError(
            f"{folder} was made with {before} and cannot go on with {now}, whose state is another; give the "
            f"--optimizer of before, or start anew with --init-from {folder}"
        )
    if before != now:
        warn(f"the checkpoint was made with {before}, this is {now}: the run goes on, but not to the last bit")
    for stem, tensors in _tensor_lists(state):
        file, suffix = _place_in_files(stem)
        path = _path_of(folder, file)
        held = {
            name + suffix: shape
            for (name, shape), tensor in zip(state.placement.shapes.items(), tensors, strict=True)
            if tensor is not None
        }
        state.placement.put(each_tensor(path, held), tensors)
    state.optimizer.restore_counters({name: getattr(counters, name) for name in COUNTERS})
    state.step, state.batch_offset = counters.step, counters.jump
    state.rollbacks, state.seconds = counters.rollbacks, counters.seconds


class Saver:
    """Takes a snapshot, which is all that training waits for, and writes it in the background.

    One checkpoint is written at a time; the next one waits for it. An error while writing is raised at the next call.
    """

    def __init__(
        self,
        options: RunOptions,
        hardware: Hardware,
        info: Mapping[str, Any],
        mirror: "Mirror | None" = None,
        writers: Hardware | None = None,
    ) -> None:
        """Save into the run's folder.

        Args:
            options: where, and what is kept.
            hardware: the processes.
            info: the content of config.json.
            mirror: on the main process, what is told of every checkpoint.
            writers: the same processes apart, where each is to write its part in a thread; else the main one writes.
        """
        self._paused_seconds = 0.0
        self.saved_step: int | None = None
        self._options, self._hardware, self._info = options, hardware, info
        self.mirror, self._writers = mirror, writers
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
            parts = cut(state.placement.shapes, 1 if self._writers is None else self._hardware.processes)
            own = dict(enumerate(parts)).get(self._hardware.rank, [])
            snapshot = take_snapshot(state, keep={*own}, staging=self._staging)
            paused = time.perf_counter() - started
            self._paused_seconds += paused
            self.saved_step = state.step
            self._in_background(lambda: self._write(snapshot, len(parts), paused), everywhere=self._writers is not None)
        if wait:
            self.finish()
            self._hardware.barrier()

    def save_averages(self, state: TrainState) -> None:
        """Take snapshots of the power-function averages at this step; every process calls it."""
        started = time.perf_counter()
        self.finish()
        taken = take_averages(state, keep=self._hardware.is_main, staging=self._staging)
        self._paused_seconds += time.perf_counter() - started
        step = state.step  # training goes on meanwhile
        self._in_background(lambda: self._write_averages(step, taken))

    def _in_background(self, write: Callable[[], None], *, everywhere: bool = False) -> None:
        """Let the main process, or each, write while training goes on; `finish` waits for it."""
        if not (everywhere or self._hardware.is_main):
            return

        def work() -> None:
            try:
                write()
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that trains
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint writer")
        self._thread.start()

    def _write_averages(self, step: int, taken: dict[float, Tensors]) -> None:
        for sigma, tensors in taken.items():
            write_average(snapshot_path(self._options.out, step, sigma), tensors, step=step, sigma=sigma)

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

    def _write(self, snapshot: Snapshot, parts: int, paused: float) -> None:
        started = time.perf_counter()
        final = checkpoint_path(self._options.out, snapshot.step)
        temporary = final.with_name(f".{final.name}.partial")
        try:
            if self._writers is not None:
                # Its own name each time: of a job that was killed a process may still be writing elsewhere.
                temporary = final.with_name(self._writers.broadcast(f".{final.name}.{uuid.uuid4().hex[:8]}.partial"))
            with explained_writes(final):
                self._write_files(temporary, snapshot, parts)
            if not self._hardware.is_main:
                return
            if final.exists():  # only a checkpoint that this run has rolled back behind can be there
                discard(final)
            publish_folder(temporary, final)
            clean_up(self._options, spared=None if self.mirror is None else self.mirror.at_work)
        except BaseException:
            if self._hardware.is_main:
                remove_folder(temporary)
            raise
        if self.mirror is not None:
            self.mirror.wake()
        written = time.perf_counter() - started
        say(f"checkpoint {final.name}: training paused {paused:.2f} s, written in {written:.1f} s")

    def _write_files(self, folder: Path, snapshot: Snapshot, parts: int) -> None:
        if self._writers is None:
            remove_folder(folder)
            make_folder(folder)
            write_snapshot(folder, snapshot, self._info)
            return
        rank = self._writers.rank
        self._writers.together(lambda: make_folder(folder / "state") if rank == 0 else None)
        files = {_path_of(folder, stem): tensors for stem, tensors in snapshot.files.items()}
        written = self._writers.together(lambda: write_shards(folder, files, rank + 1, parts))
        if rank == 0:
            shards = [shard for of_one in written for shard in of_one]
            write_beside_shards(folder, snapshot, self._info, shards)
