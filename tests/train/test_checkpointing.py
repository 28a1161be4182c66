import errno
import json
import os
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import read_checkpoint
from pipeline.dit import DiT, DiTConfig
from pipeline.runtime.devices import PinnedStaging
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of
from tests.train.runs import assert_same_run, checkpoints, lines, tensors, train, wait_for
from train.checkpointing import write_snapshot


def test_checkpoints_are_kept_by_count_and_by_interval(store, tmp_path):
    flags = ["--save-every", "1", "--keep-last", "2", "--keep-every", "3"]
    assert train(store, tmp_path / "run", *flags, steps=8) == 0
    assert checkpoints(tmp_path / "run") == [f"step-{step:07d}" for step in (3, 6, 7, 8)]


def test_every_checkpoint_is_kept_on_request(store, tmp_path):
    assert train(store, tmp_path / "run", "--save-every", "2", "--keep-last", "0", steps=5) == 0
    assert checkpoints(tmp_path / "run") == [f"step-{step:07d}" for step in (2, 4, 5)]


def test_what_a_killed_writer_left_is_swept_away(store, tmp_path):
    left = tmp_path / "run" / "checkpoints" / ".step-0000001.partial"
    assert train(store, tmp_path / "run", "--save-every", "2", steps=2) == 0
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert train(store, tmp_path / "run", "--save-every", "2", steps=3) == 0
    assert checkpoints(tmp_path / "run") == ["step-0000002", "step-0000003"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_a_clear_line(store, tmp_path, capsys):
    """The system refuses files beyond 1 MB, as a full disk refuses any."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, allowed[1]))
    try:
        assert train(store, tmp_path / "run", "--save-every", "2", steps=50) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert "error: cannot write " in capsys.readouterr().err
    assert checkpoints(tmp_path / "run") == []
    assert lines(tmp_path / "run")[-1]["step"] < 50  # it did not go on to the end without its checkpoints


def test_several_averages_are_saved_and_can_be_sampled_from(store, tmp_path):
    flags = ["--ema-decay", "0.9", "--extra-ema", "slow=0.99", "frozen=0.0"]
    assert train(store, tmp_path / "run", *flags, steps=3) == 0
    state = tensors(tmp_path / "run", 3)
    names = {name.split("/")[0] for name in state}
    assert names == {"model", "ema", "ema-slow", "ema-frozen", "optimizer"}
    name = "blocks.0.mlp.fc1.weight"
    assert state[f"ema-frozen/{name}"].equal(state[f"model/{name}"])
    assert not state[f"ema-slow/{name}"].equal(state[f"ema/{name}"])
    checkpoint = read_checkpoint(tmp_path / "run", weights="slow")
    assert checkpoint.model.state_dict()[name].equal(state[f"ema-slow/{name}"])


def test_overwrite_begins_anew(store, tmp_path):
    assert train(store, tmp_path / "run", steps=3) == 0
    assert train(store, tmp_path / "run", "--seed", "1", "--overwrite", steps=2) == 0
    assert train(store, tmp_path / "fresh", "--seed", "1", steps=2) == 0
    assert checkpoints(tmp_path / "run") == ["step-0000002"]
    assert_same_run(tmp_path / "run", tmp_path / "fresh", 2)


def test_training_goes_on_while_a_checkpoint_is_written_of_the_step_it_was_taken_at(
    store, tmp_path, capsys, monkeypatch
):
    """The writer begins only after three later steps were logged: if training waited for it, both would wait for ever."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert train(store, straight, steps=5) == 0

    def write_late(folder, snapshot, info):
        if snapshot.step == 5:
            wait_for(lambda: lines(run)[-1]["step"] >= 8, seconds=120)
        write_snapshot(folder, snapshot, info)

    monkeypatch.setattr("train.checkpointing.write_snapshot", write_late)
    capsys.readouterr()
    assert train(store, run, "--save-every", "5", steps=9) == 0
    early, late = tensors(straight, 5), tensors(run, 5)
    assert early.keys() == late.keys() and all(early[name].equal(late[name]) for name in early)
    said = re.findall(r"checkpoint step-(\d+): training paused [\d.]+ s, written in [\d.]+ s", capsys.readouterr().err)
    assert said == ["0000005", "0000009"]
    assert max(line["save_pause_seconds"] for line in lines(run)) > 0


def test_the_last_checkpoint_that_cannot_be_written_is_told_by_the_status(store, tmp_path, capsys):
    """Nothing comes after it that could notice the writer's error."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, allowed[1]))
    try:
        assert train(store, tmp_path / "run", steps=2) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    spoken = capsys.readouterr().err
    assert "error: cannot write " in spoken and "done:" not in spoken
    assert checkpoints(tmp_path / "run") == []


def test_the_logged_rate_is_the_one_that_moved_the_weights_and_the_averages_follow_their_warm_up(store, tmp_path):
    """From two neighbouring checkpoints: w_n - w_(n+1) = lr · m / (√v + ε), ema_(n+1) = ema_n + (1 - d_n)(w_(n+1) - ema_n)."""
    flags = ["--save-every", "1", "--keep-last", "0", "--lr", "1e-2", "--lr-warmup-steps", "2", "--ema-warmup"]
    flags += ["--lr-schedule", "cosine", "--decay-steps", "5", "--weight-decay", "0"]
    assert train(store, tmp_path / "run", *flags, steps=5) == 0
    rates = {line["step"]: line["lr"] for line in lines(tmp_path / "run")}
    assert len(set(rates.values())) == 5
    name = "blocks.0.mlp.fc1.weight"
    for step in range(1, 5):
        before, after = tensors(tmp_path / "run", step), tensors(tmp_path / "run", step + 1)
        mean = after[f"optimizer/{name}.exp_avg"].double() / (1 - 0.9 ** (step + 1))
        square = after[f"optimizer/{name}.exp_avg_sq"].double() / (1 - 0.999 ** (step + 1))
        moved = before[f"model/{name}"].double() - after[f"model/{name}"].double()
        expected = rates[step + 1] * mean / (square.sqrt() + 1e-8)
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)
        old, new = before[f"ema/{name}"], after[f"ema/{name}"]
        decay = (1 + step) / (10 + step)
        torch.testing.assert_close(new, old + (1 - decay) * (after[f"model/{name}"] - old), rtol=1e-5, atol=1e-7)


def test_the_time_spent_training_is_part_of_a_checkpoint_and_goes_on(store, tmp_path):
    seconds = []
    for steps in (2, 4):
        assert train(store, tmp_path / "run", steps=steps) == 0
        state = json.loads((tmp_path / f"run/checkpoints/step-{steps:07d}/state/trainer.json").read_text())
        seconds.append(state["seconds"])
    assert 0 < seconds[0] < seconds[1]


def test_a_folder_that_only_looks_like_a_checkpoint_is_left_alone(store, tmp_path):
    foreign = tmp_path / "run" / "checkpoints" / "step-best"
    assert train(store, tmp_path / "run", steps=2) == 0
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    assert train(store, tmp_path / "run", "--keep-last", "1", steps=3) == 0
    assert checkpoints(tmp_path / "run") == ["step-0000003", "step-best"]


def reseal(folder):
    """Make a changed checkpoint whole again: its list of files says what is there now."""
    listing = json.loads((folder / "state/files.json").read_text())
    for name, known in listing["files"].items():
        known |= {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    (folder / "state/files.json").write_text(json.dumps(listing))


def test_a_checkpoint_of_another_version_or_another_network_is_refused_by_name(store, tmp_path, capsys):
    assert train(store, tmp_path / "run", steps=2) == 0
    folder = tmp_path / "run/checkpoints/step-0000002"
    trainer = (folder / "state/trainer.json").read_text()
    (folder / "state/trainer.json").write_text(trainer.replace('"version": 1', '"version": 2'))
    reseal(folder)
    assert train(store, tmp_path / "run", steps=3) == 2
    spoken = capsys.readouterr().err
    assert "has format 'dit-train-state' version 2, but this program resumes 'dit-train-state' version 1" in spoken
    (folder / "state/trainer.json").write_text(trainer)
    state = load_file(folder / "model.safetensors")
    gone = state.pop("blocks.0.mlp.fc1.weight")
    save_file(state, folder / "model.safetensors")
    reseal(folder)
    assert gone.numel() and train(store, tmp_path / "run", steps=3) == 2
    assert "lacks blocks.0.mlp.fc1.weight; it belongs to another network" in capsys.readouterr().err


def test_everything_of_a_checkpoint_and_the_lines_before_it_are_flushed_before_it_gets_its_name(
    store, tmp_path, monkeypatch
):
    done = []
    flush, rename = os.fsync, Path.rename

    def noted_flush(descriptor):
        done.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        flush(descriptor)

    def noted_rename(path, target):
        done.append(f"-> {target}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_flush)
    monkeypatch.setattr(Path, "rename", noted_rename)
    run = tmp_path / "run"
    assert train(store, run, "--save-every", "2", steps=3) == 0
    named = done.index(f"-> {run / 'checkpoints/step-0000002'}")
    flushed = set(done[:named])
    partial = run / "checkpoints/.step-0000002.partial"
    files = ("config.json", "model.safetensors", "ema.safetensors")
    files += tuple(f"state/{name}" for name in ("optimizer.safetensors", "trainer.json", "files.json"))
    assert {str(partial / name) for name in files} | {str(partial), str(partial / "state")} <= flushed
    assert str(run / "metrics.jsonl") in flushed
    assert str(run / "checkpoints") in done[named:]


def test_what_a_kill_left_beyond_keep_last_goes_at_the_next_start(store, tmp_path):
    run = tmp_path / "run"
    assert train(store, run, "--save-every", "1", "--keep-last", "0", steps=4) == 0
    assert train(store, run, "--save-every", "1", "--keep-last", "2", steps=4) == 0  # nothing is left to train
    assert checkpoints(run) == ["step-0000003", "step-0000004"]


def test_an_old_checkpoint_that_cannot_be_removed_is_said_and_ends_nothing(store, tmp_path, monkeypatch, capsys):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr("train.kept_checkpoints.discard", full)
        assert train(store, tmp_path / "run", "--save-every", "1", "--keep-last", "1", steps=3) == 0
    assert "an old checkpoint stays for now: " in capsys.readouterr().err
    assert len(checkpoints(tmp_path / "run")) == 3
    assert train(store, tmp_path / "run", "--save-every", "1", "--keep-last", "1", steps=3) == 0
    assert checkpoints(tmp_path / "run") == ["step-0000003"]


def test_the_run_that_overwrite_replaces_goes_with_the_first_checkpoint_and_not_before(store, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(store, run, steps=3) == 0
    (run / "notes.txt").write_text("mine")
    before = tensors(run, 3)

    def fails(step):
        raise UserError("no sample today")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop.train_step", lambda *_, **__: fails(1))
        assert train(store, run, "--seed", "1", "--overwrite", steps=2) == 2
    assert f"the run that {run} held stays in {run / '.replaced'}" in capsys.readouterr().err
    kept = tensors(run / ".replaced", 3)
    assert all(torch.equal(before[name], kept[name]) for name in before) and checkpoints(run) == []
    assert train(store, run, "--seed", "1", "--overwrite", steps=2) == 0
    assert checkpoints(run) == ["step-0000002"]
    assert sorted(path.name for path in run.iterdir()) == sorted(
        [".lock", "checkpoints", "config.yaml", "metrics.jsonl", "notes.txt"]
    )


def test_overwriting_needs_room_for_both_runs(store, tmp_path, monkeypatch, capsys):
    assert train(store, tmp_path / "run", steps=1) == 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    assert train(store, tmp_path / "run", "--overwrite", steps=1) == 2
    assert "0.0 GB free, but a checkpoint takes 0.0 GB and the run that --overwrite replaces" in capsys.readouterr().err
    assert checkpoints(tmp_path / "run") == ["step-0000001"]


def test_staging_holds_little_more_than_the_tensors_and_is_used_again():
    """XL/2's weights, two moments and one average; memory of no device, so that nothing is really taken."""
    with torch.device("meta"):
        weights = list(DiT(DiTConfig(), seed=None).parameters())
    staging = PinnedStaging(device="meta", pin=False)
    for _ in range(2):
        staging.rewind()
        places = [staging.take(weight) for weight in weights * 4]
    held = sum(len(slab) for slab in staging.slabs)
    needed = 16 * sum(weight.numel() for weight in weights)
    assert needed <= held <= 1.05 * needed
    assert all(
        (place.shape, place.dtype) == (weight.shape, weight.dtype)
        for place, weight in zip(places, weights * 4, strict=True)
    )


def test_staged_tensors_do_not_touch_each_other():
    staging = PinnedStaging(pin=False)
    for _ in range(2):
        staging.rewind()
        sources = [torch.randn(shape) for shape in [(3, 5), (), (1000,), (7, 1, 2)]]
        copies = [staging.take(source).copy_(source) for source in sources]
    assert len(staging.slabs) == 1
    assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=True))
