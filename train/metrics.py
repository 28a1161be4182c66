"""What a user watches: the bar, metrics.jsonl, TensorBoard and Weights & Biases, all from one dictionary of numbers."""

import contextlib
import importlib.util
import math
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.runtime.console import progress, say, warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.units import duration
from train.options import RunOptions, TrainOptions, plain_values
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
        self._tracking = accelerator if tracker_names(run) else None
        if self._board is not None:
            self._board.add_text("config", _as_table(plain_values(options)), after_step)
        if self._tracking is not None:
            project = run.wandb_project or run.tracker_project
            self._tracking.init_trackers(project, config=plain_values(options))
        self._options = options
        self.bar = progress(
            options.optimizer.steps, unit="steps", description=f"training {options.model.title}", initial=after_step
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
        """A picture for TensorBoard, and for every tracker that takes pictures."""
        pixels = np.asarray(image)
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")
        for tracker in self._tracking.trackers if self._tracking is not None else ():
            if hasattr(tracker, "log_images"):
                tracker.log_images({name: [pixels]}, step=step)

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

    def last_words(self, step: int, seconds: float) -> list[str]:
        """What a finished run came to, and the command that shows it."""
        self.flush()
        images, out = step * self._options.optimizer.batch_size, self._options.run.out
        came_to = f"{images:,} images seen in {duration(seconds)} of training"
        for name, whose in (("validation_loss_ema", "average"), ("validation_loss", "raw weights")):
            if (best := self._file.smallest(name)) is not None:
                came_to += f"; best validation loss, of the {whose}, {best[0]:.4f} at step {best[1]:,}"
                break
        return [came_to, f"next: dit-sample --checkpoint {shlex.quote(str(out))} --out samples.png"]

    def close(self) -> None:
        """Close everything."""
        self.bar.close()
        if self._board is not None:
            self._board.close()
        if self._tracking is not None:
            for tracker in self._tracking.trackers:
                tracker.finish()


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


def tracker_names(run: RunOptions) -> tuple[str, ...]:
    """The trackers to log to by Accelerate's names, each once."""
    named = [name.strip() for name in run.trackers.split(",") if name.strip()]
    return tuple(dict.fromkeys(named + ["wandb"] * (run.wandb_project is not None)))


def refuse_missing_trackers(options: TrainOptions) -> None:
    """Raise UserError where a tracker is asked for that Accelerate does not know, or that is not installed."""
    names = tracker_names(options.run)
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = sorted(set(LOGGER_TYPE_TO_CLASS) - {"tensorboard"})
    for name in names:
        if name == "tensorboard":
            raise UserError("--trackers tensorboard: TensorBoard is logged to anyway, unless --no-tensorboard is given")
        if name not in known:
            raise UserError(f"--trackers {name}: Accelerate has no tracker of that name; it has {', '.join(known)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--trackers {name} needs the package {name}; pip install {name}, or leave it out")


def _as_table(values: Mapping[str, Any]) -> str:
    """Settings as a table in Markdown, which TensorBoard shows."""
    rows = (f"| {name} | `{value}` |" for name, value in values.items())
    return "\n".join(["| flag | value |", "|---|---|", *rows])


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
