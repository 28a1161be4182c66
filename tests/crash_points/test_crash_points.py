"""Whatever ends a command at whichever file operation: nothing half is taken for whole, and the next command mends it."""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash_points import shim
from tests.crash_points.memory import Looked
from tests.crash_points.writers import ELSEWHERE, SITES, WRITERS

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "extract", "train", "sample")
WRITING = {"making", "publish", "publish_folder", "replacing", "write_bytes", "write_json", "write_text", "rename"}
WRITING |= {"link", "symlink_to", "copyfile", "copy2", "copytree", "move", "save_safetensors", "save_pickled_tensors"}
SAMPLED = ["dit-convert dit --overwrite"]


@pytest.fixture(scope="module")
def compiler():
    """A C compiler; without one the proof is skipped, but not where it is required (CRASH_POINTS=required)."""
    if shim.compiler() is None:
        reason = "no C compiler (gcc, cc, clang), which the preloaded library of the crash points needs"
        assert os.environ.get("CRASH_POINTS") != "required", reason
        pytest.skip(reason)


def visit(folder, *flags):
    """The reports of a visit, by writer."""
    words = [sys.executable, "-m", "tests.crash_points", "--json", str(folder / "reports.json"), *flags]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (folder / "reports.json").exists(), ended.stdout + ended.stderr
    reports = json.loads((folder / "reports.json").read_text())
    return {report["writer"]: report for report in reports}


@pytest.fixture(scope="module")
def reports(compiler, tmp_path_factory):
    """What became of kill and EIO at every point of every writer, and of the other modes once per call site."""
    return visit(tmp_path_factory.mktemp("crash"), "--plan", "ci", "--jobs", "2")


def faults_of(report, mode):
    return [f"{bad['point']}: {bad['what']}" for bad in report["bad"] if bad["mode"] in {mode, "none"}]


@pytest.mark.slow
@pytest.mark.timeout(1500)  # the first one makes all reports
@pytest.mark.parametrize("mode", shim.MODES)
@pytest.mark.parametrize("writer", [row.name for row in WRITERS])
def test_a_writer_disturbed_at_any_point_leaves_nothing_half_and_is_mended_by_the_next(reports, writer, mode):
    report = reports[writer]
    assert report["points"] > 0
    assert report["missed"] <= report["visits"] // 10, "points that are not met again are no proof"
    assert faults_of(report, mode) == []


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """The flags for the sampled writers, with what they read made once."""
    inputs = tmp_path_factory.mktemp("crash-inputs") / "in"
    return ["--inputs", str(inputs), "--writers", ",".join(SAMPLED), "--exactly"]


@pytest.mark.timeout(300)
def test_a_few_points_of_a_few_writers_bear_a_kill_and_a_broken_disk(compiler, sampled, tmp_path):
    reports = visit(tmp_path, "--plan", "sample", *sampled)
    assert sorted(reports) == sorted(SAMPLED)
    assert [fault for report in reports.values() for fault in report["bad"]] == []
    assert all(report["visits"] > 0 and report["missed"] == 0 for report in reports.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_watched_run_shows_what_kills_leave_and_a_remembered_answer_is_what_the_command_gives(
    compiler, sampled, tmp_path
):
    flags = [*sampled, "--plan", "all", "--modes", "kill", "--calls", "mkdir,create,renameat2"]
    spared, full = (visit(tmp_path, *flags, *more)[SAMPLED[0]] for more in ([], ["--all-the-same"]))
    assert (spared["bad"], full["bad"]) == ([], [])
    assert (spared["visits"], spared["states"]) == (full["visits"], full["states"])
    assert (full["watched"], full["unwatched"]) == (0, 0)
    assert spared["watched"] > 0
    assert spared["ran"] < spared["asked"] == full["asked"] == full["ran"]


def test_what_a_command_looked_at_is_told_by_the_names_of_its_start(tmp_path):
    (tmp_path / "log").write_text(
        "drop run/x\nopen run/x\nopen run/y\ndrop run/y\nmkdir run/z\nlist run\nask run/t\n"
        "move old\t.gone\nwalk .gone\ndrop .gone/a\nopen .gone/b\ndrop .gone\nmove new\told\nopen old/c\nmove \tin\n"
    )
    reads = shim.reads_of(tmp_path / "log")
    assert reads.opened == {"run/y", "old/b", "new/c"} and reads.moved == {"old", ".gone", "new", "in"}
    assert reads.dropped == {"run/x", "run/y", "old/a", "old"} and reads.swept == {"old"}
    assert reads.listed == {"run"} and reads.asked == {"run/t"}


def test_names_in_a_folder_that_is_removed_whole_are_no_other_question_unless_they_are_asked_for():
    looked = Looked(
        contents=frozenset({"run/config"}),
        names=frozenset({"run/w/record"}),
        listed=frozenset({"run"}),
        unseen=frozenset({"run/w", "run/kept"}),
        left=frozenset({"run/kept"}),
    )
    tree = {"run/config": "1", "run/w/a": "2", "run/kept/x": "5"}
    for other in ({"run/w/b": "3", "run/w/c/d": "4"}, {"run/w/": ""}):
        same = {"run/config": "1", "run/kept/y": "6", **other}
        assert looked.view(tree) == looked.view(same)
        assert looked.after(same, {"run/z": "7", "run/kept/x": "5"}) == {"run/z": "7", "run/kept/y": "6"}
    for other in ({"run/w/a": "2", "run/w/record": ""}, {}, {"run/w/a": "2", "run/x": ""}):
        assert looked.view(tree) != looked.view({"run/config": "1", "run/kept/x": "5", **other})
    assert looked.view(tree) != looked.view({**tree, "run/config": "0"})


def writing_functions():
    """Every "file.py:function" of the sources that calls what publishes files."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name in {"pipeline/runtime/files.py", "pipeline/runtime/publish.py"}:
                continue  # they are the mechanism
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and any(
                    map(writes, ast.walk(function))
                ):
                    yield f"{name}:{function.name}"


def writes(node):
    """Whether it is a call that gives a file its name, or opens one to write."""
    if not isinstance(node, ast.Call) or "devnull" in ast.unparse(node):
        return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    modes = [given.value for given in node.args if isinstance(given, ast.Constant) and isinstance(given.value, str)]
    return called in WRITING or (called == "open" and any(mode.strip("bt+") in {"w", "a", "x"} for mode in modes))


def test_every_function_that_publishes_a_file_is_visited_by_a_writer_of_the_table():
    found = set(writing_functions())
    assert found - SITES.keys() - ELSEWHERE.keys() == set(), (
        "new writers: add a row to WRITERS that comes by, and name it in SITES"
    )
    assert (SITES.keys() | ELSEWHERE.keys()) - found == set(), "writers that are gone: take them out of SITES"
    assert set(SITES.values()) <= {row.name for row in WRITERS}


def test_the_library_names_calls_and_fails_kills_and_halves_them_where_it_is_told(compiler, tmp_path):
    library = shim.compile_shim(tmp_path)
    code = (
        "import os; os.mkdir('w/a'); f = open('w/a/x', 'wb', buffering=0); f.write(b'12345678'); os.fsync(f.fileno()); "
    )
    code += "os.rename('w/a/x', 'w/y'); os.unlink('w/y')"
    names = ["mkdir a", "create a/x", "write a/x", "fsync a/x", "rename a/x y", "unlink y"]

    def environment(place, name, mode):
        (place / "w").mkdir(parents=True)
        told = {"CRASH_NAME": name, "CRASH_OCCURRENCE": "1", "CRASH_MODE": mode}
        return told | {"LD_PRELOAD": str(library), "CRASH_FOLDER": str(place / "w"), "CRASH_LOG": str(place / "log")}

    def run(name, mode, number=0):
        place = tmp_path / f"{number}-{mode}"
        told, words = environment(place, name, mode), [sys.executable, "-c", code]
        return subprocess.run(words, cwd=place, env=told, capture_output=True, check=False), place

    assert [point.name for point in shim.points_of(run("", "")[1] / "log")] == names
    for number, name in enumerate(names):
        ended, place = run(name, "kill", number)
        assert ended.returncode == -9
        assert [point.name for point in shim.points_of(place / "log")] == names[: number + 1]
        ended, place = run(name, "eio1", number)
        assert (ended.returncode, b"Errno 5" in ended.stderr) == (1, True)
    assert (run("write a/x", "half")[1] / "w" / "a" / "x").read_bytes() == b"1234"
    assert b"Errno 28" in run("create a/x", "enospc")[0].stderr
    assert run("unlink y", "enospc", 5)[0].returncode == 0, "no disk lacks the space for a removal"

    _, place = run("", "reads")
    reads = shim.reads_of(place / "log")
    assert (reads.opened, reads.moved, reads.dropped) == (set(), {"a/x", "y"}, {"a/x"})
    place = tmp_path / "watched"
    told = environment(place, "", "watch")
    watched, stood = subprocess.Popen([sys.executable, "-c", code], cwd=place, env=told), []
    while os.WIFSTOPPED(os.waitpid(watched.pid, os.WUNTRACED)[1]):
        stood.append(
            sorted(
                f"{path.relative_to(place / 'w')} {path.stat().st_size * path.is_file()}"
                for path in place.glob("w/**/*")
            )
        )
        watched.send_signal(signal.SIGCONT)
    watched.wait()
    whole = ["a 0", "a/x 8"]
    assert stood == [[], ["a 0"], ["a 0", "a/x 0"], whole, whole, ["a 0", "y 8"]]
