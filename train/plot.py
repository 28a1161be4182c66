"""`python -m train.plot RUN [RUN …]`: the curves of one run, or of several over each other, as one PNG."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pipeline.runtime.console import run_command, say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes
from pipeline.runtime.publish import making

if TYPE_CHECKING:  # matplotlib takes a second to load, and --help does not need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]
Series = dict[str, Points]
PANEL_INCHES, DPI = (6.0, 3.4), 100
EXACT = {"lr", "validation_loss", "validation_loss_ema"}  # without noise of their own: a running mean would only lag
DASHES = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One pair of axes: what is drawn on it, and how."""

    title: str
    names: tuple[str, ...]
    """The logged numbers in it."""
    logarithmic: bool = False


PANELS = (
    Panel(title="loss", names=("loss", "validation_loss", "validation_loss_ema"), logarithmic=True),
    Panel(
        title="loss by quarter of the timesteps",
        names=("loss_q0", "loss_q1", "loss_q2", "loss_q3"),
        logarithmic=True,
    ),
    Panel(title="mse", names=("mse",), logarithmic=True),
    Panel(title="variational bound", names=("vb",), logarithmic=True),
    Panel(title="gradient norm", names=("grad_norm",), logarithmic=True),
    Panel(title="learning rate", names=("lr",)),
    Panel(title="images per second", names=("images_per_second",)),
    Panel(title="share of time waiting for data", names=("data_wait_share",)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlotOptions:
    """Which runs to draw, and where to."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """Picture to write. Default: curves.png in the first run."""
    smoothing: float = 0.9
    """Weight of the past in the bold line, 0 to 1; pale is what was logged. The learning rate is not smoothed."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("name at least one run folder")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"--smoothing {self.smoothing} must lie in 0 … 1, without 1")


def read_series(run: Path) -> Series:
    """{name: [(step, value), …]} of everything that a run logged.

    Raises:
        UserError: the folder holds no metrics, or none yet.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a run that has logged a step")
    series: Series = {}
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # the line that is being written at this moment
            continue
        if not isinstance(values, dict) or "step" not in values:
            continue
        for name, value in values.items():
            if name != "step" and value is not None:
                series.setdefault(name, []).append((values["step"], value))
    if not series:
        raise UserError(f"{path} holds no step yet; wait until the run has logged one")
    return series


def draw_curves(runs: dict[str, Series], *, smoothing: float) -> "Figure":
    """All panels that have anything to show, two in a row: a colour per run, or per number where there is one run."""
    from matplotlib.figure import Figure

    filled = [panel for panel in PANELS if any(name in series for series in runs.values() for name in panel.names)]
    rows, (width, height) = -(-len(filled) // 2), PANEL_INCHES
    figure = Figure(figsize=(2 * width, rows * height), dpi=DPI, layout="constrained")
    for number, panel in enumerate(filled, 1):
        axes = figure.add_subplot(rows, 2, number)
        _draw_panel(axes, panel, runs, smoothing=smoothing)
    return figure


def _draw_panel(axes: "Axes", panel: Panel, runs: dict[str, Series], *, smoothing: float) -> None:
    several = len(runs) > 1
    drawn: list[float] = []
    for place, (run, series) in enumerate(runs.items()):
        for kind, name in enumerate(panel.names):
            points = series.get(name, [])
            if not points:
                continue
            color = f"C{place if several else kind}"
            label = " ".join([run] * several + [name] * (len(panel.names) > 1 or not several))
            steps, values = zip(*points, strict=True)
            weight = 0.0 if name in EXACT else smoothing
            if weight:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            bold = [value for _, value in smoothed(points, weight)]
            dashes, marker = DASHES[kind * several], "." if len(points) == 1 else ""
            axes.plot(steps, bold, color=color, linestyle=dashes, marker=marker, label=label)
            drawn += values
    _dress(axes, panel, drawn)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize="small")


def _dress(axes: "Axes", panel: Panel, drawn: list[float]) -> None:
    """Title, axes and ticks. One wild step must not flatten the rest: the axis ends at the 99.5th percentile."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    values = sorted(drawn)
    low, high = values[0], values[min(len(values) - 1, int(0.995 * len(values)))]
    if panel.logarithmic and low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.1, high * 1.1)
    else:
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(panel.title, loc="left", fontsize="medium")
    axes.set_xlabel("step")
    axes.grid(color="#dddddd")


def smoothed(points: Points, weight: float) -> Points:
    """A running mean m ← w·m + (1 − w)·v, corrected for its empty start."""
    result, mean, mass = [], 0.0, 0.0
    for step, value in points:
        mean, mass = weight * mean + (1 - weight) * value, weight * mass + (1 - weight)
        result.append((step, mean / mass))
    return result


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """What to call folders: as many of their last parts as it takes to tell them apart."""
    parts = max(len(path.parts) for path in paths)
    for count in range(1, parts + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status."""
    return run_command(
        PlotOptions, _run, prog="python -m train.plot", description="Draw the curves of a run as a PNG.", argv=argv
    )


def _run(options: PlotOptions) -> None:
    names = distinct_names([run.resolve() for run in options.runs])
    runs = {name: read_series(run) for name, run in zip(names, options.runs, strict=True)}
    out = options.out or options.runs[0] / "curves.png"
    with explained_writes(out), making(out.absolute(), overwrite=True) as stage:
        draw_curves(runs, smoothing=options.smoothing).savefig(stage.place(out.absolute()), format="png")
    say(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
