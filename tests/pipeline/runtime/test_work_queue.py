"""Locks between real processes: one holder, none after its end, and folders that are left by the last one only."""

import errno
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.runtime import work_queue
from pipeline.runtime.errors import UserError
from pipeline.runtime.work_queue import Presence, exclusive, try_claim

ROOT = Path(__file__).parents[3]


@contextmanager
def process_that(does, path):
    """Another process that has done something with a path, and stays until it is killed."""
    code = (
        "import sys, pathlib\nfrom pipeline.runtime.work_queue import *\n"
        f"path = pathlib.Path(sys.argv[1])\n{does}\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, path], env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_claim_is_one_process_s_and_ends_with_it_however_it_ends(tmp_path):
    with process_that("lock = try_claim(path)", tmp_path / "lock") as holder:
        assert try_claim(tmp_path / "lock") is None
        holder.kill()
        holder.wait()
        lock = try_claim(tmp_path / "lock")
        assert lock is not None
        assert try_claim(tmp_path / "lock") is None, "nor is it given twice within a process"
        lock.release()


def test_who_wants_to_be_alone_waits_for_the_end_of_whoever_is(tmp_path):
    with process_that("lock = try_claim(path)", tmp_path / "lock") as holder:
        threading.Timer(0.3, holder.kill).start()
        start = time.monotonic()
        with exclusive(tmp_path / "lock"):
            assert time.monotonic() - start > 0.25


def test_one_knows_whether_others_are_at_work_and_the_dead_do_not_count(tmp_path):
    with Presence(tmp_path / "work") as here:
        with process_that("here = Presence(path)", tmp_path / "work") as other:
            with here.gate():
                assert not here.is_alone()
            other.kill()
            other.wait()
            with here.gate():
                assert here.is_alone()
        assert len(list((tmp_path / "work" / "present").iterdir())) == 1, "the mark of the dead is gone"
    assert not list((tmp_path / "work" / "present").iterdir())


def followed_by(then, real):
    def call(path, *arguments, **options):
        real(path, *arguments, **options)
        then(path)

    return call


def in_order(scandir):
    """A disk that lists a folder by name: the gate before the marks."""

    @contextmanager
    def listing(path):
        with scandir(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name)

    return listing


@pytest.mark.parametrize("moment", ["present", "gate.lock"])
def test_who_comes_in_while_the_folder_is_removed_is_known_in_a_new_one(tmp_path, moment):
    """The newcomer tries at the moment when the marks, or the gate, have just gone."""
    folder, came = tmp_path / "work", []
    newcomer = threading.Thread(target=lambda: came.append(Presence(folder)))

    def let_in(name):
        if Path(name).name == moment and not newcomer.ident:
            newcomer.start()
            newcomer.join(0.5)

    leaver = Presence(folder)
    (folder / "parts").mkdir()
    (folder / "parts" / "a").write_text("a")
    with leaver.gate(), pytest.MonkeyPatch.context() as patch:
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, followed_by(let_in, getattr(os, name)))
        patch.setattr(os, "scandir", in_order(os.scandir))
        leaver.remove_folder()
    newcomer.join(10)
    leaver.leave()
    (here,) = came
    assert here._mark.exists(), "its mark was removed with the folder"
    with Presence(folder) as third, third.gate():
        assert not third.is_alone()
    here.leave()


def test_a_folder_that_is_left_and_removed_by_many_at_once_never_loses_one_who_is_in_it(tmp_path):
    """Four processes come in and, where alone, take the folder away, for a second: each finds its own mark there."""
    does = """
import time, os
end = time.monotonic() + 1
while time.monotonic() < end:
    with Presence(path) as here:
        time.sleep(0.002)
        if not here._mark.exists():
            (path.parent / f"lost-{os.getpid()}").touch()
        with here.gate():
            if here.is_alone():
                here.remove_folder()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = f"import sys, pathlib\nfrom pipeline.runtime.work_queue import Presence\npath = pathlib.Path(sys.argv[1])\n{does}"
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "work"], env=environment) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert not list(tmp_path.glob("lost-*"))


def test_of_those_who_leave_at_once_one_is_the_last(tmp_path):
    """Two that ask at the same moment do not leave the folder to each other."""
    for turn in range(30):
        folder, together = tmp_path / str(turn), threading.Barrier(2)

        def go(folder=folder, together=together):
            with Presence(folder) as here:
                together.wait()
                with here.last() as alone:
                    if alone:
                        here.remove_folder()

        leavers = [threading.Thread(target=go) for _ in range(2)]
        for leaver in leavers:
            leaver.start()
        for leaver in leavers:
            leaver.join()
        assert not folder.exists()


@pytest.fixture
def no_locks(monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fails)


@pytest.mark.usefixtures("no_locks")
def test_on_a_disk_without_locks_shared_work_is_refused_and_a_lone_command_goes_on_after_a_word(tmp_path, caplog):
    with pytest.raises(UserError, match="cannot lock files"):
        try_claim(tmp_path / "shard.lock")
    for name in ("a", "b"):
        with exclusive(tmp_path / name, needed=False):
            pass
    assert caplog.text.count("cannot lock files") == 1, "once for a folder"


def test_the_locks_import_nothing_that_only_some_systems_have():
    source = Path(work_queue.__file__).read_text()
    assert "fcntl" not in source and "msvcrt" not in source
