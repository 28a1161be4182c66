"""What a study is: cells that differ in a few flags, seeds, a budget in samples, and what to draw of it; from YAML."""

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.runtime.cli import nearest
from pipeline.runtime.config_files import find_config, read_config
from pipeline.runtime.console import printable
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import Count, typed

SHIPPED = Path(__file__).parent / "shipped"
JUDGE = "judge"
"""As `features`: the judge that the study trains on its store (studies/judge.py)."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
Flags = dict[str, Any]
"""{flag of a command without its dashes: value}, as in a --config file."""
Picture = Literal["flops", "compute", "curves", "samples"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """One comparison, as its YAML file says it (dashes there, underscores here)."""

    question: str
    """What it is to answer, in a sentence."""
    samples: Count
    """Budget of every cell: training samples, whatever the batch."""
    cells: dict[str, Flags]
    """{name: what differs from `train` and, in its key `evaluate`, from that}; in the order of tables."""
    train: Flags = field(default_factory=dict)
    """Flags of dit-train that all cells share."""
    evaluate: Flags = field(default_factory=dict)
    """Flags of dit-evaluate; dit-sample takes sampler, steps and guidance from them, too."""
    measure: Count = 4
    """Measurements over the budget, at equal distances, the last at its end."""
    seeds: Count = 1
    """Runs of every cell."""
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    """{flag: values}: each cell tries every combination once, on a seed of its own, and its seeds take the best."""
    metric: str = "FD-pixels"
    """What is compared: a metric of dit-evaluate's result without the number of images; less is better."""
    baseline: str | None = None
    """The cell that the others are compared with."""
    threshold: float | None = None
    """Value of the metric that must be reached. Default: what every seed of the baseline has reached at its end."""
    expected: list[str] = field(default_factory=list)
    """Cells from best to worst, as a paper says; the report tells whether that is found."""
    draw: list[Picture] = field(default_factory=lambda: ["curves"])
    """Pictures of the report."""
    quick: dict[str, Any] = field(default_factory=dict)
    """What --quick replaces; of `cells`, the names that stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run of a study."""

    cell: str
    seed: int
    flags: Flags
    """What its cell, and the sweep, sets."""
    tried: str = ""
    """What it tries for its cell's sweep; empty for a run that is measured."""

    @property
    def name(self) -> str:
        """Its folder."""
        return ".".join(filter(None, (self.cell, self.tried, f"seed-{self.seed}")))


def read_study(name: str, *, quick: bool = False, seeds: int | None = None) -> Study:
    """The shipped study of that name, or that of a YAML file.

    Raises:
        UserError: there is neither, or the file does not say a study; key and what is wrong are named.
    """
    path = find_config(name, SHIPPED, flag="the study")
    values = {key.replace("-", "_"): value for key, value in read_config(path, flag="the study").items()}
    less = values.get("quick")
    if quick and isinstance(less, dict):
        parts = [values.get("cells", {}), values.get("evaluate", {}), less.get("evaluate", {})]
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{path} is no study: cells and evaluate must be mappings, also those of quick")
        kept = less.get("cells", list(values.get("cells", {})))
        values["expected"] = [cell for cell in values.get("expected", []) if cell in kept]
        values |= {key.replace("-", "_"): value for key, value in less.items() if key not in {"cells", "evaluate"}}
        values["cells"] = {cell: flags for cell, flags in values.get("cells", {}).items() if cell in kept}
        values["evaluate"] = values.get("evaluate", {}) | less.get("evaluate", {})
    fields = [each.name for each in dataclasses.fields(Study)]
    for key in values.keys() - set(fields):
        close = nearest(key, fields, count=1)
        raise UserError(
            f"{path} is no study: {printable(key)[:60]} is unknown; {f'did you mean {close[0]}?' if close else fields}"
        )
    study: Study = typed(values, Study, f"{path} is no study", advice="see docs/studies.md")
    if seeds is not None:
        study = dataclasses.replace(study, seeds=seeds)
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    wrong = [f"the cell name {name!r} is no plain word" for name in study.cells if not _NAME.fullmatch(name)]
    if not study.cells or min(study.samples, study.measure, study.seeds) < 1:
        wrong.append("cells, samples, measure and seeds must be at least 1")
    if study.baseline is not None and study.baseline not in study.cells:
        wrong.append(f"the baseline {printable(study.baseline)[:60]} is none of its cells")
    wrong += [
        f"{printable(name)[:60]}, which is expected, is none of its cells"
        for name in study.expected
        if name not in study.cells
    ]
    ours = {"latents", "out", "seed", "steps", "samples", "reference", "save-every", "keep-last", "validate-every"}
    for where, flags in {"train": study.train, "evaluate": study.evaluate, **study.cells}.items():
        taken = sorted(ours & flags.keys() - ({"steps", "seed"} if where == "evaluate" else set()))
        wrong += [f"{where} sets {', '.join(taken)}, which the study sets itself"] * bool(taken)
    wrong += [
        f"evaluate of {printable(name)[:60]} must be flags with their values"
        for name, flags in study.cells.items()
        if not isinstance(flags.get("evaluate", {}), dict)
    ]
    for run in planned(study, {}, ()) if not wrong else ():
        flags = evaluate_flags(study, run)
        clash = sorted({"metrics", "repeat"} & flags.keys()) if isinstance(flags.get("features"), list) else []
        wrong += [f"{run.cell} compares by several features, which {', '.join(clash)} cannot be set for"] * bool(clash)
    if wrong:
        raise UserError(f"{path} is no study: {'; '.join(wrong)}")


def planned(study: Study, scores: Mapping[str, float], failed: Collection[str]) -> list[Run]:
    """Every run that can be said by now, cell by cell; a cell's measured runs follow when its sweep is over.

    Args:
        scores: {run: the metric at its end} of those that are finished.
        failed: runs that will not be.
    """
    first = int(bool(study.sweep))  # the sweep's seed is measured no more: the best of several draws looks too good
    runs = []
    for cell, flags in study.cells.items():
        tries = [Run(cell=cell, seed=0, flags=flags | tried, tried=_words(tried)) for tried in _combinations(study)]
        runs += tries
        if all(run.name in scores or run.name in failed for run in tries):
            good = [run for run in tries if run.name in scores]
            if tries and not good:
                continue
            best = min(good, key=lambda run: scores[run.name]).flags if good else flags
            runs += [Run(cell=cell, seed=seed, flags=best) for seed in range(first, first + study.seeds)]
    return runs


def _combinations(study: Study) -> list[Flags]:
    if not study.sweep:
        return []
    return [dict(zip(study.sweep, values, strict=True)) for values in itertools.product(*study.sweep.values())]


def _words(flags: Flags) -> str:
    return "_".join(f"{name}-{value}" for name, value in flags.items())


def edges(study: Study, chosen: Mapping[str, Flags]) -> list[str]:
    """A sentence per cell whose best value of the sweep is the least or the greatest tried: it may lie beyond."""
    return [
        f"{cell}: --{name} {flags[name]} is at the edge of what was tried; the best may lie beyond"
        for cell, flags in chosen.items()
        for name, values in study.sweep.items()
        if len(values) > 1 and flags.get(name) in {min(values), max(values)}
    ]


def evaluate_flags(study: Study, run: Run) -> Flags:
    """Flags of a run's dit-evaluate, without what it compares."""
    own: Flags = run.flags.get("evaluate", {})
    return study.evaluate | own


def features_of(study: Study, run: Run) -> list[Any]:
    """By which features a run's samples are compared."""
    features = evaluate_flags(study, run).get("features", "inception")
    return features if isinstance(features, list) else [features]


def train_flags(study: Study, run: Run, *, data: str, out: Path) -> Flags:
    """All flags of a run's dit-train, as a --config file holds them.

    The budget is cut into `measure` parts of whole steps. A schedule that decays does so over the budget.
    """
    flags: Flags = {"validation-share": 0.1, "log-every": 50, "sample-every": 0, "tensorboard": False}
    flags |= study.train | {name: value for name, value in run.flags.items() if name != "evaluate"}
    every = max(1, round(study.samples / flags.get("batch-size", 256) / study.measure))
    steps = every * study.measure
    flags |= {"latents": data, "out": str(out), "seed": run.seed, "steps": steps, "save-every": every}
    flags |= {"keep-last": 0, "validate-every": every}
    if flags.get("lr-schedule", "constant") != "constant":
        flags.setdefault("decay-steps", steps)
    return flags
