"""Trains and compares networks, cell by cell, and reports what was found: `python -m studies NAME`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.runtime.bounds import Shown, check_bounds
from pipeline.runtime.console import run_command, say, show, warn


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyOptions:
    """Which study, of what, and where to."""

    name: Annotated[str, tyro.conf.Positional]
    """scaling, conditioning, recipes, or a YAML file of your own (docs/studies.md)."""
    data: str
    """Latent store written by dit-extract; images made are compared with what its VAE makes of it."""
    out: Path
    """Folder of the study: cells/, and report/ with report.html. Running the command again goes on there."""
    seeds: Shown | None = None
    """Runs of every cell. Default: as the study says."""
    quick: bool = False
    """A short version, in minutes, to see that everything works; its numbers mean nothing."""
    dry_run: bool = False
    """Say what would be trained, and what it takes; nothing is written."""
    vae: str | None = None
    """The VAE that decodes. Default: the one that the store names."""

    def __post_init__(self) -> None:
        check_bounds(self)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    return run_command(
        StudyOptions,
        lambda options: run(options, sys.argv[1:] if argv is None else argv),
        prog="studies",
        description=__doc__ or "",
        argv=argv,
    )


def run(options: StudyOptions, words: Sequence[str]) -> int:
    """Work the study off and report; 1 if a cell failed, 128 + the signal's number if one asked to stop."""
    from studies.cells import read_study

    study = read_study(options.name, quick=options.quick, seeds=options.seeds)
    if options.dry_run:
        from studies.forecast import HEADING, forecast
        from studies.report import markdown

        rows, bad = forecast(study, options.data)
        show(markdown([HEADING, *rows]).splitlines())
        for cell, why in bad.items():
            warn(f"{cell} cannot be trained: {why}")
        return int(bool(bad))
    from studies.measure import StoppedError
    from studies.report import markdown, report_path, write_report
    from studies.work import open_place, work_off

    place = open_place(study, options.data, options.out, vae=options.vae)
    try:
        findings = work_off(study, place)
    except StoppedError as stop:
        say(f"studies: stopped by {stop}; run the same command again to continue")
        return 128 + stop.number
    found = write_report(study, place, findings, words)
    show([*markdown(found["table"]).splitlines(), *found["sentences"]])
    say(f"wrote {report_path(place)}")
    return int(bool(findings.failed))


if __name__ == "__main__":
    sys.exit(main())
