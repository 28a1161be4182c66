"""What a run logged, as curves: of one run, or of several over each other, with a reference's bands behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import read_log

if TYPE_CHECKING:  # matplotlib takes a second to load, and --help does not need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]
Series = dict[str, Points]
PANEL_INCHES, DPI = (6.0, 3.4), 100
EXACT = {"lr", "validation_loss", "validation_loss_ema"}  # without noise of their own: a running mean would only lag
Bands = Mapping[str, Sequence[tuple[float, float, float]]]
"""{logged number: [(step, lowest, highest)]} of where a run is expected."""
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


def read_series(run: Path) -> Series:
    """{name: [(step, value), …]} of everything that a run logged.

    Raises:
        UserError: the folder holds no metrics, or none yet.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a run that has logged a step")
    series: Series = {}
    for _, said in read_log(path):
        for name, value in said.numbers.items():
            series.setdefault(name, []).append((said.step, value))
    if not series:
        raise UserError(f"{path} holds no step yet; wait until the run has logged one")
    return series


def draw_curves(runs: dict[str, Series], *, smoothing: float, bands: Bands | None = None) -> "Figure":
    """All panels that have anything to show, two in a row: a colour per run, or per number where there is one run."""
    from matplotlib.figure import Figure

    filled = [panel for panel in PANELS if any(name in series for series in runs.values() for name in panel.names)]
    rows, (width, height) = -(-len(filled) // 2), PANEL_INCHES
    figure = Figure(figsize=(2 * width, rows * height), dpi=DPI, layout="constrained")
    for number, panel in enumerate(filled, 1):
        axes = figure.add_subplot(rows, 2, number)
        _draw_panel(axes, panel, runs, smoothing=smoothing, bands=bands or {})
    return figure


def _draw_panel(axes: "Axes", panel: Panel, runs: dict[str, Series], *, smoothing: float, bands: Bands) -> None:
    several = len(runs) > 1
    drawn: list[float] = []
    for kind, name in enumerate(panel.names):
        if name in bands:
            steps, low, high = zip(*bands[name], strict=True)
            color = "#999999" if several else f"C{kind}"
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, label=f"reference {name}")
            drawn += [*low, *high]
    for place, (run, series) in enumerate(runs.items()):
        for kind, name in enumerate(panel.names):
            points = series.get(name, [])
            if not points:
                continue
            color = f"C{place if several else kind}"
            label = " ".join([run] * several + [name] * (len(panel.names) > 1 or not several))
            steps, values = zip(*points, strict=True)
            weight = 0.0 if name in EXACT or name in bands else smoothing  # a mean that lags would leave its band
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
