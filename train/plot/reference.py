"""Reference curves: what several seeds of one recipe looked like, and whether another run of it looks the same.

A reference is a small JSON file, made of run folders that differ in their seed. A single step's loss is noisy, so what
stands there of a run is the mean of every fortieth part of it; validation losses stand as they were logged.

The band at a point is where one more run of the recipe is expected with 95 %: Student's prediction interval of the
logarithms over the seeds, whose spread is pooled over the points next to it, as three seeds alone say too little of it.
A run lies within if no more of its points are outside than chance explains (1 %), and no three in a row on one side.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.runtime.config_files import find_config
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import Count, Finite, shortened, typed
from train.plot.curves import Points, Series, read_series

FORMAT, VERSION = "dit-reference", 1
FOLDER = Path(__file__).parents[2] / "docs" / "reference"
PARTS, NEIGHBOURS = 40, 2
CONFIDENCE, CHANCE, IN_A_ROW = 0.95, 0.01, 3
AVERAGED, EXACT = ("loss",), ("validation_loss", "validation_loss_ema")
_IDENTITY = "# data_identity: "


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedRun:
    """One run of a reference."""

    seed: int
    curves: dict[str, list[tuple[float, float]]]
    """{logged number: [(step, value)]}; of the loss, means of the steps up to there."""
    scores: dict[str, float]
    """Metrics of dit-evaluate; empty where none were given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What a reference's file says."""

    name: str
    command: str
    data: str
    """Identity of what was learned from, as a run's config.yaml has it."""
    settings: dict[str, Any]
    """Every flag that decides what is learned, but the seed."""
    made_with: dict[str, str]
    """Hardware and versions."""
    steps: Count
    runs: list[SeedRun]


def read_reference(given: str) -> Reference:
    """The reference of that name in docs/reference, or that of a file.

    Raises:
        UserError: there is neither, or it is damaged or of another version.
    """
    path = find_config(given, FOLDER, flag="--reference", suffix=".json")
    content = read_json(path)
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise UserError(f"--reference {path} is no {FORMAT} of version {VERSION}; make one with --save-reference")
    about = {**content, "name": path.stem}
    reference: Reference = typed(about, Reference, f"--reference {path} is damaged", advice="make it again")
    if len(reference.runs) < 2:
        raise UserError(f"--reference {path} is damaged: it has no curves of two runs; make it again")
    return reference


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scores:
    metrics: dict[str, Finite] = field(default_factory=dict)


def _scores(path: Path) -> dict[str, float]:
    said: _Scores = typed(read_json(path), _Scores, f"{path} is no result of dit-evaluate", advice="give another one")
    return said.metrics


def make_reference(runs: Sequence[Path], scores: Sequence[Path] = ()) -> dict[str, Any]:
    """The content of a reference's file.

    Raises:
        UserError: there are fewer than two runs, or they differ in more than their seed, or not in that.
    """
    series, about = [read_series(run) for run in runs], [_settings(run) for run in runs]
    seeds = [settings["seed"] for settings, _ in about]
    if len({*seeds}) < len(runs) or len(runs) < 2:
        raise UserError(f"--save-reference needs two or more runs with seeds of their own, not seeds {seeds}")
    (first, data), *others = about
    for run, (settings, other_data) in zip(runs[1:], others, strict=True):
        different = _differences(settings, first) + ["the data"] * (data != other_data)
        if different:
            raise UserError(f"{run} differs from {runs[0]} in more than the seed: {'; '.join(different)}")
    for run, each in zip(runs, series, strict=True):
        if lacks := [name for name in AVERAGED if not each.get(name)]:
            raise UserError(
                f"--save-reference needs curves, but {run} has logged no {', '.join(lacks)}; train it first"
            )
    steps = int(min(each["loss"][-1][0] for each in series))
    parts = sorted({round(steps * part / PARTS) for part in range(1, PARTS + 1)} - {0})
    curves = [
        {name: part_means(each[name], parts) for name in AVERAGED}
        | {name: [point for point in each[name] if point[0] <= steps] for name in EXACT if name in each}
        for each in series
    ]
    results = [_scores(path) for path in scores] or [{}] * len(runs)
    return {
        "format": FORMAT,
        "version": VERSION,
        "command": f"{_command(first)} --steps {steps}{_pace(runs[0])}",
        "data": data,
        "settings": {name: value for name, value in first.items() if name != "seed"},
        "made_with": _made_with(),
        "steps": steps,
        "runs": [
            {"seed": seed, "curves": _rounded(curve), "scores": result}
            for seed, curve, result in zip(seeds, curves, results, strict=True)
        ],
    }


def part_means(points: Points, ends: Sequence[float]) -> Points:
    """[(end, mean of the values after the end before it)]; parts in which nothing was logged, or not yet all, lack."""
    found = []
    for begin, end in itertools.pairwise([0, *ends]):
        values = [value for step, value in points if begin < step <= end]
        if values and points[-1][0] >= end:
            found.append((end, float(np.mean(values))))
    return found


def band_of(curves: Sequence[Points]) -> dict[float, tuple[float, float]]:
    """{step: (lowest, highest)} of where one more run is expected, at steps that all curves have."""
    from scipy import stats

    known = [dict(points) for points in curves]
    steps = sorted(set.intersection(*(set(points) for points in known)))
    table = np.array([[points[step] for step in steps] for points in known])
    on_logs = bool((table > 0).all())
    values = np.log(table) if on_logs else table
    count, band = len(curves), {}
    variances = values.var(axis=0, ddof=1)
    for place, step in enumerate(steps):
        near = variances[max(0, place - NEIGHBOURS) : place + NEIGHBOURS + 1]
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(near) * (count - 1))
        half = float(quantile * math.sqrt(near.mean() * (1 + 1 / count)))
        middle = float(values[:, place].mean())
        ends = middle - half, middle + half
        band[step] = (math.exp(ends[0]), math.exp(ends[1])) if on_logs else ends
    return band


def bands_of(reference: Reference) -> dict[str, dict[float, tuple[float, float]]]:
    """{logged number: its band}."""
    return {name: band_of(curves) for name, curves in _by_name(reference).items()}


def _by_name(reference: Reference) -> dict[str, list[Points]]:
    return {
        name: [run.curves[name] for run in reference.runs]
        for name in (*AVERAGED, *EXACT)
        if all(run.curves.get(name) for run in reference.runs)
    }


def drawn_bands(reference: Reference) -> dict[str, list[tuple[float, float, float]]]:
    """Bands as they are drawn: that of means in the middle of each part."""
    half = reference.steps / PARTS / 2
    return {
        name: [(step - half * (name in AVERAGED), *ends) for step, ends in band.items()]
        for name, band in bands_of(reference).items()
    }


def verdict(name: str, series: Series, run: Path, reference: Reference) -> list[str]:
    """Sentences: whether a run lies within the band, in which settings it is another one, what the seeds scored."""
    told, good = [], True
    for what, band in bands_of(reference).items():
        points = series.get(what, [])
        seen = part_means(points, list(band)) if what in AVERAGED else [point for point in points if point[0] in band]
        if seen:
            within, words = _compared(what, seen, band)
            good &= within
            told.append(words)
    whose = f"the band of {len(reference.runs)} seeds of {reference.name}"
    if not told:
        return [f"{name} has logged nothing yet that {reference.name} could be compared with"]
    said = [f"{name} {'lies within' if good else 'leaves'} {whose}: {'; '.join(told)}"]
    settings, data = _settings(run)
    different = _differences(settings, reference.settings) + ["the data"] * (data != reference.data)
    if different:
        said.append(f"{name} is not that recipe: {'; '.join(different)}")
    scores = {metric for each in reference.runs for metric in each.scores}
    for metric in sorted(scores):
        values = ", ".join(f"{each.scores[metric]:.4g}" for each in reference.runs if metric in each.scores)
        said.append(f"{reference.name} has {metric} {values}")
    return said


def _compared(what: str, seen: Points, band: Mapping[float, tuple[float, float]]) -> tuple[bool, str]:
    """(whether a curve lies within its band, how much of it does, in words)."""
    from scipy import stats

    sides = [(value > band[step][1]) - (value < band[step][0]) for step, value in seen]
    outside = [place for place, side in enumerate(sides) if side]
    most = stats.binom.ppf(1 - CHANCE, len(seen), 1 - CONFIDENCE)
    rows = [len(list(same)) for side, same in itertools.groupby(sides) if side]
    within = len(outside) <= most and max(rows, default=0) < IN_A_ROW
    words = f"{what} in {len(seen) - len(outside)} of {len(seen)} points until step {seen[-1][0]:,.0f}"
    if within:
        return True, words
    step, value = seen[outside[0]]
    return False, f"{words}, first not at step {step:,.0f}: {value:.4g}, expected {_span(band[step])}"


def _span(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.4g} … {ends[1]:.4g}"


def _settings(run: Path) -> tuple[dict[str, Any], str]:
    """(every flag that decides what a run learned, the identity of its data)."""
    from train.options import TrainOptions
    from train.run_folder import may_change, settings_in

    values, text = settings_in(run)
    seed = values.get("seed", 0)
    if type(seed) is not int:
        raise UserError(
            f"the settings of {run} have the seed {shortened(seed)}, which is no whole number; restore them"
        )
    free = may_change(TrainOptions, with_checkpoint=True)
    kept = {name: value for name, value in values.items() if name not in free}
    lines = [line.removeprefix(_IDENTITY) for line in text.splitlines() if line.startswith(_IDENTITY)]
    return kept | {"seed": seed}, (lines or ["unknown"])[0]


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """`--lr 0.001 (not 0.003)` of each setting but the seed that both have, and that differs."""
    both = [name for name in theirs if name in ours and name != "seed"]
    return [f"--{name} {ours[name]} (not {theirs[name]})" for name in both if ours[name] != theirs[name]]


def _command(settings: Mapping[str, Any]) -> str:
    """The dit-train of a run: every setting that is not the default."""
    from train.options import DataOptions, RunOptions, TrainOptions, plain_values

    defaults = plain_values(TrainOptions(data=DataOptions(latents=""), run=RunOptions(out=Path())))
    words = ["dit-train --latents STORE --out RUN --seed SEED"]
    for name, value in settings.items():
        if name == "seed" or name not in defaults or defaults[name] == value or value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(words)


def _pace(run: Path) -> str:
    """How often a run was looked at: a run that is to be compared has its validation losses at the same steps."""
    from train.run_folder import recorded_intervals

    return "".join(f" --{name} {every}" for name, every in recorded_intervals(run).items())


def _made_with() -> dict[str, str]:
    """What the figures were made on: this machine, which the runs must have been trained on, too."""
    import platform

    import torch

    from pipeline.inspect.machine import package_version, processor

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    versions = {name: str(package_version(name)) for name in ("dit-pipeline", "torch", "numpy")}
    return {"device": device, "python": platform.python_version(), **versions}


def _rounded(curves: Mapping[str, Points]) -> dict[str, list[list[float]]]:
    """To six digits, more than which two machines do not share."""
    return {name: [[step, float(f"{value:.6g}")] for step, value in points] for name, points in curves.items()}
