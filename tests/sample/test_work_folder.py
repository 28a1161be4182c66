"""Work shared through files: claims that end with their process, chunks that are whole or not there."""

import errno
import subprocess
import sys
import threading

import numpy as np
import pytest

from pipeline.runtime.errors import UserError
from sample import work_folder
from sample.work_folder import WorkFolder, begin, join, read_arrays, work_folder_of

PLAN = {"steps": 3}
HOLDER = """
import sys
from pathlib import Path
from sample.work_folder import WorkFolder
work = WorkFolder(Path(sys.argv[1]), chunks=3)
print(work.claim(1), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    path = work_folder_of(tmp_path / "out.npz")
    begin(path, PLAN, overwrite=False)
    return path


@pytest.fixture
def work(folder):
    opened = WorkFolder(folder, chunks=3)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(work_folder, "POLL_SECONDS", 0.01)


def take(work, *, wait=False, rank=0, world_size=1, idle=lambda: None):
    return work.unclaimed(rank=rank, world_size=world_size, wait=wait, idle=idle)


def part(value=0):
    return {"data": np.full((2, 3), value, dtype=np.uint8)}


def test_each_process_begins_at_its_share_and_then_helps(work):
    assert list(take(work, rank=2, world_size=3)) == [2, 0, 1]


def test_a_chunk_another_process_holds_is_left_to_it_and_taken_over_when_it_dies(folder, work):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "True\n"
        assert list(take(work)) == [0, 2]
        for chunk in (0, 2):
            work.write(chunk, part())
        waits = []

        def idle():
            waits.append(1)
            if len(waits) == 3:
                holder.kill()

        assert next(take(work, wait=True, idle=idle)) == 1
        assert len(waits) >= 3
    finally:
        holder.kill()
        holder.communicate()


def test_work_that_goes_on_is_not_dropped(folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "True\n"
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"another command \(steps 3, not 4\) is at work in"):
                begin(folder, {"steps": 4}, overwrite=overwrite)
    finally:
        holder.kill()
        holder.communicate()
    begin(folder, {"steps": 4}, overwrite=False)  # no chunk is finished, so nothing is lost


def test_a_chunk_in_this_process_own_hands_is_not_given_out_twice(work):
    given = take(work)
    assert next(given) == 0
    assert list(given) == [1, 2]
    assert list(take(work)) == []


def test_the_parts_are_read_in_order_whatever_the_order_they_were_made_in(work):
    for chunk in (2, 0, 1):
        work.claim(chunk)
        work.write(chunk, part(chunk))
    assert [int(data[0, 0]) for data in work.parts()] == [0, 1, 2]
    assert work.missing() == []


def test_an_interrupted_chunk_is_not_there(work, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.runtime.files.flush_file", fails)
    with pytest.raises(KeyboardInterrupt):
        work.write(0, part())
    assert work.missing() == [0, 1, 2]
    assert not list(work.path.glob("*partial*"))


def test_unfinished_work_of_another_command_is_kept_unless_it_is_dropped(folder, work):
    work.write(0, part())
    with pytest.raises(UserError, match=r"unfinished work of another command \(steps 3, not 4\).*--overwrite"):
        begin(folder, {"steps": 4}, overwrite=False)
    begin(folder, PLAN, overwrite=True)
    assert work.missing() == [1, 2]
    begin(folder, {"steps": 4}, overwrite=True)
    assert work.missing() == [0, 1, 2]


def test_who_comes_when_the_output_is_put_together_finds_no_work(folder, work):
    work.remove()
    assert list(take(work)) == []
    assert not work.is_open()
    assert not join(folder, PLAN, finished=lambda: True)


def test_other_processes_wait_for_the_plan_of_the_main_one(tmp_path):
    path = tmp_path / "work"
    later = threading.Timer(0.1, lambda: begin(path, PLAN, overwrite=False))
    later.start()
    assert join(path, PLAN, finished=lambda: False)
    later.join()


def test_other_processes_do_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(work_folder, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(UserError, match="the main process has not opened"):
        join(tmp_path / "work", PLAN, finished=lambda: False)


def test_a_disk_without_locks_is_refused_instead_of_waited_for(work, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", fails)
    with pytest.raises(UserError, match="cannot lock files"):
        work.claim(0)


def test_a_chunk_is_plain_safetensors(work):
    work.write(1, part(7))
    assert (read_arrays(work.chunk_path(1))["data"] == 7).all()
