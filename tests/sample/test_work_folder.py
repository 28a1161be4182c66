"""Work shared through files: claims that end with their process, chunks that are whole or not there."""

import contextlib
import errno
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.runtime.errors import UserError
from pipeline.runtime.publish import work_folder_of
from pipeline.runtime.work_queue import Presence
from sample import work_folder
from sample.run import _finish
from sample.work_folder import begin, join

PLAN = {"steps": 3}
HOLDER = """
import sys
from pathlib import Path
from sample.work_folder import begin
work = begin(Path(sys.argv[1]), {"steps": 3}, chunks=3, overwrite=False)
print(work.claim(1), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    path = work_folder_of(tmp_path / "out.npz")
    open_work(path).close()
    return path


@pytest.fixture
def work(folder):
    opened = open_work(folder)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(work_folder, "POLL_SECONDS", 0.01)


def open_work(path, plan=PLAN, *, overwrite=False):
    return begin(path, plan, chunks=3, overwrite=overwrite)


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
                open_work(folder, {"steps": 4}, overwrite=overwrite)
    finally:
        holder.kill()
        holder.communicate()
    open_work(folder, {"steps": 4}).close()  # no chunk is finished, so nothing is lost


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


def test_unfinished_work_of_another_command_is_kept_unless_it_is_dropped(folder):
    with contextlib.closing(open_work(folder)) as work:
        work.write(0, part())
    with pytest.raises(UserError, match=r"unfinished work of another command \(steps 3, not 4\).*--overwrite"):
        open_work(folder, {"steps": 4})
    with contextlib.closing(open_work(folder, overwrite=True)) as work:
        assert work.missing() == [1, 2]
    with contextlib.closing(open_work(folder, {"steps": 4}, overwrite=True)) as work:
        assert work.missing() == [0, 1, 2]
        assert not list(folder.glob("chunk-*")), "what is dropped is gone from the disk"


def test_parts_of_another_plan_are_never_taken_also_where_the_plan_is_gone(folder):
    with contextlib.closing(open_work(folder)) as work:
        for chunk in range(3):
            work.write(chunk, part(chunk))
    (folder / "plan.json").unlink()
    with contextlib.closing(open_work(folder, {"steps": 4}, overwrite=True)) as work:
        assert work.missing() == [0, 1, 2]


@pytest.mark.parametrize("plan", ["", "{", "[1]"])
def test_a_damaged_plan_is_no_dead_end_and_finished_chunks_stay(folder, plan):
    with contextlib.closing(open_work(folder)) as work:
        work.write(1, part(1))
    (folder / "plan.json").write_text(plan)
    with contextlib.closing(open_work(folder, overwrite=plan == "[1]")) as work:
        assert work.missing() == [0, 2]


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty"])
def test_a_damaged_part_is_made_again(work, damage):
    for chunk in range(3):
        work.write(chunk, part(chunk))
    path = work.chunk_path(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"a flipped bit": bytes(data), "cut": bytes(data[:-3]), "empty": b""}[damage])
    assert work.drop_damaged() == 1
    assert work.missing() == [1]
    assert work.drop_damaged() == 1  # it is still to be made


def test_a_damaged_strip_is_made_again_with_the_chunk_that_it_came_from(work):
    for chunk in range(3):
        work.write(chunk, part(chunk))
    work.write_part("strip.safetensors", part())
    assert work.drop_damaged(together="strip.safetensors") == 0
    (work.path / "strip.safetensors").write_bytes(b"")
    assert work.drop_damaged(together="strip.safetensors") == 1
    assert work.missing() == [0]


def test_who_comes_when_the_output_is_put_together_finds_no_work(folder, work):
    work.remove()
    assert list(take(work)) == []
    assert not work.is_open()
    assert join(folder, PLAN, chunks=3, finished=lambda: True) is None


def test_other_processes_wait_for_the_plan_of_the_main_one(tmp_path):
    path = tmp_path / "work"
    later = threading.Timer(0.1, lambda: open_work(path).close())
    later.start()
    joined = join(path, PLAN, chunks=3, finished=lambda: False)
    assert joined.missing() == [0, 1, 2]
    later.join()
    joined.close()


def test_other_processes_do_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(work_folder, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(UserError, match="the main process has not opened"):
        join(tmp_path / "work", PLAN, chunks=3, finished=lambda: False)


def test_a_disk_without_locks_is_refused_instead_of_waited_for(work, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot lock files"):
        patch.setattr("fcntl.flock", fails)
        work.claim(0)


def test_a_chunk_is_plain_safetensors(work):
    work.write(1, part(7))
    assert (load_file(work.chunk_path(1))["data"] == 7).all()


@pytest.mark.timeout(20)
def test_who_comes_too_late_to_put_the_output_together_ends_instead_of_waiting_for_a_claim(folder, work):
    with contextlib.closing(open_work(folder)) as other:
        other.remove()
    _finish(work, None, None)


def test_a_command_that_fails_leaves_the_folder_to_those_who_are_at_work_there(folder, work):
    with contextlib.closing(open_work(folder)) as other:
        other.remove(unless_shared=True)
        assert work.is_open()
    work.remove(unless_shared=True)
    assert not folder.exists()


def test_who_begins_while_the_folder_is_removed_begins_anew(folder, work):
    """The newcomer has come in, and finds the folder gone when it wants to decide."""
    real, first = Presence.gate, []

    def gate(here):
        if not first and here is not work._here and here._lock is not None:
            first.append(here)
            work.remove()
        return real(here)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Presence, "gate", gate)
        late = open_work(folder)
    assert late.missing() == [0, 1, 2]
    assert first[0]._mark.exists()
    late.close()
