"""Losses that are not finite: skipped, counted, and too many of them undone."""

import json

import pytest
import torch

from pipeline.latents import LatentStore
from pipeline.runtime.errors import UserError
from tests.train.runs import assert_same_run, checkpoints, history, lines, make_store, poison, tensors, train
from train.checkpointing import restore
from train.data import BatchShard, DataOrder

SAVING = ["--save-every", "2", "--keep-last", "0"]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A store whose sample 3 makes its batch's loss NaN; it comes once per epoch of 50 samples."""
    folder = make_store(tmp_path_factory.mktemp("poisoned") / "latents")
    poison(folder, [3])
    return folder


def bad_batches(count):
    order = DataOrder(50, seed=0)
    return [number for number in range(count) if 3 in order.batch(number, BatchShard(batch_size=8))]


def test_a_bad_step_changes_nothing_and_is_counted(poisoned, tmp_path):
    bad = bad_batches(6)
    assert len(bad) == 1
    assert train(poisoned, tmp_path / "run", "--save-every", "1", "--keep-last", "0", steps=6) == 0
    skipped = [line["step"] for line in lines(tmp_path / "run") if line["loss"] is None]
    assert skipped == [bad[0] + 1]
    assert lines(tmp_path / "run")[-1]["skipped_steps"] == 1
    before, after = tensors(tmp_path / "run", bad[0]), tensors(tmp_path / "run", bad[0] + 1)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_too_many_in_a_row_go_back_and_jump_past_them_and_resuming_does_the_same(poisoned, tmp_path, capsys):
    flags = [*SAVING, "--max-skipped-in-a-row", "1"]
    run, first_bad = tmp_path / "run", bad_batches(6)[0]
    saved = first_bad // 2 * 2  # the last checkpoint before the step that trains on it
    assert saved > 0
    assert train(poisoned, run, *flags, steps=12) == 0
    assert f"back to step {saved}, going on with the batches after the offending ones" in capsys.readouterr().err
    assert [line["step"] for line in lines(run)] == list(range(1, 13))
    assert all(line["loss"] is not None for line in lines(run))
    state = json.loads((run / "checkpoints" / "step-0000012" / "state" / "trainer.json").read_text())
    assert state["rollbacks"] >= 1 and state["jump"] >= first_bad + 1 - saved
    for steps in (saved + 3, 12):
        assert train(poisoned, tmp_path / "again", *flags, steps=steps) == 0
    assert history(run) == history(tmp_path / "again")
    assert_same_run(run, tmp_path / "again", 12)


@pytest.fixture(scope="module")
def bad_stretch(tmp_path_factory):
    """1,000 samples, 125 batches, of which 25 … 49 are NaN, and a single one at 20."""
    folder = make_store(tmp_path_factory.mktemp("stretch") / "latents", samples=1000, shards=1)
    order = DataOrder(1000, seed=0)
    poison(
        folder, {int(i) for number in (20, *range(25, 50)) for i in order.batch(number, BatchShard(batch_size=8))[:1]}
    )
    return folder


@pytest.mark.slow
def test_going_back_never_leaves_a_run_without_checkpoints(bad_stretch, tmp_path, capsys):
    """Three are kept, all saved amid skipped steps; the one from before them is kept for going back to."""
    flags = ["--save-every", "5", "--keep-last", "3", "--log-every", "10"]
    assert train(bad_stretch, tmp_path / "run", *flags, steps=60) == 0
    spoken = capsys.readouterr().err
    assert "back to step 25, going on with the batches after the offending ones" in spoken
    assert checkpoints(tmp_path / "run") == [f"step-{step:07d}" for step in (50, 55, 60)]
    state = json.loads((tmp_path / "run/checkpoints/step-0000060/state/trainer.json").read_text())
    assert state["rollbacks"] == 1 and state["skipped_in_a_row"] == 0


def test_where_every_checkpoint_lies_amid_skips_the_newest_whole_one_will_do(bad_stretch, tmp_path, capsys):
    """Skipped steps leave the weights alone; a kept checkpoint of the past is not lost either."""
    flags = ["--save-every", "21", "--keep-last", "1", "--keep-every", "21", "--log-every", "10"]
    assert train(bad_stretch, tmp_path / "run", *flags, steps=60) == 0
    assert "back to step 42, going on" in capsys.readouterr().err
    assert checkpoints(tmp_path / "run") == [f"step-{step:07d}" for step in (21, 42, 60)]


def test_a_run_that_ends_amid_skipped_steps_says_so(bad_stretch, tmp_path, capsys):
    assert train(bad_stretch, tmp_path / "run", "--log-every", "10", steps=33) == 0
    assert "the last 8 steps were skipped" in capsys.readouterr().err


@pytest.mark.slow
def test_where_a_sitting_ends_does_not_decide_about_going_back(poisoned, tmp_path):
    flags = [*SAVING, "--max-skipped-in-a-row", "1", "--log-every", "10"]
    assert train(poisoned, tmp_path / "straight", *flags, steps=20) == 0
    for steps in (bad_batches(6)[0] + 1, 20):
        assert train(poisoned, tmp_path / "cut", *flags, steps=steps) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "cut", 20)


def test_without_a_checkpoint_to_go_back_to_it_ends_with_a_clear_line(poisoned, tmp_path, capsys):
    assert train(poisoned, tmp_path / "run", "--max-skipped-in-a-row", "1", steps=12) == 1
    spoken = capsys.readouterr().err
    assert "not finite for 1 steps in a row" in spoken and "there is no checkpoint to go back to; lower --lr" in spoken
    assert checkpoints(tmp_path / "run") == []


def test_going_back_too_often_ends_with_a_clear_line(tmp_path, capsys):
    folder = make_store(tmp_path / "latents", samples=16, shards=1)
    poison(folder, [1, 2, 5, 9])
    flags = ["--save-every", "1", "--max-skipped-in-a-row", "1", "--max-rollbacks", "2", "--batch-size", "2"]
    assert train(folder, tmp_path / "run", *flags, steps=100) == 1
    assert "2 returns did not help" in capsys.readouterr().err


@pytest.mark.slow
def test_after_rolling_back_nothing_of_the_abandoned_steps_is_left(bad_stretch, tmp_path, monkeypatch):
    """Looked at when it is said: a kill after it must not resume what was abandoned, nor count its skipped steps."""
    seen, states = [], []

    def noted_restore(folder, state):
        restore(folder, state)
        states.append(state)

    def noted_warn(message):
        if "back to step" in message:
            seen.append((checkpoints(tmp_path / "run"), float(states[-1].optimizer.skipped_in_a_row)))

    monkeypatch.setattr("train.loop.restore", noted_restore)
    monkeypatch.setattr("train.loop.warn", noted_warn)
    flags = ["--save-every", "14", "--keep-last", "1", "--keep-every", "42", "--log-every", "10"]
    assert train(bad_stretch, tmp_path / "run", *flags, steps=52) == 0
    assert seen == [(["step-0000014"], 0.0)]
    flags = ["--save-every", "21", "--keep-last", "1", "--keep-every", "42", "--log-every", "10"]
    seen.clear()
    assert train(bad_stretch, tmp_path / "amid", *flags, steps=52) == 0
    assert [streak for _, streak in seen] == [0.0]


def test_what_the_reader_meets_late_ends_the_run_with_its_status(store, tmp_path, monkeypatch, capsys):
    gather, calls = LatentStore.gather, []

    def cut_short(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 5:
            raise UserError("the disk went away")
        return gather(self, *args, **kwargs)

    monkeypatch.setattr("pipeline.latents.store.LatentStore.gather", cut_short)
    assert train(store, tmp_path / "run", steps=20) == 2
    assert "the disk went away" in capsys.readouterr().err
    assert 0 < lines(tmp_path / "run")[-1]["step"] < 20
