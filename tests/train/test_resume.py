import json
import random
import shutil

import pytest

from tests.families import kill_family
from tests.train.runs import (
    assert_close_histories,
    assert_same_run,
    checkpoints,
    history,
    launch,
    lines,
    running,
    start,
    torchrun,
    train,
    wait_for,
)

STEPS = 16  # 128 samples of 50: the epochs' edges fall inside the 7th and the 13th batch
SETTINGS = ["--save-every", "3", "--extra-ema", "fast=0.9", "--ema-warmup", "--clip-norm", "1.0", "--keep-last", "0"]


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train(store, run, *SETTINGS, steps=STEPS) == 0
    return run


def cut_back(run, step):
    """What a kill after a checkpoint leaves: no later checkpoint, but lines that were logged since."""
    for name in checkpoints(run):
        if name > f"step-{step:07d}":
            shutil.rmtree(run / "checkpoints" / name)


def killed(store, out, after_step, *flags, steps=STEPS):
    """A run in a process of its own that is killed (SIGKILL) once it has logged a step."""
    with start(store, out, *flags, steps=steps) as process:
        kill_after(process, out, after_step)


def kill_after(process, out, after_step):
    """SIGKILL for a run's every process, once it has logged a step."""
    wait_for(lambda: any(line["step"] >= after_step for line in lines(out)) or process.poll() is not None)
    kill_family(process)


@pytest.mark.slow
def test_a_run_killed_twice_at_random_moments_comes_back_to_the_bit(store, straight, tmp_path):
    for _ in range(2):
        killed(store, tmp_path / "run", random.randrange(1, STEPS - 2), *SETTINGS)
    assert train(store, tmp_path / "run", *SETTINGS, steps=STEPS) == 0
    assert_same_run(straight, tmp_path / "run", STEPS)


@pytest.mark.parametrize("step", [3, 6, 12])
def test_every_checkpoint_leads_to_the_same_end_also_at_an_epochs_edge(store, straight, tmp_path, step):
    shutil.copytree(straight, tmp_path / "run")
    cut_back(tmp_path / "run", step)
    settings = [*SETTINGS, "--out", str(tmp_path / "run")]
    assert train(store, tmp_path / "run", *settings, steps=STEPS) == 0
    assert_same_run(straight, tmp_path / "run", STEPS)


def test_a_finished_run_goes_on_with_more_steps_as_if_it_had_never_stopped(store, straight, tmp_path):
    log_every_3 = [*SETTINGS, "--log-every", "3"]
    for steps in (5, 5, STEPS):  # 5 is logged as the last step, which the longer run does not do
        assert train(store, tmp_path / "run", *log_every_3, steps=steps) == 0
    wanted = [line for line in history(straight) if line["step"] % 3 == 0 or line["step"] == STEPS]
    assert history(tmp_path / "run") == wanted


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed-precision", "bf16", "--grad-accumulation", "2"],
        ["--objective", "flow", "--lr-schedule", "cosine", "--decay-steps", "20", "--lr-warmup-steps", "2"],
        ["--validation-share", "0.1", "--validate-every", "2", "--gradient-checkpointing"],
        ["--lr-schedule", "wsd", "--decay-steps", "4", "--decay-start", "1", "--lr-warmup-steps", "1"],
    ],
    ids=["bf16 and accumulation", "flow and a decaying rate", "held-out share", "warm-up, stable, decay"],
)
def test_other_settings_resume_to_the_bit_too(store, tmp_path, flags):
    assert train(store, tmp_path / "straight", *flags, "--save-every", "2", "--keep-last", "0", steps=4) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    cut_back(tmp_path / "run", 2)
    assert train(store, tmp_path / "run", *flags, "--save-every", "2", "--keep-last", "0", steps=4) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "run", 4)
    for name in ("validation_loss", "validation_loss_ema"):
        values = [[line.get(name) for line in lines(tmp_path / run)] for run in ("straight", "run")]
        assert values[0] == values[1]


def test_accumulation_changes_nothing_but_rounding(store, straight, tmp_path):
    assert train(store, tmp_path / "run", *SETTINGS, "--grad-accumulation", "4", steps=STEPS) == 0
    assert_close_histories(history(straight), history(tmp_path / "run"))


@pytest.mark.parametrize(
    "damage", ["flip a bit of the weights", "cut the optimizer short", "lose the averages", "lose the list"]
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_with_a_clear_line(
    store, straight, tmp_path, capsys, damage
):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    cut_back(run, 6)
    newest = run / "checkpoints" / "step-0000006"
    if damage == "flip a bit of the weights":
        data = bytearray((newest / "model.safetensors").read_bytes())
        data[-100] ^= 1
        (newest / "model.safetensors").write_bytes(data)
    elif damage == "cut the optimizer short":
        optimizer = newest / "state" / "optimizer.safetensors"
        optimizer.write_bytes(optimizer.read_bytes()[:-1])
    else:
        (newest / ("ema.safetensors" if damage == "lose the averages" else "state/files.json")).unlink()
    assert train(store, run, *SETTINGS, steps=8) == 0
    spoken = capsys.readouterr().err
    assert "step-0000006 is damaged: " in spoken and "set aside as damaged-step-0000006" in spoken
    assert "going on after step 3" in spoken
    assert history(run) == history(straight)[:8]
    assert checkpoints(run) == ["damaged-step-0000006", "step-0000003", "step-0000006", "step-0000008"]


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew_and_nothing_moved(store, straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    cut_back(run, 3)
    weights = run / "checkpoints" / "step-0000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = history(run)
    assert train(store, run, *SETTINGS, steps=STEPS) == 2
    spoken = capsys.readouterr().err
    assert "step-0000003 is damaged: model.safetensors has" in spoken and "--overwrite" in spoken
    assert checkpoints(run) == ["step-0000003"] and history(run) == before


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(
    store, straight, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    shutil.copytree(straight, run)

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pipeline.checkpoint.folder.sha256_of", refused)
    assert train(store, run, *SETTINGS, steps=STEPS + 1) == 2
    assert "cannot be used (Permission denied)" in capsys.readouterr().err
    assert checkpoints(run) == checkpoints(straight)


def test_a_line_whose_time_had_come_stays_when_the_interval_changes(store, tmp_path):
    assert train(store, tmp_path / "run", "--log-every", "1", steps=7) == 0
    assert train(store, tmp_path / "run", "--log-every", "5", steps=11) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7, 10, 11]


def test_a_changed_setting_is_refused_and_others_may_change(store, straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    assert train(store, run, *SETTINGS, "--lr", "2e-4", "--model", "DiT-S/2", steps=STEPS) == 2
    spoken = capsys.readouterr().err
    assert "--model was DiT-Ti/2 and is now DiT-S/2; --lr was 0.0001 and is now 0.0002" in spoken
    assert train(store, run, *SETTINGS, "--save-every", "5", "--log-every", "2", steps=STEPS + 1) == 0


@pytest.mark.slow
def test_many_kills_at_random_moments(store, straight, tmp_path):
    for round_ in range(12):
        run = tmp_path / f"run-{round_}"
        for _ in range(random.randrange(1, 4)):
            killed(store, run, random.randrange(1, STEPS - 2), *SETTINGS)
        assert train(store, run, *SETTINGS, steps=STEPS) == 0
        assert_same_run(straight, run, STEPS)


@pytest.mark.slow
def test_a_checkpoint_at_every_step_leads_to_the_same_end(store, straight, tmp_path):
    every = [flag if flag != "3" else "1" for flag in SETTINGS]
    assert train(store, tmp_path / "all", *every, steps=STEPS) == 0
    for step in range(1, STEPS):
        run = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "all", run)
        cut_back(run, step)
        assert train(store, run, *every, steps=STEPS) == 0
        assert_same_run(straight, run, STEPS)
        shutil.rmtree(run)


@pytest.mark.slow
def test_two_processes_killed_at_random_moments_come_back_to_the_bit(store, tmp_path):
    settings = ["--save-every", "2", "--keep-last", "0"]
    result = launch(store, tmp_path / "straight", *settings, steps=STEPS)
    assert result.returncode == 0, result.stderr
    for round_ in range(3):
        run = tmp_path / f"run-{round_}"
        for after_step in sorted(random.sample(range(1, STEPS - 2), 1 + round_ % 2)):
            with running(torchrun(store, run, *settings, steps=STEPS)) as process:
                kill_after(process, run, after_step)
        assert launch(store, run, *settings, steps=STEPS).returncode == 0
        assert_same_run(tmp_path / "straight", run, STEPS)


def test_lines_past_the_checkpoint_and_a_line_cut_short_are_dropped(store, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    cut_back(run, 12)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 99, "loss": 1.0}) + '\n{"step": 10')
    assert train(store, run, *SETTINGS, steps=STEPS) == 0
    assert_same_run(straight, run, STEPS)
