"""All that a GPU is needed for, most valuable first, in pieces of at most 9 minutes that go on from one another.

    python -m benchmarks --sitting --json piece.json                          the first piece
    python -m benchmarks --sitting --continue piece.json                      the next one, up to 24

A piece begins with what the JSON of the piece before lacks, ends before its time is up, and writes every row as soon as
it is known. Each unit runs in a process of its own with a limit, so that a device that is lost, memory that ends or a
call that hangs costs that unit alone; it is tried once more when everything else is done.
"""

import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.machine import Ceilings, Setting
from benchmarks.report import Row, part_table
from benchmarks.timing import Spread
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json

FORMAT, VERSION = "dit-sitting", 1
PIECE_SECONDS = 540
RESERVE_SECONDS = 20
"""For ending: no unit may run into it."""
MOST_PIECES = 24
MOST_TRIES = 2
ORDER = (
    ("parity", 200),
    ("train: DiT-XL/2 at 256 px", 300),
    ("extract: whole", 300),
    ("sample", 300),
    ("memory", 150),
    ("processes", 200),
    ("network", 200),
    ("train", 300),
    ("vae", 120),
    ("counts", 90),
    ("features", 120),
    ("evaluate", 120),
    ("loader", 120),
    ("variants", 200),
    ("extract", 120),
    ("scale", 120),
)
"""Parts, or pieces by how "part: piece" begins, with the seconds that one of their pieces may take on a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One piece of a part, by name."""

    part: str
    module: str
    piece: str
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.part}: {self.piece}"


def module_of(part: str) -> str:
    """The file that measures it."""
    return f"benchmarks.{part}"


def units(setting: Setting) -> list[Unit]:
    """All there is to do on this device, most valuable first, each once."""
    found: dict[str, Unit] = {}
    for wanted, seconds in ORDER:
        part = wanted.partition(":")[0]
        for piece in importlib.import_module(module_of(part)).pieces(setting):
            unit = Unit(part=part, module=module_of(part), piece=piece, seconds=seconds)
            if unit.name.startswith(wanted):
                found.setdefault(unit.name, unit)
    return list(found.values())


def sit(out: Path, *, earlier: Path | None, device: torch.device, quick: bool, command: str) -> int:
    """One piece of the sitting; 0 if all is done and every aim reached, 1 if not, 3 if another piece is needed.

    Raises:
        UserError: the earlier piece is of another device or no piece, or the pieces are used up.
    """
    deadline = time.monotonic() + PIECE_SECONDS - RESERVE_SECONDS
    state = _opened(out, earlier, device, quick)
    state["pieces"].append({"command": command, "seconds": 0.0, "units": []})
    ceilings = _ceilings_from(state["ceilings"])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device=device, ceilings=ceilings, folder=Path(folder), quick=quick)
        todo = units(setting)
        for unit in _open_units(todo, state):
            left = deadline - time.monotonic()
            if left < min(unit.seconds, 0.9 * PIECE_SECONDS) and state["pieces"][-1]["units"]:
                break  # it may not be done in time: the next piece begins with it
            _run(unit, setting, min(left, 2 * unit.seconds), state)
            state["pieces"][-1]["seconds"] = time.monotonic() - began
            write_json(out, state)
    return _end(out, todo, state)


def _opened(out: Path, earlier: Path | None, device: torch.device, quick: bool) -> dict[str, Any]:
    """What earlier pieces found, or a beginning."""
    about = machine.describe(device)
    if earlier is None:
        if out.exists():
            raise UserError(f"{out} is there already; go on with --continue {out}, or choose another --json")
        ceilings = asdict(machine.measure_ceilings(device, quick=quick))
        begun = {"format": FORMAT, "version": VERSION, "quick": quick, "machine": about, "ceilings": ceilings}
        return {**begun, "rows": {}, "failed": {}, "pieces": []}
    state: dict[str, Any] = read_json(earlier)
    if not isinstance(state, dict) or (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        raise UserError(f"--continue {earlier} is no piece of a sitting of version {VERSION}; give one that is")
    then, now = (found.get("gpu") or found["processor"] for found in (state["machine"], about))
    if then != now or state["quick"] != quick:
        raise UserError(f"--continue {earlier} was measured on {then} ({'quick' if state['quick'] else 'full'} sizes), "
                        f"but this is {now} ({'quick' if quick else 'full'}); begin a sitting of its own")  # fmt: skip
    if len(state["pieces"]) >= MOST_PIECES:
        raise UserError(f"--continue {earlier} holds {MOST_PIECES} pieces already, which is the most of one sitting")
    return state


def _open_units(todo: list[Unit], state: dict[str, Any]) -> Iterator[Unit]:
    """What is not done: first what was never tried, then what failed once."""
    for tries in range(MOST_TRIES):
        for unit in todo:
            failed = state["failed"].get(unit.name, {"tries": 0})
            if unit.name not in state["rows"] and failed["tries"] == tries:
                yield unit


def _run(unit: Unit, setting: Setting, limit: float, state: dict[str, Any]) -> None:
    """Measure one unit in a process of its own, and keep its rows or why there are none."""
    print(f"\n{unit.name}", flush=True)
    place = Path(tempfile.mkdtemp(dir=setting.folder))
    child = multiprocessing.get_context("spawn").Process(target=_measure, args=(unit, setting, place), daemon=False)
    began = time.monotonic()
    child.start()
    child.join(limit)
    if child.is_alive():
        child.terminate()
        child.join(10)
        if child.is_alive():
            child.kill()
            child.join()
        why = f"it took longer than {limit:.0f} s"
    else:
        why = f"its process ended with status {child.exitcode}"
    answer = read_json(place / "answer.json") if (place / "answer.json").exists() else {"failed": why}
    shutil.rmtree(place, ignore_errors=True)
    state["pieces"][-1]["units"].append({"name": unit.name, "seconds": round(time.monotonic() - began, 1)})
    if "failed" in answer:
        tries = state["failed"].get(unit.name, {"tries": 0})["tries"] + 1
        state["failed"][unit.name] = {"tries": tries, "why": answer["failed"]}
        print(f"failed: {answer['failed']}", flush=True)
    else:
        state["failed"].pop(unit.name, None)
        state["rows"][unit.name] = answer["rows"]
        print(answer["table"], flush=True)


def _measure(unit: Unit, setting: Setting, place: Path) -> None:
    """What the unit's own process does."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    given = Setting(device=setting.device, ceilings=setting.ceilings, folder=place / "files", quick=setting.quick)
    given.folder.mkdir()
    try:
        rows = importlib.import_module(unit.module).pieces(given)[unit.piece]()
        answer = {"rows": [_as_json(row) for row in rows], "table": part_table(rows) if rows else "nothing to measure"}
    except Exception as error:  # noqa: BLE001 - whatever it is costs this unit alone
        traceback.print_exc()
        answer = {"failed": f"{type(error).__name__}: {error}"}
    write_json(place / "answer.json", json.loads(json.dumps(answer, default=str)))


def _as_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "share": row.share, "reached": row.reached}


def _ceilings_from(found: dict[str, Any]) -> Ceilings:
    values: dict[str, Any] = {name: None if value is None else Spread(**value) for name, value in found.items()}
    return Ceilings(**values)


def _end(out: Path, todo: list[Unit], state: dict[str, Any]) -> int:
    """Write everything, say what is left, and the exit status."""
    write_json(out, state)
    left = [unit.name for unit in _open_units(todo, state)]
    missed = [row["what"] for rows in state["rows"].values() for row in rows if row["reached"] is False]
    print(f"\n{len(state['rows'])} of {len(todo)} done in {len(state['pieces'])} pieces; {out}")
    for name, failed in state["failed"].items():
        print(f"failed: {name}: {failed['why']}", file=sys.stderr)
    for what in missed:
        print(f"missed: {what}")
    if left:
        print(f"go on with: python -m benchmarks --sitting --continue {out}")
        return 3
    return 1 if missed or state["failed"] else 0
