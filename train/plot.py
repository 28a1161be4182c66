"""`python -m train.plot RUN…`: the curves of one run, or of several over each other, as one PNG."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image, ImageDraw, ImageFont

from pipeline.image_grid import save_png
from pipeline.runtime.console import run_command, say
from pipeline.runtime.errors import UserError

Points = list[tuple[float, float]]
PANEL_PX, MARGIN_PX, FONT_PX = (520, 300), (84, 34, 18, 30), 14  # margins: left, top, right, bottom
COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2"]
# Each panel: its title, the series in it, and whether its axis is logarithmic.
PANELS: list[tuple[str, list[str], bool]] = [
    ("loss", ["loss", "validation_loss", "validation_loss_ema"], True),
    ("loss by quarter of the timesteps", ["loss_q0", "loss_q1", "loss_q2", "loss_q3"], True),
    ("mse", ["mse"], True),
    ("variational bound", ["vb"], True),
    ("gradient norm", ["grad_norm"], True),
    ("learning rate", ["lr"], False),
    ("images per second", ["images_per_second"], False),
    ("share of time waiting for data", ["data_wait_share"], False),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlotOptions:
    """Which runs to draw, and where to."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """Picture to write. Default: curves.png in the first run."""
    smoothing: float = 0.9
    """Weight of the past in the bold line, 0 to 1; the pale one is what was logged."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("name at least one run folder")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"--smoothing {self.smoothing} must lie in 0 … 1, without 1")


def read_series(run: Path) -> dict[str, Points]:
    """{name: [(step, value), …]} of everything that a run logged.

    Raises:
        UserError: the folder holds no metrics, or none yet.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a run that has logged a step")
    series: dict[str, Points] = {}
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


def draw_curves(runs: dict[str, dict[str, Points]], *, smoothing: float) -> Image.Image:
    """All panels that have anything to show, two in a row."""
    filled = [panel for panel in PANELS if any(name in series for series in runs.values() for name in panel[1])]
    width, height = PANEL_PX
    picture = Image.new("RGB", (2 * width, -(-len(filled) // 2) * height), "white")
    for k, (title, names, logarithmic) in enumerate(filled):
        curves = {
            (name if len(runs) == 1 else f"{run}: {name}"): series[name]
            for run, series in runs.items()
            for name in names
            if name in series
        }
        panel = _draw_panel(title, curves, logarithmic=logarithmic, smoothing=smoothing)
        picture.paste(panel, (k % 2 * width, k // 2 * height))
    return picture


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """The axes of one panel: values to pixels."""

    steps: tuple[float, float]
    values: tuple[float, float]
    logarithmic: bool

    def pixel(self, step: float, value: float) -> tuple[float, float]:
        left, top, right, bottom = MARGIN_PX
        width, height = PANEL_PX[0] - left - right, PANEL_PX[1] - top - bottom
        low, high = map(self._scaled, self.values)
        across = (step - self.steps[0]) / max(self.steps[1] - self.steps[0], 1e-12)
        up = (self._scaled(value) - low) / max(high - low, 1e-12)
        return left + across * width, top + (1 - up) * height

    def ticks(self) -> list[float]:
        """Four values, evenly spaced along the axis."""
        low, high = map(self._scaled, self.values)
        places = [low + k / 3 * (high - low) for k in range(4)]
        return [10**place if self.logarithmic else place for place in places]

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.logarithmic else value


def _frame(curves: dict[str, Points], logarithmic: bool) -> _Frame:
    steps = [step for points in curves.values() for step, _ in points]
    values = sorted(value for points in curves.values() for _, value in points)
    logarithmic = logarithmic and values[0] > 0
    # One wild step must not flatten the rest: the axis ends at the 99.5th percentile.
    low, high = values[0], values[min(len(values) - 1, int(0.995 * len(values)))]
    if low == high:
        low, high = low - max(abs(low) * 0.1, 1e-9), high + max(abs(high) * 0.1, 1e-9)
    return _Frame(steps=(min(steps), max(steps)), values=(low, high), logarithmic=logarithmic)


def _draw_panel(title: str, curves: dict[str, Points], *, logarithmic: bool, smoothing: float) -> Image.Image:
    picture = Image.new("RGB", PANEL_PX, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_PX)
    frame = _frame(curves, logarithmic)
    left, top, right, bottom = MARGIN_PX
    end = PANEL_PX[0] - right
    for value in frame.ticks():
        _, y = frame.pixel(0, value)
        pen.line([(left, y), (end, y)], fill="#dddddd")
        pen.text((left - 6, y), f"{value:.3g}", fill="black", font=font, anchor="rm")
    for step, anchor in zip(frame.steps, ("lm", "rm"), strict=True):
        x, _ = frame.pixel(step, frame.values[0])
        pen.text((x, PANEL_PX[1] - bottom / 2), f"{step:,.0f}", fill="black", font=font, anchor=anchor)
    inner = Image.new("RGB", PANEL_PX, "white")
    pens = ImageDraw.Draw(inner)
    for colour, points in zip(_colours(len(curves)), curves.values(), strict=True):
        pens.line([frame.pixel(*point) for point in points], fill=_pale(colour), width=1)
    for colour, points in zip(_colours(len(curves)), curves.values(), strict=True):
        pens.line([frame.pixel(*point) for point in smoothed(points, smoothing)], fill=colour, width=2)
    box = (left + 1, top, end, PANEL_PX[1] - bottom)
    picture.paste(Image.composite(inner.crop(box), picture.crop(box), _drawn_on(inner.crop(box))), box)
    pen.text((left, top / 2), title, fill="black", font=font, anchor="lm")
    _legend(pen, font, list(curves), end)
    return picture


def _drawn_on(image: Image.Image) -> Image.Image:
    """A mask of everything that is not white."""
    return image.convert("L").point(lambda level: 0 if level == 255 else 255)


def _legend(
    pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, names: list[str], end: float
) -> None:
    if len(names) == 1:
        return
    for k, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        pen.text((end - 4, MARGIN_PX[1] + 10 + k * (FONT_PX + 3)), name, fill=colour, font=font, anchor="rm")


def _colours(count: int) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(count)]


def _pale(colour: str) -> str:
    levels = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return "#" + "".join(f"{level + (255 - level) * 2 // 3:02x}" for level in levels)


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
    save_png(out, draw_curves(runs, smoothing=options.smoothing))
    say(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
