"""The folder of a store that is being made: what one process at a time may do, while another comes in between."""

import threading
import zlib
from types import SimpleNamespace

import pytest

from extract import run, store_folder
from extract.plan import Plan
from extract.same_data import LANE, check_inputs
from extract.store_folder import OutputFolder
from pipeline.latents.names import record_name
from pipeline.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path):
    output = OutputFolder(path=tmp_path / "s", split="train")
    output.work.mkdir(parents=True)
    return output


class Paused:
    """Calls a function in a thread and stops it at a call of another one, until `go_on`."""

    def __init__(self, monkeypatch, module, name, action):
        honest, self._there, self._go = getattr(module, name), threading.Event(), threading.Event()
        self.result = None

        def stopping(*arguments, **more):
            if threading.current_thread() is self._thread:
                self._there.set()
                assert self._go.wait(20)
            return honest(*arguments, **more)

        def act():
            self.result = action()

        monkeypatch.setattr(module, name, stopping)
        self._thread = threading.Thread(target=act)
        self._thread.start()
        assert self._there.wait(20)

    def go_on(self):
        self._go.set()
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.result


def in_a_moment(action):
    """A thread that is given time to come as far as it can."""
    outcome = []

    def act():
        try:
            outcome.append(action())
        except UserError as error:
            outcome.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    thread.join(0.3)
    return thread, outcome


def test_of_two_commands_with_other_settings_that_begin_at_once_one_is_refused(folder, monkeypatch):
    first = Paused(monkeypatch, store_folder, "write_json", lambda: folder.begin({"seed": 0}, "plan 0"))
    thread, outcome = in_a_moment(lambda: folder.begin({"seed": 1}, "plan 1"))
    first.go_on()
    thread.join(20)
    assert isinstance(outcome[0], UserError) and "--seed 0 there, 1 now" in str(outcome[0])


def test_a_finished_store_that_lost_a_shard_is_reopened_once(tmp_path, command, monkeypatch, capsys):
    folder = OutputFolder(path=tmp_path / "s", split="train")
    assert command("--out", folder.path)[0] == 0
    (folder.path / "train-00001.safetensors").unlink()
    folder.work.mkdir()
    first = Paused(monkeypatch, store_folder, "write_json", folder.reopen)
    thread, outcome = in_a_moment(folder.reopen)
    first.go_on()
    thread.join(20)
    assert outcome == [None] and not folder.has_manifest
    assert capsys.readouterr().err.count("made anew") == 1


def test_a_shard_that_another_process_finished_just_before_its_lock_was_free_is_not_made_again(folder, monkeypatch):
    honest = store_folder.try_claim

    def late(path):
        (folder.path / record_name("train", 3)).write_text("{}")
        return honest(path)

    monkeypatch.setattr(store_folder, "try_claim", late)
    assert folder.claim(3) is None
    lock = honest(folder.work / "locks/00003.lock")
    assert lock is not None, "it is let go of"
    lock.release()


def test_a_shard_has_one_maker_and_its_half_written_files_go(folder):
    left = folder.work / "train-00003.safetensors.77.partial"
    left.touch()
    lock = folder.claim(3)
    assert lock is not None and folder.claim(3) is None and not left.exists()
    lock.release()
    again = folder.claim(3)
    assert again is not None
    again.release()


def test_who_comes_in_alone_removes_what_killed_processes_left_and_who_does_not_leaves_it(folder):
    left, dead = folder.work / ".settings.json.77.partial", folder.work / "present" / "host-77-1.lock"
    dead.parent.mkdir()
    for path in (left, dead):
        path.touch()
    with folder.occupied():
        assert not left.exists() and not dead.exists()
        left.touch()
        with folder.occupied():
            assert left.exists(), "it may be the other one's"


def test_one_process_at_a_time_finishes_a_store(tmp_path, command, monkeypatch):
    """The first stands before the manifest; the second waits, and then finds it there."""
    monkeypatch.setattr(
        run, "finish", lambda output, plan, description, allow_skips: finishing(output, description, plan)
    )
    calls = []

    def finishing(output, description, plan):
        calls.append((output, description, plan))
        return 0

    assert command("--out", tmp_path / "s")[0] == 0
    monkeypatch.undo()
    output, description, plan = calls[0]
    honest, at_work, most = run.finish_store, [], []

    def counting(*arguments, **more):
        at_work.append(1)
        most.append(len(at_work))
        result = honest(*arguments, **more)
        at_work.pop()
        return result

    monkeypatch.setattr(run, "finish_store", counting)

    def finish():
        return run.finish(output, plan, description, allow_skips=0.0)

    first = Paused(monkeypatch, run, "_record", finish)
    thread, outcome = in_a_moment(finish)
    assert outcome == [], "it waits"
    assert first.go_on() == 0
    thread.join(20)
    assert outcome == [0] and most == [1, 1]


def test_a_shard_that_is_written_is_let_go_of(tmp_path, command, monkeypatch):
    """A store of ten thousand shards would run out of descriptors otherwise."""
    honest, locks, held = OutputFolder.claim, [], []

    def claim(self, shard):
        locks.append(honest(self, shard))
        held.append(sum(lock is not None and lock.is_locked for lock in locks))
        return locks[-1]

    monkeypatch.setattr(OutputFolder, "claim", claim)
    assert command("--out", tmp_path / "s", "--samples-per-shard", 1, "--workers", 1)[0] == 0
    assert len(locks) == 50 and max(held) < 35 and not any(lock.is_locked for lock in locks)


def test_another_size_of_batches_is_another_setting_where_it_is_known(folder):
    folder.begin({"seed": 0, LANE: 8}, "plan")
    folder.begin({"seed": 0}, "plan")  # on a CPU
    with pytest.raises(UserError, match="--batch-size 8 there, 32 now"):
        folder.begin({"seed": 0, LANE: 32}, "plan")
    folder.begin({"seed": 0, LANE: 8}, "plan")


def test_an_input_that_the_record_does_not_know_is_other_data():
    source = SimpleNamespace(read=lambda _listing, index: bytes([index]))
    loader = SimpleNamespace(key=str, source=source, listing=None)
    plan = Plan(inputs=2, seed=0, samples_per_shard=2)
    sums = [zlib.crc32(bytes([int(index)])) for index in plan.rows(0)]
    check_inputs([(0, SimpleNamespace(skipped=(), input_crc32=sums))], plan, loader, "store")
    with pytest.raises(UserError, match="store was begun with other data"):
        check_inputs([(0, SimpleNamespace(skipped=(), input_crc32=sums[:1]))], plan, loader, "store")
