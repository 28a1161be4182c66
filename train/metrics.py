"""What a user watches: the bar, metrics.jsonl, TensorBoard and Weights & Biases, all from one dictionary of numbers."""

import contextlib
import importlib.util
import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from pipeline.runtime.console import progress, say, warn
from pipeline.runtime.errors import UserError
from train.options import TrainOptions, plain_values
from train.run_folder import MetricsFile

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

Numbers = dict[str, float | None]
"""What is logged of a step, by name; None where there is nothing to say."""
ESTIMATE_AFTER = 50


class StepTimer:
    """How fast training goes: steps and seconds since the last look, without the pauses that are not training."""

    def __init__(self) -> None:
        self.steps = 0
        """Steps since this command began."""
        self._spent = 0.0
        self._mark = time.perf_counter()
        self._looked_steps = 0
        self._waited = 0.0

    def step(self) -> None:
        """Count one."""
        self.steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out."""
        started = time.perf_counter()
        yield
        self._mark += time.perf_counter() - started

    def look(self, waited_seconds: float) -> tuple[float, float, float]:
        """(seconds, seconds per step, share of them spent waiting for data) since the last look."""
        now = time.perf_counter()
        elapsed, steps = max(now - self._mark, 1e-9), max(self.steps - self._looked_steps, 1)
        share = min(max(waited_seconds - self._waited, 0.0) / elapsed, 1.0)
        self._mark, self._looked_steps, self._waited = now, self.steps, waited_seconds
        self._spent += elapsed
        return elapsed, elapsed / steps, share

    def estimate(self, steps_left: int) -> float:
        """Seconds until the end at the pace of this command."""
        spent = self._spent + time.perf_counter() - self._mark
        return spent / max(self.steps, 1) * steps_left


class Log:
    """Writes each logged step everywhere; exists on the main process only."""

    def __init__(self, options: TrainOptions, *, after_step: int, keep_until: int, accelerator: "Accelerator") -> None:
        """Go on after a step, keeping the lines until `keep_until`; Weights & Biases go through `accelerator`."""
        run = options.run
        self._file = MetricsFile(run.out, after_step=keep_until)
        self._board = _tensorboard(options, after_step) if run.tensorboard else None
        self._tracking = accelerator if run.wandb_project else None
        if self._tracking is not None:
            self._tracking.init_trackers(run.wandb_project, config=plain_values(options))
        self._options = options
        self.bar = progress(
            options.optimizer.steps, unit="steps", description=f"training {options.model.model}", initial=after_step
        )

    def write(self, step: int, values: Numbers) -> None:
        """One step's numbers: a line, events, and the bar's postfix. A number that is not finite is written as null."""
        plain = {name: _finite(value) for name, value in values.items()}
        self._file.append({"step": step, **plain})
        known = {name: value for name, value in plain.items() if value is not None}
        if self._board is not None:
            for name, value in known.items():
                self._board.add_scalar(f"train/{name}", value, step)
        if self._tracking is not None:
            self._tracking.log(known, step=step)

    def show(self, values: Mapping[str, str]) -> None:
        """The numbers beside the bar."""
        self.bar.set_postfix(dict(values), refresh=False)

    def picture(self, step: int, name: str, image: "Image.Image") -> None:
        """A picture for TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def roll_back(self, step: int) -> None:
        """Forget what was logged past a step."""
        self._file.drop_after(step)
        if self._board is not None:
            self._board.close()
            self._board = _tensorboard(self._options, step)
        self.bar.n = step
        self.bar.refresh()

    def flush(self) -> None:
        """Make everything written so far survive."""
        self._file.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close everything."""
        self.bar.close()
        if self._board is not None:
            self._board.close()
        if self._tracking is not None:
            self._tracking.trackers[0].finish()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _tensorboard(options: TrainOptions, after_step: int) -> "SummaryWriter | None":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warn("TensorBoard is not installed, so no events are written; pip install tensorboard, or --no-tensorboard")
        return None
    folder = str(options.run.out / "tensorboard")
    return SummaryWriter(folder, purge_step=after_step + 1)


def refuse_missing_wandb(options: TrainOptions) -> None:
    """Raise UserError where Weights & Biases is asked for and not installed."""
    if options.run.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb-project needs Weights & Biases; pip install wandb, or leave the flag out")


def beside_bar(values: Numbers) -> dict[str, str]:
    """The few numbers that stand beside the bar."""
    shown = {"loss": f"{values['loss']:.4f}", "images/s": f"{values['images_per_second']:.1f}"}
    shown["data wait"] = f"{values['data_wait_share']:.0%}"
    if values.get("mfu") is not None:
        shown["MFU"] = f"{values['mfu']:.0%}"
    if values["skipped_steps"]:
        shown["skipped"] = f"{values['skipped_steps']:.0f}"
    return shown


def say_estimate(timer: StepTimer, steps_left: int) -> None:
    """A line with the time the rest will take."""
    say(f"at this pace the remaining {steps_left:,} steps take about {duration(timer.estimate(steps_left))}")


def duration(seconds: float) -> str:
    """A time for people: seconds, minutes, hours or days."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
