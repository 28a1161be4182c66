"""The pictures of a report, by matplotlib: distance against GFLOPs and compute, curves over training, samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from studies.cells import Run, Study
from studies.measure import LOSS, Place, Result, samples_of
from studies.statistics import PowerLaw, fit_power_law, spread

DPI = 110
WIDE, HIGH = 8.0, 4.6
Cells = Mapping[str, Sequence[Result]]
"""{cell: its measured runs, one per seed}."""


def gflops_of(results: Sequence[Result]) -> float:
    """10⁹ multiply-adds of a forward pass of a cell's network, which the paper calls GFLOPs."""
    return results[0].macs / 1e9


def value_of(results: Sequence[Result], metric: str) -> float:
    """A cell's metric at the end, the mean of its seeds."""
    return float(np.mean([result.final(metric) for result in results]))


def fit_of(cells: Cells, metric: str) -> PowerLaw | None:
    """Figure 8: the metric at the end against GFLOPs."""
    return fit_power_law(
        [gflops_of(results) for results in cells.values()], [value_of(results, metric) for results in cells.values()]
    )


def compute_points(cells: Cells, metric: str) -> dict[str, list[tuple[float, float]]]:
    """Figure 9: {cell: [(GFLOPs of training so far, the metric, mean of seeds)]}; training takes 3 forward passes."""
    found = {}
    for cell, results in cells.items():
        curves = [result.curve(metric) for result in results]
        means = [float(np.mean([value for _, value in points])) for points in zip(*curves, strict=True)]
        found[cell] = [(3 * gflops_of(results) * x, y) for (x, _), y in zip(curves[0], means, strict=True)]
    return found


def measures(study: Study, cells: Cells) -> list[str]:
    """What there is to compare: the study's metric; other Fréchet distances and the held-out loss, if all have them."""
    every = [result for results in cells.values() for result in results]
    last = [
        {name.rpartition("-")[0] for name in result.points[-1].metrics if name.startswith("FD-")} for result in every
    ]
    others = sorted(set.intersection(*last) - {study.metric}) if last else []
    return [study.metric, *others, *([LOSS] if all(result.curve(LOSS) for result in every) else [])]


def draw_flops(study: Study, cells: Cells, _: Place) -> Figure:
    """Figure 8: each measure against GFLOPs, on log axes, a colour per patch size, with the fit and r."""
    figure, panels = _panels("GFLOPs of a forward pass (10⁹ multiply-adds)", measures(study, cells), logarithmic_x=True)
    patches = sorted({results[0].patch_size for results in cells.values()})
    for metric, axes in panels.items():
        for number, patch in enumerate(patches):
            chosen = {cell: results for cell, results in cells.items() if results[0].patch_size == patch}
            x = [gflops_of(results) for results in chosen.values()]
            y = [value_of(results, metric) for results in chosen.values()]
            axes.plot(x, y, "o", markersize=8, color=f"C{number}", label=f"patch {patch}", zorder=3)
            for cell, left, up in zip(chosen, x, y, strict=True):
                axes.annotate(cell, (left, up), xytext=(7, 5), textcoords="offset points", fontsize="small")
        law = fit_of(cells, metric)
        if law is not None:
            every = [gflops_of(results) for results in cells.values()]
            ends = [min(every), max(every)]
            label = f"fit: {law.factor:.3g} · GFLOPs^{law.exponent:.2f},  r = {law.r:.3f}"
            axes.plot(ends, [law.at(end) for end in ends], "--", color="#555555", label=label)
        axes.margins(x=0.12)
        axes.legend()
    return figure


def draw_compute(study: Study, cells: Cells, _: Place) -> Figure:
    """Figure 9: each measure against the compute spent on training so far."""
    x = "training compute so far (GFLOPs: 3 × forward × samples)"
    figure, panels = _panels(x, measures(study, cells), logarithmic_x=True)
    for metric, axes in panels.items():
        for number, (cell, points) in enumerate(compute_points(cells, metric).items()):
            marker = _MARKERS[number % len(_MARKERS)]
            axes.plot(*zip(*points, strict=True), marker=marker, color=_color(number), label=cell)
        axes.legend(fontsize="small", ncols=2)
    return figure


def draw_curves(study: Study, cells: Cells, _: Place) -> Figure:
    """Each measure over training; bands are 95 % intervals of the seeds' mean."""
    figure, panels = _panels("training samples", measures(study, cells), logarithmic_x=False)
    for metric, axes in panels.items():
        for number, (cell, results) in enumerate(cells.items()):
            columns = list(zip(*(result.curve(metric) for result in results), strict=True))
            samples = [points[0][0] for points in columns]
            bands = [spread([value for _, value in points]) for points in columns]
            marker = _MARKERS[number % len(_MARKERS)]
            axes.plot(samples, [band.value for band in bands], marker=marker, color=_color(number), label=cell)
            if len(results) > 1:
                low, high = ([max(band.low, band.value / 10) for band in bands], [band.high for band in bands])
                axes.fill_between(samples, low, high, color=_color(number), alpha=0.15, linewidth=0)
        axes.legend(fontsize="small", ncols=2)
    return figure


def draw_samples(_: Study, cells: Cells, place: Place) -> Figure:
    """Figure 7: a row of pictures per cell, every column of one noise and one class."""
    rows = {}
    for cell, results in cells.items():
        first = results[0]
        rows[cell] = samples_of(place.folder(Run(cell=cell, seed=first.seed, flags=first.flags)))
    columns = max(len(images) for images in rows.values())
    names = 0.3 + 0.1 * max(map(len, rows))  # inches that the longest one takes
    # Higher than the pictures need: where the height bounds them, names are cut, as the layout knows only full widths.
    figure = Figure(figsize=(names + 0.75 * columns, 0.9 * len(rows) + 0.3), dpi=DPI, layout="constrained")
    for row, (cell, images) in enumerate(rows.items()):
        axes = figure.add_subplot(len(rows), 1, row + 1)
        axes.imshow(np.concatenate(list(images), axis=1))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(cell, rotation=0, ha="right", va="center")
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSpec:
    """A picture of a report."""

    title: str
    draw: Callable[[Study, Cells, Place], Figure]


PICTURES = {
    "flops": PictureSpec(title="Against the GFLOPs of a forward pass (figure 8)", draw=draw_flops),
    "compute": PictureSpec(title="Against training compute (figure 9)", draw=draw_compute),
    "curves": PictureSpec(title="Over training", draw=draw_curves),
    "samples": PictureSpec(title="Samples: one noise and one class per column (figure 7)", draw=draw_samples),
}

_MARKERS = "osD^v<>PX*"


def _color(number: int) -> str:
    return f"C{number % 10}"


def _panels(x: str, names: Sequence[str], *, logarithmic_x: bool) -> tuple[Figure, dict[str, Axes]]:
    """One pair of axes per measure, one below the other."""
    figure = Figure(figsize=(WIDE, HIGH * len(names)), dpi=DPI, layout="constrained")
    panels = {name: figure.add_subplot(len(names), 1, row) for row, name in enumerate(names, 1)}
    for name, axes in panels.items():
        _dress(axes, x, name, logarithmic_x=logarithmic_x)
    return figure, panels


def _dress(axes: Axes, x: str, y: str, *, logarithmic_x: bool) -> None:
    axes.set_yscale("log")
    sides = [(axes.yaxis, (1, 2, 3, 4, 5, 7))]
    if logarithmic_x:
        axes.set_xscale("log")
        sides.append((axes.xaxis, (1, 2, 5)))  # type: ignore[arg-type]
    for side, marks in sides:
        side.set_major_locator(LogLocator(subs=marks))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        side.set_minor_locator(NullLocator())
        side.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#dddddd")
