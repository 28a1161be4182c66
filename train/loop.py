"""The training loop: one step after the other, and what happens between them.

A step waits for its batch where that has not been read ahead, which is measured, and for nothing else: not for the
device, not for the disk; only a logged step reads numbers back. A run's past depends on its options alone: the data
order and every draw are functions of the step (`train.data`, `train.losses`), so stopping at any moment and going on
gives the same bits.
"""

import enum
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.diffusion import Process
from pipeline.diffusion.process import noise_share
from pipeline.runtime.console import say, warn
from pipeline.runtime.devices import peak_flops
from pipeline.runtime.processes import StopRequest
from train.checkpointing import Saver, TrainState, restore
from train.data import Batch, BatchReader, BatchShard, DataOrder, view_candidates
from train.distributed import Hardware
from train.kept_checkpoints import checkpoint_path, discard_after, newest_good
from train.losses import Draws, LatentNormalization, LossSums, draw, name_what_went_bad, sample_losses, trained_loss
from train.metrics import ESTIMATE_AFTER, Log, Numbers, StepTimer, beside_bar, say_estimate
from train.optimizer import COUNTERS, learning_rate
from train.options import TrainOptions

if TYPE_CHECKING:  # the loop is handed an open store and finished pictures; it opens and draws none
    from PIL import Image

    from pipeline.features import FeatureStore
    from pipeline.features.targets import FeatureTargets, TokenNormalization
    from pipeline.latents import LatentStore

TIME_IS_UP = int(signal.SIGALRM)  # a time limit ends like an alarm clock: status 128 + 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """Everything the loop works with; none of it changes but the state."""

    options: TrainOptions
    hardware: Hardware
    store: "LatentStore"
    order: DataOrder
    shard: BatchShard
    process: Process
    normalization: LatentNormalization
    feature_store: "FeatureStore | None"
    """Where those and class tokens are read from."""
    features: "FeatureTargets | None"
    """What --align-features wants."""
    class_token: "TokenNormalization | None"
    """How --class-token's tokens are fed."""
    state: TrainState
    saver: Saver
    timer: StepTimer
    log: Log | None
    """On the main process only."""
    validate: Callable[[TrainState], Numbers] | None
    """The losses on held-out samples."""
    preview: "Callable[[TrainState], Image.Image | None] | None"
    """The picture of a step, on the main process; every process calls it."""
    flops_per_image: float
    """Floating-point operations of training on one image."""
    deadline: float | None
    """When the time limit is up, on `time.monotonic`'s clock."""

    def draws_of(self, batch: Batch) -> Draws:
        """Everything random about a batch's step, for this process's rows."""
        return _draws_of(self, batch)

    def features_of(self, batch: Batch, rows: slice) -> Tensor | None:
        """What the tokens of some rows are to be aligned with, if they are."""
        return None if self.features is None or batch.features is None else self.features.of(batch.features[rows])

    def class_token_of(self, batch: Batch, rows: slice) -> Tensor | None:
        """The clean class tokens of some rows, as the network is fed them, if it is."""
        return None if self.class_token is None or batch.cls is None else self.class_token.of(batch.cls[rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step leaves on the device."""

    norm: Tensor
    sums: LossSums | None
    """The losses, at logged steps."""
    rate: float


class Outcome(enum.Enum):
    """Why the steps came to an end."""

    DONE = enum.auto()
    STOPPED = enum.auto()
    """By a signal or the time limit."""
    ROLL_BACK = enum.auto()
    """Too many steps in a row were skipped."""


class StopVote:
    """Whether to stop, agreed between the processes, so that all of them stop after the same step.

    Every process says its wish before a step, and the answer travels while that step is computed: it is read before
    the next one, so that no host waits for another.
    """

    def __init__(self, hardware: Hardware, stop: StopRequest, deadline: float | None) -> None:
        self._hardware, self._stop, self._deadline = hardware, stop, deadline
        self._asked: tuple[dist.Work, Tensor] | None = None
        self.signal = 0
        """The number of the signal to stop for; 0 until there is one."""

    def agreed(self) -> bool:
        """Whether to stop now; all processes ask before each step."""
        mine = int(self._stop.signal or 0)
        if not mine and self._deadline is not None and time.monotonic() >= self._deadline:
            mine = TIME_IS_UP
        if self._hardware.processes == 1:
            self.signal = mine
            return mine != 0

        self.end()
        if not self.signal:
            box = torch.tensor(mine, dtype=torch.int64)
            work = dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._hardware.hosts, async_op=True)
            self._asked = (work, box)
        return self.signal != 0

    def end(self) -> None:
        """Read the answer to the last question; on every process, as none may leave while another asks."""
        if self._asked is not None:
            work, box = self._asked
            work.wait()
            self._asked, self.signal = None, int(box)


def run_steps(trainer: Trainer, stop: StopRequest) -> int:
    """Train until the last step or a request to stop; the exit status."""
    vote = StopVote(trainer.hardware, stop, trainer.deadline)
    while (outcome := train_until(trainer, vote)) is Outcome.ROLL_BACK:
        vote.end()
        if not _roll_back(trainer):
            return 1
    vote.end()
    return _finish(trainer) if outcome is Outcome.DONE else _leave(trainer, vote.signal)


def train_until(trainer: Trainer, vote: StopVote) -> Outcome:
    """Train until there is a reason to end, and give it."""
    state, options = trainer.state, trainer.options
    with reader_of(trainer) as reader:
        batches = iter(reader)
        while state.step < options.optimizer.steps:
            if vote.agreed():
                return Outcome.STOPPED
            logged = logs_at(state.step + 1, options) or state.step + 1 == options.optimizer.steps
            batch = next(batches)
            result = train_step(trainer, batch, with_losses=logged)
            state.step += 1
            trainer.timer.step()
            # The last step of a command is logged too, but decides nothing: a longer run would not have stopped there.
            if logged and _log_step(trainer, batch, result, reader.waited_seconds) and logs_at(state.step, options):
                return Outcome.ROLL_BACK
            _between_steps(trainer)
    return Outcome.DONE


def logs_at(step: int, options: TrainOptions) -> bool:
    """Whether a step is logged in every run that gets past it."""
    return step % options.run.log_every == 0 or _validates_at(step, options)


def _validates_at(step: int, options: TrainOptions) -> bool:
    wanted = options.data.validation is not None or options.data.validation_share > 0
    return wanted and step % options.data.validate_every == 0


def _keeps_averages_at(step: int, options: TrainOptions) -> bool:
    every = options.run.save_every if options.average.ema_snapshot_every is None else options.average.ema_snapshot_every
    return bool(options.average.sigmas and every) and step % every == 0


def reader_of(trainer: Trainer) -> BatchReader:
    """The batches from the state's own on."""
    options, until = trainer.options.data, trainer.options.model.features_until
    return BatchReader(
        trainer.store,
        trainer.order,
        trainer.shard,
        views=view_candidates(list(trainer.store.manifest.views), flip=options.flip),
        seed=options.seed,
        first=trainer.state.batch_number,
        prefetch=options.prefetch,
        device=trainer.hardware.device,
        features=trainer.feature_store,
        features_until=None if until is None else until + trainer.state.batch_offset,
        columns=[*["features"] * (trainer.features is not None), *["cls"] * (trainer.class_token is not None)],
    )


def train_step(trainer: Trainer, batch: Batch, *, with_losses: bool) -> StepResult:
    """One optimizer step on one global batch; nothing waits for the device."""
    state, shard, device = trainer.state, trainer.shard, trainer.hardware.device
    config = state.placement.network.config
    draws = _draws_of(trainer, batch)

    # Forward and backward, one micro-batch after the other.
    further_weights = trainer.options.model.further_weights
    sums = LossSums(device, list(further_weights)) if with_losses else None
    for part in range(shard.accumulation):
        rows = shard.micro_rows(part)
        some = draws.rows(rows)
        with state.placement.accumulating(last=part == shard.accumulation - 1):
            losses = sample_losses(
                state.placement.model,
                trainer.process,
                trainer.normalization,
                batch.latents[rows],
                batch.labels[rows],
                some,
                null_class=config.null_class,
                further_weights=further_weights,
                features=trainer.features_of(batch, rows),
                class_token=trainer.class_token_of(batch, rows),
            )
            state.optimizer.backward(trained_loss(losses, further_weights), shard.accumulation)
        if sums is not None:
            sums.add(losses, noise_share(trainer.process, trainer.process.network_timesteps(some.t)))

    # Weights, then the averages of them; a skipped step leaves both alone.
    rate = learning_rate(state.step, trainer.options.optimizer)
    norm, skip = state.optimizer.step(state.placement.gradients(), rate)
    for average in state.averages.values():
        average.update(state.placement.weights, step=state.step, skip=skip)
    state.placement.clear_gradients()
    return StepResult(norm=norm, sums=sums, rate=rate)


def _draws_of(trainer: Trainer, batch: Batch) -> Draws:
    config = trainer.state.placement.network.config
    return draw(
        trainer.process,
        batch.number,
        trainer.shard,
        (config.in_channels, config.height, config.width),
        seed=trainer.options.data.seed,
        dropout=config.class_dropout_prob,
        device=str(trainer.hardware.device),
        token=config.class_token,
    )


def _log_step(trainer: Trainer, batch: Batch, result: StepResult, waited_seconds: float) -> bool:
    """Read this step's numbers, which waits for the device, and write them; whether to roll back to a checkpoint."""
    state, options = trainer.state, trainer.options
    means, norm, counters = _read(trainer, result)
    elapsed, seconds, waiting = trainer.timer.look(waited_seconds)
    state.seconds += elapsed
    speed = trainer.shard.batch_size / seconds
    values: Numbers = {
        **means,
        "grad_norm": norm,
        "lr": result.rate,
        "images_per_second": speed,
        "data_wait_share": waiting,
        "skipped_steps": counters["skipped"],
        "memory_bytes": trainer.hardware.memory_bytes(),
        "save_pause_seconds": trainer.saver.take_pause(),
    }

    # What not every run has.
    if state.optimizer.scaled:
        values["loss_scale"] = counters["scale"]
    peak = peak_flops(trainer.hardware.device, trainer.hardware.precision)
    if peak is not None:
        values["mfu"] = speed * trainer.flops_per_image / (peak * trainer.hardware.processes)
    if trainer.validate is not None and _validates_at(state.step, options):
        with trainer.timer.paused():
            values |= trainer.validate(state)

    if trainer.log is not None:
        trainer.log.write(state.step, values)
        trainer.log.show(beside_bar(values))
    if 0 < counters["skipped_in_a_row"] <= options.run.log_every:  # once in a row of them
        _say_what_went_bad(trainer, batch)
    return counters["skipped_in_a_row"] >= options.optimizer.max_skipped_in_a_row


def _say_what_went_bad(trainer: Trainer, batch: Batch) -> None:
    """A word about a step that was skipped; every process must call it."""
    with trainer.timer.paused():
        said = name_what_went_bad(trainer, batch)
    if said is not None:
        warn(f"step {trainer.state.step:,} was skipped; {said}")


def _read(trainer: Trainer, result: StepResult) -> tuple[Numbers, float, dict[str, float]]:
    """(means of the losses, gradient norm, the optimizer's counters), all in one copy to the host."""
    assert result.sums is not None
    sums = trainer.hardware.all_reduce_sum(result.sums.values)
    counters = trainer.state.optimizer.counter_values()
    values = torch.cat([sums, result.norm.reshape(1).to(sums.dtype), counters.to(sums.dtype)]).tolist()
    count = len(sums)
    means, (norm, *counts) = result.sums.means(values[:count]), values[count:]
    return means, norm, dict(zip(COUNTERS, counts, strict=True))


def _between_steps(trainer: Trainer) -> None:
    """What is due after a step: the bar, the estimate, previews, a checkpoint."""
    state, options, log = trainer.state, trainer.options, trainer.log
    trainer.saver.raise_if_failed()
    if log is not None:
        log.bar.update(1)
        if trainer.timer.steps == ESTIMATE_AFTER and state.step < options.optimizer.steps:
            say_estimate(trainer.timer, options.optimizer.steps - state.step)
    with trainer.timer.paused():
        if trainer.preview is not None and state.step % options.preview.sample_every == 0:
            picture = trainer.preview(state)
            if log is not None and picture is not None:
                log.picture(state.step, "previews", picture)
        if _keeps_averages_at(state.step, options):
            trainer.saver.save_averages(state)  # before the checkpoint: a run that goes on from it has them
        if state.step % options.run.save_every == 0 and state.step < options.optimizer.steps:
            if log is not None:
                log.flush()
            trainer.saver.save(state)


def _roll_back(trainer: Trainer) -> bool:
    """Return to the last good checkpoint and pass over the offending batches; False if that is not possible."""
    state, options = trainer.state, trainer.options
    trainer.saver.finish()
    next_batch, rollbacks = state.batch_number, state.rollbacks + 1
    in_a_row = options.optimizer.max_skipped_in_a_row
    folder = trainer.hardware.on_main(lambda: newest_good(options.run.out))
    if folder is None or rollbacks > options.optimizer.max_rollbacks:
        why = "there is no checkpoint to go back to" if folder is None else f"{rollbacks - 1} returns did not help"
        warn(
            f"loss or gradient was not finite for {in_a_row} steps in a row at step {state.step:,}, and {why}; lower "
            f"--lr, set --clip-norm, use --qk-norm or --mixed-precision no"
        )
        return False

    # The state of then, but with the batches that come now.
    restore(Path(folder), state)
    state.optimizer.forget_streak()
    state.batch_offset, state.rollbacks = next_batch - state.step, rollbacks

    # What was written since is the past of no run any more.
    trainer.hardware.on_main(lambda: discard_after(options.run.out, state.step))
    warn(
        f"loss or gradient was not finite for {in_a_row} steps in a row; back to step {state.step:,}, going on with "
        f"the batches after the offending ones"
    )
    trainer.saver.saved_step = state.step
    if trainer.log is not None:
        trainer.log.roll_back(state.step)
    return True


def _finish(trainer: Trainer) -> int:
    """Save the last step and say so."""
    state = trainer.state
    trainer.saver.save(state, wait=True)
    streak = state.optimizer.counters()["skipped_in_a_row"]
    if streak:
        warn(f"the last {streak:.0f} steps were skipped, because their loss or gradient was not finite")
    say(f"done: step {state.step:,}, {checkpoint_path(trainer.options.run.out, state.step)}")
    if trainer.log is not None:
        say(*trainer.log.last_words(state.step, state.seconds))
    return 0


def _leave(trainer: Trainer, asked: int) -> int:
    """Save and say how to go on."""
    state, out = trainer.state, trainer.options.run.out
    if trainer.log is not None:
        trainer.log.flush()
    trainer.saver.save(state, wait=True)
    reason = "the time limit" if asked == TIME_IS_UP else signal.Signals(asked).name
    say(
        f"stopped by {reason} after step {state.step:,}, saved in {checkpoint_path(out, state.step)}; run the same "
        f"command again to go on"
    )
    return 128 + asked
