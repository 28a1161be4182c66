"""The command `python -m train.plot`: curves as one PNG, compared with a reference, or made into one."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.runtime.bounds import Decay, check_bounds
from pipeline.runtime.console import run_command, say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes, write_json
from pipeline.runtime.publish import making
from train.plot.curves import distinct_names, draw_curves, read_series


@dataclass(frozen=True, kw_only=True, slots=True)
class PlotOptions:
    """Which runs to draw, and where to."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """Picture to write. Default: curves.png in the first run."""
    smoothing: Decay = 0.9
    """Weight of the past in the bold line, 0 to 1; pale is what was logged. The learning rate is not smoothed."""
    reference: str | None = None
    """Draw a reference's band and say of each run whether it lies within: a name in docs/reference, or a file."""
    save_reference: Path | None = None
    """Make a reference of these runs, which differ in their seed alone: a JSON file."""
    scores: tuple[Path, ...] = ()
    """Results of dit-evaluate --out, one for each run, which the reference then has, too."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.runs:
            raise UserError("name at least one run folder")
        if self.reference is not None and self.save_reference is not None:
            raise UserError("--reference and --save-reference exclude each other; compare with what you have saved")
        if self.scores and self.save_reference is None:
            raise UserError("--scores stand in a reference; give --save-reference FILE.json")
        if self.scores and len(self.scores) != len(self.runs):
            raise UserError(f"--scores names {len(self.scores)} results for {len(self.runs)} runs; give one for each")
        if self.save_reference is not None and self.save_reference.suffix != ".json":
            raise UserError(f"--save-reference {self.save_reference} must end in .json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status."""
    return run_command(
        PlotOptions, _run, prog="python -m train.plot", description="Draw the curves of a run as a PNG.", argv=argv
    )


def _run(options: PlotOptions) -> None:
    names = distinct_names([run.resolve() for run in options.runs])
    runs = {name: read_series(run) for name, run in zip(names, options.runs, strict=True)}
    bands = None
    if options.save_reference is not None:
        _save_reference(options, options.save_reference)
    elif options.reference is not None:
        from train.plot.reference import drawn_bands, read_reference, verdict

        reference = read_reference(options.reference)
        bands = drawn_bands(reference)
        for (name, series), run in zip(runs.items(), options.runs, strict=True):
            say(*verdict(name, series, run, reference))
    out = options.out or options.runs[0] / "curves.png"
    with explained_writes(out), making(out.absolute(), overwrite=True) as stage:
        figure = draw_curves(runs, smoothing=options.smoothing, bands=bands)
        figure.savefig(stage.place(out.absolute()), format="png")
    say(f"wrote {out}")


def _save_reference(options: PlotOptions, path: Path) -> None:
    from train.plot.reference import make_reference

    made = make_reference(options.runs, options.scores)
    with explained_writes(path), making(path.absolute(), overwrite=True) as stage:
        write_json(stage.place(path.absolute()), made)
    say(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
