"""What a search found: as a table for people, as JSON, as a picture, and as the command line of the best setting."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sample.tune.options import TuneOptions
from sample.tune.points import Row

if TYPE_CHECKING:  # matplotlib takes a second to load
    from matplotlib.figure import Figure

FORMAT, VERSION = "dit-tune", 1
INCHES, DPI = (7.0, 4.6), 100
_MOST_NAMED = 12  # lines in a legend


def best_of(rows: Sequence[Row]) -> Row:
    """The row of the least distance; of equal ones the cheapest."""
    return min(rows, key=lambda row: (row.value, row.passes))


def cheapest_of(rows: Sequence[Row]) -> Row | None:
    """The row of the fewest passes within the best one's spread over seeds; None where there is a single seed."""
    best = best_of(rows)
    if best.std is None:
        return None
    near = [row for row in rows if row.value <= best.value + best.std]
    return min(near, key=lambda row: (row.passes, row.value))


def described(row: Row) -> dict[str, Any]:
    """A row as a line of tune.json: the setting as it was resolved, and its distance."""
    recipe = row.points[0].recipe
    return {
        "value": row.value,
        "std": row.std,
        "values": [point.value for point in row.points],
        "passes": row.passes,
        "weights": row.setting.weights,
        "sampler": recipe.sampler,
        "steps": recipe.steps,
        "guidance": recipe.guidance,
        "guidance_interval": recipe.guidance_interval,
    }


def build(rows: Sequence[Row], options: TuneOptions, request: str) -> dict[str, Any]:
    """The content of tune.json, the best row first."""
    cheapest = cheapest_of(rows)
    return {
        "format": FORMAT,
        "version": VERSION,
        "request": request,
        "metric": rows[0].points[0].metric,
        "seeds": list(options.seeds),
        "rows": [described(row) for row in sorted(rows, key=lambda row: (row.value, row.passes))],
        "best": command_of(best_of(rows), options),
        "cheapest": None if cheapest is None else command_of(cheapest, options),
    }


def table(result: dict[str, Any]) -> list[str]:
    """The lines that people read, the best setting first, and its command line below."""
    metric = result["metric"]
    lines = [
        f"{metric:>{max(12, len(metric))}}  {'std':>9}  {'passes':>6}  sampler    steps  guidance  within    weights"
    ]
    for row in result["rows"]:
        interval = row["guidance_interval"]
        within = "always" if interval is None else f"{interval[0]:g}:{interval[1]:g}"
        std = "" if row["std"] is None else f"{row['std']:.4f}"
        lines.append(
            f"{row['value']:>{max(12, len(metric))}.4f}  {std:>9}  {row['passes']:>6}  {row['sampler']:<9}  "
            f"{row['steps']:>5}  {row['guidance']:>8g}  {within:<8}  {row['weights']}"
        )
    lines += ["", f"best: {result['best']}"]
    if result["cheapest"] is not None and result["cheapest"] != result["best"]:
        lines.append(f"cheapest within the best one's spread over seeds: {result['cheapest']}")
    return lines


def command_of(row: Row, options: TuneOptions) -> str:
    """The dit-sample that samples so, every choice spelled out."""
    recipe = row.points[0].recipe
    interval = recipe.guidance_interval
    flags: dict[str, Any] = {
        "--checkpoint": options.checkpoint,
        "--out": "samples.npz",
        "--num-samples": options.num_samples,
        "--labels": options.labels,
        "--weights": row.setting.weights,
        "--sampler": recipe.sampler,
        "--steps": recipe.steps,
        "--eta": options.eta or None,
        "--guidance": f"{recipe.guidance:g}",
        "--guidance-interval": None if interval is None else f"{interval[0]:g}:{interval[1]:g}",
        "--guidance-channels": options.guidance_channels,
        "--guide": options.guide,
        "--guidance-source": None if options.guidance_source == "class" else options.guidance_source,
        "--middle-guidance": f"{options.middle_guidance:g}" if options.guidance_source == "both" else None,
        "--objective": options.objective,
        "--num-heads": options.num_heads,
        "--vae": options.vae,
    }
    words = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    return shlex.join(["dit-sample", *words, *(["--allow-other-vae"] if options.allow_other_vae else [])])


def draw(result: dict[str, Any]) -> "Figure":
    """The distance over the first number that varies, a line for each combination of what else varies."""
    from matplotlib.figure import Figure

    rows = [{**row, "sigma": _sigma(row["weights"])} for row in result["rows"]]
    numbers = [name for name in ("guidance", "sigma", "steps") if len({row[name] for row in rows} - {None}) > 1]
    across = numbers[0] if numbers else "passes"
    others = ("sampler", "steps", "guidance", "guidance_interval", "weights")
    varying = [name for name in others if len({str(row[name]) for row in rows}) > 1]
    varying = [name for name in varying if name != across and not (name == "weights" and across == "sigma")]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(", ".join(_in_words(name, row[name]) for name in varying), []).append(row)
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for name, members in lines.items():
        along = sorted((row for row in members if row[across] is not None), key=lambda row: float(row[across]))
        spread = [row["std"] or 0.0 for row in along]
        axes.errorbar(
            [row[across] for row in along],
            [row["value"] for row in along],
            yerr=spread if any(spread) else None,
            marker="o",
            markersize=4,
            capsize=3,
            label=name,
        )
    axes.set_xlabel("passes of the network for one image" if across == "passes" else across)
    axes.set_ylabel(result["metric"])
    axes.grid(visible=True, alpha=0.3)
    if varying and len(lines) <= _MOST_NAMED:
        axes.legend(fontsize="small")
    return figure


def _sigma(weights: str) -> float | None:
    return float(weights.removeprefix("sigma=")) if weights.startswith("sigma=") else None


def _in_words(name: str, value: Any) -> str:
    if name == "guidance_interval":
        return "guided always" if value is None else f"guided {value[0]:g}:{value[1]:g}"
    return f"{value} steps" if name == "steps" else f"guidance {value:g}" if name == "guidance" else str(value)
