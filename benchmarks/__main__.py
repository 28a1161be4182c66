"""Measure every stage beside a plain version of it and beside the hardware's limit: `python -m benchmarks`.

On whatever device is there: sizes for a CPU take under 5 minutes, on one CUDA GPU under 9. Runs from a bare checkout
(PYTHONPATH, no installation, no network); a part whose library is absent is left out, and said so. Exit status 1 if
an aim is missed.
"""

import argparse
import contextlib
import importlib
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from benchmarks.machine import Setting
    from benchmarks.report import Pieces, Report

PARTS = (
    "ceilings",
    "counts",
    "parity",
    "network",
    "train",
    "sample",
    "vae",
    "extract",
    "features",
    "evaluate",
    "loader",
    "scale",
    "waiting",
    "profile",
    "variants",
    "processes",
    "memory",
)
"""Each is a file of this folder with a function `pieces`; `ceilings` is machine.py's, `profile` is train.py's."""
ALWAYS = "ceilings"
LAST_START = {"cpu": 4.0, "cuda": 8.0}
"""Minutes after which no further part begins, so that one run stays under 5 and 9."""
OURS = ("benchmarks", "pipeline", "extract", "train", "sample")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 if every aim is reached, 1 if one is missed or a row failed, 2 for a wrong command line."""
    words = sys.argv[1:] if argv is None else argv
    arguments = parse(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.device != "cuda":  # before torch is asked, so that accelerate agrees
        os.environ.setdefault("ACCELERATE_USE_CPU", "true" if arguments.device == "cpu" else "false")
    import torch

    from pipeline.runtime.errors import UserError

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    command = f"python -m benchmarks {shlex.join(words)}".strip()
    try:
        if arguments.sitting:
            from benchmarks.sitting import sit

            return sit(
                arguments.json, earlier=arguments.continue_, device=device, quick=arguments.quick, command=command
            )
        return measure_parts(arguments, device, command)
    except UserError as error:
        print(f"python -m benchmarks: error: {error}", file=sys.stderr)
        return 2


def measure_parts(arguments: argparse.Namespace, device: "torch.device", command: str) -> int:
    """Measure the parts one after the other, print them and write what was asked for; the exit status."""
    from benchmarks import machine
    from benchmarks.report import Report, fill_markdown

    started = time.perf_counter()
    about = machine.describe(device)
    ceilings = machine.measure_ceilings(device, quick=arguments.quick)
    report = Report(command=command, machine=about, ceilings=ceilings)
    report.seconds[ALWAYS] = time.perf_counter() - started
    show_start(report)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for part in arguments.parts:
            if part != ALWAYS and time.perf_counter() - started > 60 * LAST_START[device.type]:
                report.skipped[part] = f"the time was up; measure it with --parts {part}"
            elif part != ALWAYS:
                place = Path(folder) / part
                place.mkdir()
                setting = machine.Setting(device=device, ceilings=ceilings, folder=place, quick=arguments.quick)
                run_part(part, setting, report, arguments.json)
    if arguments.json is not None:
        report.write_json(arguments.json)
    if arguments.markdown is not None:
        fill_markdown(arguments.markdown, report)
    return show_end(report)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--parts", default=None, help=f"some of {','.join(PARTS)} (default all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that everything runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--folder", type=Path, help="for files while measuring (default the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--markdown", type=Path, help="fill that page's tables, as docs/benchmarks.md")
    parser.add_argument(
        "--sitting",
        action="store_true",
        help="all that a GPU is needed for, in pieces of at most 9 minutes",
    )
    parser.add_argument(
        "--continue", dest="continue_", type=Path, metavar="FILE.json", help="go on from that piece of the sitting"
    )
    arguments = parser.parse_args(argv)
    if arguments.continue_ is not None and not arguments.sitting:
        parser.error("--continue goes on with a --sitting; give both")
    if arguments.sitting and (arguments.parts or arguments.markdown):
        parser.error("--sitting takes neither --parts nor --markdown")
    if arguments.sitting and arguments.json is None:
        arguments.json = arguments.continue_ or Path("sitting.json")
    arguments.parts = list(PARTS) if arguments.parts is None else arguments.parts.split(",")
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts {','.join(unknown)} is unknown; choose from {','.join(PARTS)}")
    return arguments


def run_part(part: str, setting: "Setting", report: "Report", json: Path | None) -> None:
    """Measure one part and print it, row by row; one that fails is reported and the next one goes on."""
    from benchmarks.report import part_table, profile_table

    print(f"\n{part}", flush=True)
    started = time.perf_counter()
    if part == "profile":
        with failures_kept(report, part):
            from benchmarks.train import measure_profile

            report.profiles["train"] = measure_profile(setting)
            print(profile_table(report.profiles["train"]), flush=True)
    else:
        found = report.rows.setdefault(part, [])
        pieces: Pieces = {}
        with failures_kept(report, part):
            pieces = importlib.import_module(f"benchmarks.{part}").pieces(setting)
        for name, piece in pieces.items():
            with failures_kept(report, f"{part}: {name}"):
                found += piece()
            if json is not None:  # what is measured is kept whatever happens next
                report.write_json(json)
        print(part_table(found) if found else "nothing measured", flush=True)
    report.seconds[part] = time.perf_counter() - started


@contextlib.contextmanager
def failures_kept(report: "Report", what: str) -> Iterator[None]:
    """Note what fails inside the block, and go on behind it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - one broken row must not cost the others' figures
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and absent.partition(".")[0] not in OURS:
            report.skipped[what] = f"{absent} is not installed"
        else:
            report.skipped[what] = f"failed: {type(error).__name__}: {error}"
            traceback.print_exc()


def show_start(report: "Report") -> None:
    """The machine and its ceilings."""
    from benchmarks.report import ceilings_cells, machine_lines, table

    print(machine_lines(report))
    print(table(ceilings_cells(report.ceilings)), flush=True)


def show_end(report: "Report") -> int:
    """How long each part took, what was left out and what was missed; the exit status."""
    print("\n" + ", ".join(f"{part} {seconds:.0f} s" for part, seconds in report.seconds.items()))
    for part, why in report.skipped.items():
        print(f"{part}: {why}")
    for missed in report.missed():
        print(f"missed: {missed}")
    return 1 if report.missed() or any(why.startswith("failed") for why in report.skipped.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
