"""`python -m tests.crash_points`: visits the points of all writers, prints what is wrong, writes the table.

--writers A,B    rows whose names hold one of these words, or with --exactly are one of them (default: all)
--plan all|ci|sites|sample    every point in every mode; kill and EIO at every point and the others once per call
                              site; all modes once per call site; a few points of each writer
--all-the-same   kill also where one watched run shows a tree that was asked about already, and ask also what the
                 command does not look at
--jobs N         processes that share the rows
--inputs FOLDER  where what the commands read is made, or is already (default: made anew and removed)
--json FILE, --table FILE    the report, and the table for docs/robustness.md
"""

import argparse
import functools
import http.server
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.crash_points import shim

ROOT = Path(__file__).parents[2]
SAMPLED = {"kill", "enospc"}
NAMING = {"rename", "renameat2", "link"}


def main():
    given = _arguments()
    if "CRASH_LIBRARY" not in os.environ:
        return _again_preloaded()
    from tests.crash_points import place
    from tests.crash_points.writers import WRITERS

    words = given.writers.split(",") if given.writers else [""]
    fits = (lambda row, word: row.name == word) if given.exactly else (lambda row, word: word in row.name)
    rows = list({row.name: row for word in words for row in WRITERS if fits(row, word)}.values())
    start = time.monotonic()
    place.warm_up()
    with tempfile.TemporaryDirectory(prefix="crash-points-") as folder:
        reports = _share(Path(folder), rows, given)
    table = "\n".join(_table(reports))
    seconds = time.monotonic() - start
    points, visits, states, cpu_seconds, bad = (
        sum(_count(report[name]) for report in reports) for name in ("points", "visits", "states", "cpu_seconds", "bad")
    )
    summary = f"{len(reports)} writers, {points} points, {visits} visits, {states} states in {seconds:.0f} s "
    summary += f"({cpu_seconds:.0f} s of a core), {bad} bad endings"
    summary += f" (--plan {given.plan} --modes {given.modes}{f' --calls {given.calls}' if given.calls else ''})"
    print(table)
    print(summary)
    if given.table:
        _write_table(Path(given.table), f"{table}\n\n{summary}\n")
    if given.json:
        Path(given.json).write_text(json.dumps(reports, indent=1))
    return int(bad > 0 or len(reports) < len(rows))


def _arguments():
    parser = argparse.ArgumentParser(prog="crash_points", description="Visits every file operation of every writer.")
    parser.add_argument("--writers", default="")
    parser.add_argument("--plan", choices=["all", "ci", "sites", "sample"], default="all")
    parser.add_argument("--exactly", action="store_true")
    parser.add_argument("--all-the-same", action="store_true")
    parser.add_argument("--modes", default=",".join(shim.MODES))
    parser.add_argument("--calls", default="")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--inputs")
    parser.add_argument("--json")
    parser.add_argument("--table")
    return parser.parse_args()


def _again_preloaded():
    """This command once more, with the library in it and one thread."""
    with tempfile.TemporaryDirectory(prefix="crash-shim-") as folder:
        library = shim.compile_shim(folder)
        environment = os.environ | {
            "LD_PRELOAD": str(library),
            "CRASH_LIBRARY": str(library),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "ACCELERATE_USE_CPU": "true",
            "MPLCONFIGDIR": folder,
        }
        words = [sys.executable, "-m", "tests.crash_points", *sys.argv[1:]]
        return subprocess.run(words, env=environment, cwd=ROOT, check=False).returncode


def _count(value):
    return len(value) if isinstance(value, list) else value


def _share(folder, rows, given):
    """The rows' reports, made by forks that each take the next row from a pipe."""
    queue, fill = os.pipe()
    os.write(fill, bytes(range(len(rows))))
    os.close(fill)
    inputs = Path(given.inputs).resolve() if given.inputs else folder / "in"
    port, server = _serve(inputs / "web")
    try:
        _make(folder, inputs)
        workers = [
            _fork(lambda number=number: _work(folder / f"{number}", inputs, rows, queue, given, port))
            for number in range(given.jobs)
        ]
        for pid in workers:
            os.waitpid(pid, 0)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    paths = sorted(folder.glob("*/report-*.json"), key=lambda path: path.name)
    return [json.loads(path.read_text()) for path in paths]


def _make(folder, inputs):
    """Make what the commands read, in a fork: it starts threads, which no later fork would have."""
    from tests.crash_points.inputs import make_inputs
    from tests.crash_points.place import Place

    if inputs.is_dir():
        return
    inputs.mkdir(parents=True)
    if inputs.parent != folder:
        (folder / "in").symlink_to(inputs)
    place = Place(folder)
    making = _fork(lambda: make_inputs(inputs, lambda words: _checked(place.run(words))))
    assert os.waitpid(making, 0)[1] == 0, "the inputs could not be made"


def _work(folder, inputs, rows, queue, given, port):
    from tests.crash_points.place import Place, remember
    from tests.crash_points.visit import visit_all

    place = Place(folder, f"http://127.0.0.1:{port}")
    (folder / "in").symlink_to(inputs)
    remember(folder)
    while taken := os.read(queue, 1):
        row = rows[taken[0]]
        plan = functools.partial(_plan, given, row)
        report = visit_all(place, row, plan, _tell, spares=not given.all_the_same)
        (folder / f"report-{taken[0]:03d}.json").write_text(json.dumps(vars(report)))
        print(
            f"{row.name}: {report.points} points, {report.visits} visits, {report.states} states, "
            f"{report.watched} only watched, {report.ran} of {report.asked} questions run, "
            f"{report.seconds:.0f} s ({report.cpu_seconds:.0f} s of a core), {len(report.bad)} bad",
            flush=True,
        )


def _tell(writer, fault):
    print(f"{writer} | {fault['mode']} | {fault['point']} | {fault['what']}", flush=True)


def _plan(given, row, points):
    """The (point, mode) pairs that are visited."""
    from tests.crash_points.visit import choose

    if row.processes > 1:
        points = [point for point in points if point.call in NAMING]
    if given.calls:
        points = [point for point in points if point.call in given.calls.split(",")]
    for mode in given.modes.split(","):
        if row.processes > 1 and mode not in {"kill", "eio1"}:
            continue
        if row.expects and mode == "stop":
            continue
        everywhere = given.plan == "all" or (given.plan == "ci" and mode in {"kill", "eio"})
        chosen = choose(points, mode, once_per_site=not everywhere)
        if given.plan == "sample":
            chosen = chosen[-2:-1] if mode in SAMPLED else []
        yield from ((point, mode) for point in chosen)


def _checked(ended):
    assert ended.status == 0, ended.said


def _fork(function):
    """The process that calls the function and ends: what starts threads must not be called in one that forks later."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    except BaseException:  # noqa: BLE001 - a fork never returns
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve(folder):
    """(port, process) of a web server for the folder, which need not be there yet."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # a client was killed while it read

    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    pid = _fork(server.serve_forever)
    port = server.server_port
    server.socket.close()
    return port, pid


def _write_table(path, text):
    """Into a page between its two marks, or as a file of its own."""
    begin, end = "<!-- crash points: begin -->\n", "<!-- crash points: end -->\n"
    page = path.read_text() if path.exists() else ""
    if begin in page:
        head, tail = page.split(begin)[0], page.split(end)[1]
        text = f"{head}{begin}{text}{end}{tail}"
    path.write_text(text)


def _table(reports):
    yield "| writer | points | visits | states | seconds of a core | bad endings |"
    yield "|---|---:|---:|---:|---:|---:|"
    for report in reports:
        counts = f"{report['points']} | {report['visits']} | {report['states']} | {report['cpu_seconds']:.0f}"
        yield f"| {report['writer']} | {counts} | {len(report['bad'])} |"


if __name__ == "__main__":
    sys.exit(main())
