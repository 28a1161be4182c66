"""One run from its flags to RESULT.json, by the public commands: dit-train, dit-evaluate at given steps, dit-sample."""

import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.checkpoint.folder import METRICS
from pipeline.runtime.arrays import load_member
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, read_json, remove_folder, write_bytes, write_json
from pipeline.runtime.gate import Count, NotNegative, read_log, typed
from studies.cells import JUDGE, Flags, Run, Study, evaluate_flags, train_flags

FORMAT, VERSION = "dit-study-run", 1
RESULT = "RESULT.json"
LOSS = "held-out loss"
SHOWN_CLASSES = 10
JUDGED = "fd-encoder,precision-encoder,recall-encoder,recognised"
MEASURED = "measured.npz"
ONLY_EVALUATED = {"features", "inception", "image-size", "kid-subsets", "kid-subset-size", "workers"}
SHARED = {"device", "batch-size"}
"""Flags of dit-evaluate that dit-sample has not, and those that both need where one makes images for the other."""
_SAVING_SECONDS = 120
_PR_SET_PDEATHSIG = 1


class StoppedError(Exception):
    """A command ended because a signal asked it to, and so shall the study."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What was found at one step of a run."""

    step: Count
    samples: Count
    metrics: dict[str, float]
    """dit-evaluate's, by the names it gives them."""
    validation_loss: float | None = None
    """Of the averaged weights on held-out samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run came to: RESULT.json."""

    cell: str
    seed: Count
    tried: str
    flags: Flags
    settings: dict[str, Any]
    """All that it depends on: every flag of training and evaluation, and the data's identity."""
    parameters: Count
    macs: Count
    """Multiply-adds of one forward pass of one sample."""
    patch_size: Count
    points: list[Measurement]
    seconds: NotNegative
    """That the commands took here, over all attempts' last one."""

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(samples, value) of a metric, without regard to how many images it is of, or of the held-out loss."""
        if metric == LOSS:
            return [(float(p.samples), p.validation_loss) for p in self.points if p.validation_loss is not None]
        found = []
        for point in self.points:
            found += [(float(point.samples), v) for name, v in point.metrics.items() if name.startswith(f"{metric}-")]
        return found

    def final(self, metric: str) -> float:
        """The metric at the end.

        Raises:
            UserError: dit-evaluate gives no such metric.
        """
        curve = self.curve(metric)
        if not curve:
            named = ", ".join(self.points[-1].metrics) if self.points else "nothing"
            raise UserError(f"the study compares {metric}, but its dit-evaluate gives {named}; change metric")
        return curve[-1][1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a study reads and writes."""

    data: str
    identity: str
    """Of the store's contents."""
    reference: str
    judge: str
    """Folder of the store's judge, which is there if the study asks for it."""
    out: Path
    vae: str | None = None

    def folder(self, run: Run) -> Path:
        return self.out / "cells" / run.name

    def settings(self, study: Study, run: Run) -> dict[str, Any]:
        """All that a run's result depends on."""
        flags = train_flags(study, run, data="", out=Path())
        kept = {name: value for name, value in flags.items() if name not in {"latents", "out"}}
        return {"train": kept, "evaluate": evaluate_flags(study, run), "data": self.identity}

    def result(self, study: Study, run: Run) -> Result | None:
        """What the run came to, if it is finished.

        Raises:
            UserError: it was made with other settings, or its file is damaged.
        """
        path = self.folder(run) / RESULT
        if not path.is_file():
            return None
        advice = f"remove {path.parent} to make it again"
        result: Result = typed(read_json(path), Result, f"{path} is no result of a run", advice=advice)
        wanted = json.loads(json.dumps(self.settings(study, run)))
        if result.settings != wanted:
            names = sorted(name for name in wanted if wanted[name] != result.settings.get(name))
            raise UserError(
                f"{path} was made with other settings ({', '.join(names)}); choose another --out, or {advice}"
            )
        return result


def measured(study: Study, run: Run, place: Place) -> None:
    """Make a run's RESULT.json in a process of its own, whose output goes to log.txt; it goes on where one stopped.

    Raises:
        UserError: a command refused, or failed; its last line is told.
        StoppedError: a command was stopped by a signal.
    """
    folder = place.folder(run)
    make_folder(folder)
    log = folder / "log.txt"
    began = log.stat().st_size if log.exists() else 0
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(study, run, place, log))
    process.start()
    try:
        process.join()
    except BaseException:  # whatever ends the wait ends the run, which saves first
        process.terminate()
        process.join(_SAVING_SECONDS)
        process.kill()
        raise
    status = process.exitcode or 0
    if status == 0:
        return
    number = -status if status < 0 else status - 128
    if number in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}:
        raise StoppedError(number)
    said = log.read_bytes()[began:].decode(errors="replace")
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line] or lines or ["it said nothing"]
    raise UserError(f"{errors[-1].strip()[:600]} (status {status}; all it said is in {log})")


def _work(study: Study, run: Run, place: Place, log: Path) -> None:
    """What the process of a run does. It is ended with the study's: a killed one leaves no run that goes on unseen."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    measure(study, run, place)


def call(module: str, flags: Flags, folder: Path) -> None:
    """What `python -m MODULE --config FILE` does, with these flags in the file; ends this process if it fails."""
    config = folder / f"{module.rpartition('.')[2]}.yaml"
    write_bytes(config, yaml.safe_dump(flags, sort_keys=False, allow_unicode=True).encode())
    status: int = importlib.import_module(f"{module}.__main__").main(["--config", str(config)])
    if status:
        sys.exit(status)


def measure(study: Study, run: Run, place: Place) -> None:
    """Train the run, evaluate it at every measured step, draw its samples and write RESULT.json."""
    from pipeline.checkpoint.info import read_info
    from pipeline.dit.macs import count_macs, count_parameters

    folder, began = place.folder(run), time.monotonic()
    trained = folder / "run"
    flags, judged = train_flags(study, run, data=place.data, out=trained), evaluate_flags(study, run)
    call("train", flags, folder)
    points = [
        Measurement(
            step=step,
            samples=step * flags.get("batch-size", 256),
            metrics=_metrics(_checkpoint(trained, step), judged, place, folder, step),
            validation_loss=_validation_loss(trained, step),
        )
        for step in range(flags["save-every"], flags["steps"] + 1, flags["save-every"])
    ]
    last = _checkpoint(trained, flags["steps"])
    reverse: Flags = {name: judged[name] for name in ("sampler", "steps", "guidance") if name in judged}
    images: Flags = {"checkpoint": str(last), "out": str(folder / "samples.npz"), **reverse, **place_of_vae(place)}
    info = read_info(last)
    classes = min(SHOWN_CLASSES, len(info.classes))
    images |= {"num-samples": SHOWN_CLASSES, "labels": "balanced"}
    if classes:
        images["classes"] = ",".join(map(str, range(classes)))
    call("sample", images, folder)
    result = Result(
        cell=run.cell,
        seed=run.seed,
        tried=run.tried,
        flags=run.flags,
        settings=place.settings(study, run),
        parameters=count_parameters(info.network),
        macs=count_macs(info.network),
        patch_size=info.network.patch_size,
        points=points,
        seconds=time.monotonic() - began,
    )
    write_json(folder / RESULT, {"format": FORMAT, "version": VERSION} | asdict(result))
    for step in range(flags["save-every"], flags["steps"], flags["save-every"]):  # they have been measured
        remove_folder(_checkpoint(trained, step))


def _metrics(checkpoint: Path, judged: Flags, place: Place, folder: Path, step: int) -> dict[str, float]:
    """What dit-evaluate says of a checkpoint; by several features, of the same images, which dit-sample makes once."""
    from sample.evaluate.report import read_result

    several = isinstance(judged.get("features"), list)
    features: list[Any] = judged["features"] if several else [judged.get("features")]
    samples, rest = checkpoint, judged
    if several:
        samples, rest = folder / MEASURED, {name: judged[name] for name in judged if name in ONLY_EVALUATED | SHARED}
        _drop_images(folder)  # which a killed one has left, perhaps of an earlier step
        made = {name: value for name, value in judged.items() if name not in ONLY_EVALUATED}
        call("sample", made | {"checkpoint": str(checkpoint), "out": str(samples)} | place_of_vae(place), folder)
    metrics: dict[str, float] = {}
    for number, each in enumerate(features):
        found = folder / (f"evaluate-{step:07d}-{number}.json" if several else f"evaluate-{step:07d}.json")
        given: Flags = {"samples": str(samples), "reference": place.reference, "out": str(found)}
        if each == JUDGE:
            given |= {"features": place.judge, "metrics": rest.get("metrics", JUDGED)}
        elif each is not None:
            given["features"] = each
        call("sample.evaluate", rest | given | place_of_vae(place), folder)
        said = read_result(found)
        assert said is not None, f"{found} was just written"
        metrics |= said.metrics
    _drop_images(folder)
    return metrics


def _drop_images(folder: Path) -> None:
    for name in (MEASURED, f"{MEASURED}.json"):
        (folder / name).unlink(missing_ok=True)


def place_of_vae(place: Place) -> Flags:
    """The flag --vae where it was given."""
    return {} if place.vae is None else {"vae": place.vae}


def _checkpoint(trained: Path, step: int) -> Path:
    return trained / "checkpoints" / f"step-{step:07d}"


def _validation_loss(trained: Path, step: int) -> float | None:
    found = (said for _, said in read_log(trained / METRICS) if said.step == step)
    return next((said.numbers.get("validation_loss_ema") for said in found), None)


def samples_of(folder: Path) -> np.ndarray:
    """The pictures that a run's samples.npz holds: uint8 [n, H, W, 3]; number k has the same noise in every run."""
    return load_member(folder / "samples.npz", "arr_0")
