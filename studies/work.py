"""Works off a study's runs: claims one after the other, so that any number of processes share a folder."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.latents import LatentStore
from pipeline.runtime.arrays import load_member
from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder
from pipeline.runtime.work_queue import try_claim
from studies.cells import JUDGE, Run, Study, features_of, planned
from studies.judge import decoded, identity_of, make_judge, make_once
from studies.measure import Place, Result, measured

_POLL_SECONDS = 2.0


@dataclass(kw_only=True, slots=True)
class Findings:
    """What is known of a study's runs."""

    results: dict[str, Result] = field(default_factory=dict)
    """By name, of those that are finished, sweeps included."""
    failed: dict[str, str] = field(default_factory=dict)
    """{run: why} of those that this process could not make."""

    def scores(self, metric: str) -> dict[str, float]:
        return {name: result.final(metric) for name, result in self.results.items()}

    def of_cells(self, study: Study) -> Mapping[str, list[Result]]:
        """{cell: its measured runs} of cells that have any, in the study's order."""
        measured = [result for result in self.results.values() if not result.tried]
        found = {cell: [result for result in measured if result.cell == cell] for cell in study.cells}
        return {cell: results for cell, results in found.items() if results}


def open_place(study: Study, data: str, out: Path, *, vae: str | None = None) -> Place:
    """The study's folder for this store, with the store's pictures in it, which samples are compared with, and a judge.

    Raises:
        UserError: the store is not finished, its VAE is not found, or the folder cannot be made.
    """
    with LatentStore(data) as store:
        identity = identity_of(store)
        reference = out.absolute() / f"reference-{identity[:12]}.npz"
        make_folder(out)

        def decode(path: Path) -> None:
            say(f"decoding {len(store):,} latents of {data}: samples are compared with what the VAE makes of the store")
            np.savez(path, arr_0=decoded(store, vae))

        make_once(reference, decode)
        judge = out.absolute() / f"judge-{identity[:12]}" / JUDGE
        if any(JUDGE in features_of(study, run) for run in planned(study, {}, ())):
            make_judge(store, lambda: load_member(reference, "arr_0"), judge)
    return Place(
        data=str(Path(data).absolute()) if "://" not in data else data,
        identity=identity,
        reference=str(reference),
        judge=str(judge),
        out=out,
        vae=vae,
    )


def collect(study: Study, place: Place, findings: Findings) -> list[Run]:
    """Look for results again; the runs that are not finished and have not failed here.

    Raises:
        UserError: a result was made with other settings, is damaged, or lacks the metric.
    """
    while True:
        plan = planned(study, findings.scores(study.metric), findings.failed)
        new = [run for run in plan if run.name not in findings.results and run.name not in findings.failed]
        known = len(findings.results) + len(findings.failed)
        for run in new:
            result = place.result(study, run)
            if result is not None:
                findings.results[run.name] = result
        if known == len(findings.results) + len(findings.failed):
            return new


def work_off(study: Study, place: Place) -> Findings:
    """Make every run that no other process is making, until there is none left; a bad one is named and left out.

    Raises:
        StoppedError: a signal asked a command to end.
    """
    findings = Findings()
    make_folder(place.out / "claims")
    while todo := collect(study, place, findings):
        if not any(_take(study, run, place, findings) for run in todo):
            if not study.sweep:  # what is left is being made, and nothing can follow from it
                break
            time.sleep(_POLL_SECONDS)
    return findings


def _take(study: Study, run: Run, place: Place, findings: Findings) -> bool:
    """Make a run, unless another process is at it; whether it was taken."""
    claim = try_claim(place.out / "claims" / f"{run.name}.lock")
    if claim is None:
        return False
    try:
        if place.result(study, run) is None:
            began = time.monotonic()
            say(f"{run.name}: begun")
            measured(study, run, place)
            say(f"{run.name}: done in {time.monotonic() - began:.0f} s")
    except UserError as error:
        findings.failed[run.name] = str(error)
        warn(f"{run.name} is left out: {error}")
    finally:
        claim.release()
    return True
