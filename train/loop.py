"""The training loop: one step after the other, and what happens between them.

Nothing in a step waits for the device, the data or the disk; only a logging step reads numbers back. A run's past
depends on its options alone: the data order and every draw are functions of the step (`train.data`,
`train.losses`), so stopping at any moment and going on gives the same bits.
"""

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.diffusion import Process
from pipeline.runtime.console import say, warn
from pipeline.runtime.processes import StopRequest
from train.checkpointing import (
    Saver,
    TrainState,
    all_checkpoints,
    checkpoint_path,
    discard,
    find_damage,
    is_amid_skips,
    newest_sound,
    restore,
)
from train.data import Batch, BatchReader, DataOrder, Share, view_candidates
from train.distributed import Hardware
from train.losses import Latents, LossSums, draw, sample_losses
from train.metrics import ESTIMATE_AFTER, Log, Pace, say_estimate
from train.optimizer import learning_rate
from train.options import TrainOptions
from train.previews import Previews
from train.validation import Validation

TIME_IS_UP = int(signal.SIGALRM)  # a time limit ends like an alarm clock: status 128 + 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Everything the loop works with; none of it changes but the state."""

    options: TrainOptions
    hardware: Hardware
    store: Any
    order: DataOrder
    share: Share
    process: Process
    latents: Latents
    state: TrainState
    saver: Saver
    pace: Pace
    log: Log | None
    """On the main process only."""
    validation: Validation | None
    previews: Previews | None
    flops_per_image: float
    """Floating-point operations of training on one image."""
    deadline: float | None
    """When the time limit is up, on `time.monotonic`'s clock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step leaves on the device."""

    norm: Tensor
    sums: LossSums | None
    """The losses, at logging steps."""
    rate: float


def run_steps(parts: Parts, stop: StopRequest) -> int:
    """Train until the last step or a request to stop; the exit status."""
    while True:
        ending = _sitting(parts, stop)
        if ending != "go back":
            break
        if not _go_back(parts):
            return 1
    if ending == "done":
        parts.saver.save(parts.state, wait=True)
        streak = parts.state.optimizer.counters()["skipped_in_a_row"]
        if streak:
            warn(f"the last {streak:.0f} steps were skipped, because their loss or gradient was not finite")
        say(f"done: step {parts.state.step:,}, {checkpoint_path(parts.options.run.out, parts.state.step)}")
        return 0
    return _leave(parts, int(ending))


def _sitting(parts: Parts, stop: StopRequest) -> str:
    """Steps until "done", "go back", or the number of the signal to stop for."""
    state, options = parts.state, parts.options
    with reader_of(parts) as reader:
        batches = iter(reader)
        while state.step < options.optimizer.steps:
            asked = parts.hardware.largest(_asked_to_stop(parts, stop))
            if asked:
                return str(asked)
            logged = logs_at(state.step + 1, options) or state.step + 1 == options.optimizer.steps
            result = train_step(parts, next(batches), with_losses=logged)
            state.step += 1
            parts.pace.step()
            # The last step of a sitting is logged too, but decides nothing: a longer run would not have stopped there.
            if logged and _log_step(parts, result, reader.waited_seconds) and logs_at(state.step, options):
                return "go back"
            _between_steps(parts)
    return "done"


def logs_at(step: int, options: TrainOptions) -> bool:
    """Whether a step is logged in every run that gets past it."""
    return step % options.run.log_every == 0 or _validates_at(step, options)


def _validates_at(step: int, options: TrainOptions) -> bool:
    wanted = options.data.validation is not None or options.data.validation_share > 0
    return wanted and step % options.data.validate_every == 0


def reader_of(parts: Parts) -> BatchReader:
    """The batches from the state's own on."""
    options = parts.options.data
    return BatchReader(
        parts.store,
        parts.order,
        parts.share,
        views=view_candidates(list(parts.store.manifest["views"]), flip=options.flip),
        seed=options.seed,
        first=parts.state.batch_number,
        prefetch=options.prefetch,
        device=parts.hardware.device,
    )


def _asked_to_stop(parts: Parts, stop: StopRequest) -> int:
    if stop.signal:
        return int(stop.signal)
    return TIME_IS_UP if parts.deadline is not None and time.monotonic() >= parts.deadline else 0


def train_step(parts: Parts, batch: Batch, *, with_losses: bool) -> StepResult:
    """One optimizer step on one global batch; nothing waits for the device."""
    state, share, device = parts.state, parts.share, parts.hardware.device
    draws = draw(
        parts.process,
        batch.number,
        share,
        (parts.latents.channels, *batch.moments.shape[-2:]),
        seed=parts.options.data.seed,
        dropout=parts.latents.class_dropout,
        device=str(device),
    )
    sums = LossSums(device) if with_losses else None
    for part in range(share.accumulation):
        rows = share.micro_rows(part)
        some = draws.rows(rows)
        with state.placement.accumulating(last=part == share.accumulation - 1):
            losses = sample_losses(
                state.placement.model, parts.process, parts.latents, batch.moments[rows], batch.labels[rows], some
            )
            state.optimizer.backward(losses["loss"].mean(), share.accumulation)
        if sums is not None:
            sums.add(losses, parts.process.network_timesteps(some.t) / parts.process.time_scale)
    rate = learning_rate(state.step, parts.options.optimizer)
    norm, skip = state.optimizer.step(state.placement.gradients(), rate)
    for average in state.averages.values():
        average.update(state.placement.weights, step=state.step, skip=skip)
    state.placement.clear_gradients()
    return StepResult(norm=norm, sums=sums, rate=rate)


def _log_step(parts: Parts, result: StepResult, waited_seconds: float) -> bool:
    """Read this step's numbers, which waits for the device, and write them; whether to go back to a checkpoint."""
    state, options = parts.state, parts.options
    assert result.sums is not None
    means = result.sums.means(parts.hardware.add_up)
    counters = state.optimizer.counters()
    elapsed, seconds, waiting = parts.pace.look(waited_seconds)
    state.seconds += elapsed
    speed = parts.share.batch_size / seconds
    values: dict[str, float | None] = {
        **means,
        "grad_norm": float(result.norm),
        "lr": result.rate,
        "images_per_second": speed,
        "data_wait_share": waiting,
        "skipped_steps": counters["skipped"],
        "memory_bytes": parts.hardware.memory_bytes(),
        "save_pause_seconds": parts.saver.take_pause(),
    }
    if parts.state.optimizer.scaled:
        values["loss_scale"] = counters["scale"]
    peak = parts.hardware.peak_flops()
    if peak is not None:
        values["mfu"] = speed * parts.flops_per_image / (peak * parts.hardware.processes)
    if parts.validation is not None and _validates_at(state.step, options):
        values |= _validate(parts, parts.validation)
    if parts.log is not None:
        parts.log.write(state.step, values)
        parts.log.show(_beside_bar(values))
    return counters["skipped_in_a_row"] >= options.optimizer.max_skipped_in_a_row


def _beside_bar(values: dict[str, float | None]) -> dict[str, str]:
    loss = values["loss"]
    shown = {"loss": f"{loss:.4f}", "images/s": f"{values['images_per_second']:.1f}"}
    shown["data wait"] = f"{values['data_wait_share']:.0%}"
    if values.get("mfu") is not None:
        shown["MFU"] = f"{values['mfu']:.0%}"
    if values["skipped_steps"]:
        shown["skipped"] = f"{values['skipped_steps']:.0f}"
    return shown


def _between_steps(parts: Parts) -> None:
    """What is due after a step: the bar, the estimate, previews, a checkpoint."""
    state, options = parts.state, parts.options
    parts.saver.raise_if_failed()
    if parts.log is not None:
        parts.log.bar.update(1)
        if parts.pace.steps == ESTIMATE_AFTER and state.step < options.optimizer.steps:
            say_estimate(parts.pace, options.optimizer.steps - state.step)
    with parts.pace.paused():
        if parts.previews is not None and state.step % options.preview.sample_every == 0:
            _preview(parts, parts.previews)
        if state.step % options.run.save_every == 0 and state.step < options.optimizer.steps:
            if parts.log is not None:
                parts.log.flush()
            parts.saver.save(state)


def _validate(parts: Parts, validation: Validation) -> dict[str, float | None]:
    state = parts.state
    with parts.pace.paused():
        values: dict[str, float | None] = {"validation_loss": validation.loss(state.placement.evaluate)}
        with state.averages["ema"].exchanged_with(state.placement.weights):
            values["validation_loss_ema"] = validation.loss(state.placement.evaluate)
    return values


def _preview(parts: Parts, previews: Previews) -> None:
    state = parts.state
    sets: dict[str, Callable[[], Any]] = {
        "raw": contextlib.nullcontext,
        "ema": lambda: state.averages["ema"].exchanged_with(state.placement.weights),
    }
    picture = previews.draw(sets, state.placement.evaluate, state.step)
    if parts.log is not None and picture is not None:
        parts.log.picture(state.step, "previews", picture)


def _go_back(parts: Parts) -> bool:
    """Return to the last good checkpoint and jump past the offending batches; False if that is not possible."""
    state, options = parts.state, parts.options
    parts.saver.finish()
    next_batch, rollbacks = state.batch_number, state.rollbacks + 1
    in_a_row = options.optimizer.max_skipped_in_a_row
    folder = parts.hardware.once(lambda: _last_good(options.run.out))
    if folder is None or rollbacks > options.optimizer.max_rollbacks:
        why = "there is no checkpoint to go back to" if folder is None else f"{rollbacks - 1} returns did not help"
        warn(
            f"loss or gradient was not finite for {in_a_row} steps in a row at step {state.step:,}, and {why}; lower "
            f"--lr, set --clip-norm, use --qk-norm or --mixed-precision no"
        )
        return False
    restore(Path(folder), state)
    state.optimizer.forget_streak()
    state.jump, state.rollbacks = next_batch - state.step, rollbacks
    parts.hardware.once(lambda: _discard_after(options.run.out, state.step))
    warn(
        f"loss or gradient was not finite for {in_a_row} steps in a row; back to step {state.step:,}, going on with "
        f"the batches after the offending ones"
    )
    parts.saver.saved_step = state.step
    if parts.log is not None:
        parts.log.go_back(state.step)
    return True


def _last_good(run: Path) -> Path | None:
    """The newest whole checkpoint from before the skipped steps; if all were taken amid such, the newest whole one.

    Skipped steps leave the weights alone, so that one is good too; it only may stand close before the trouble.
    """
    newest = newest_sound(run)
    before = (folder for _, folder in reversed(all_checkpoints(run)) if not is_amid_skips(folder))
    return next((folder for folder in before if find_damage(folder) is None), newest)


def _discard_after(run: Path, step: int) -> None:
    """Remove the checkpoints of what was gone back behind."""
    for number, folder in all_checkpoints(run):
        if number > step:
            discard(folder)


def _leave(parts: Parts, asked: int) -> int:
    """Save and say how to go on."""
    state, out = parts.state, parts.options.run.out
    if parts.log is not None:
        parts.log.flush()
    parts.saver.save(state, wait=True)
    reason = "the time limit" if asked == TIME_IS_UP else signal.Signals(asked).name
    say(
        f"stopped by {reason} after step {state.step:,}, saved in {checkpoint_path(out, state.step)}; run the same "
        f"command again to go on"
    )
    return 128 + asked
