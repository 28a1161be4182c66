import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from pipeline.runtime.errors import UserError
from train.options import DataOptions, ModelOptions, OptimizerOptions, RunOptions, TrainOptions
from train.run_folder import MetricsFile, begin_run, check_run, claimed, drop_replaced


def options(out, *, seed=0, steps=10, overwrite=False, **data):
    return TrainOptions(
        data=DataOptions(latents="store", seed=seed, **data),
        run=RunOptions(out=out, overwrite=overwrite),
        optimizer=OptimizerOptions(steps=steps),
    )


def open_run(options, data_identity):
    with claimed(options.run.out):
        check_run(options, data_identity)
        begin_run(options, data_identity)


def test_the_resolved_options_are_written_and_can_be_read_as_flags(tmp_path):
    open_run(options(tmp_path / "run"), "abc")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["latents"] == "store" and saved["seed"] == 0 and saved["out"] == str(tmp_path / "run")


def test_a_setting_that_would_alter_the_run_is_refused_with_the_difference(tmp_path):
    open_run(options(tmp_path), "abc")
    MetricsFile(tmp_path, after_step=0).append({"step": 1})
    with pytest.raises(
        UserError, match="--seed was 0 and is now 1; .*--flip was True and is now False|--flip was True.*--seed was 0"
    ):
        open_run(options(tmp_path, seed=1, flip=False), "abc")
    with pytest.raises(UserError, match="the data of --latents was store and is now other data"):
        open_run(options(tmp_path), "def")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 0


def test_a_run_that_began_before_a_flag_existed_counts_as_having_its_default(tmp_path):
    open_run(options(tmp_path), "abc")
    MetricsFile(tmp_path, after_step=0).append({"step": 1})
    path = tmp_path / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("decay-start")))
    falling = OptimizerOptions(steps=10, lr_schedule="linear", decay_steps=9, decay_start=3)
    with pytest.raises(UserError, match="--decay-start was None and is now 3"):
        open_run(dataclasses.replace(options(tmp_path), optimizer=falling), "abc")
    open_run(options(tmp_path), "abc")


def test_a_run_that_has_learned_nothing_may_begin_with_other_settings(tmp_path):
    """As after memory ran out in the first step, and --batch-size was lowered."""
    open_run(options(tmp_path, seed=5), "abc")
    open_run(options(tmp_path, seed=6), "def")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 6


def test_where_the_weights_start_may_change_only_once_there_is_a_checkpoint(tmp_path):
    begun = dataclasses.replace(options(tmp_path), model=ModelOptions(init_from="there"))
    open_run(begun, "abc")
    MetricsFile(tmp_path, after_step=0).append({"step": 1})
    with pytest.raises(UserError, match="--init-from was there and is now None"):
        open_run(options(tmp_path), "abc")
    saved = tmp_path / "checkpoints" / "step-0000001"
    saved.mkdir()
    (saved / "config.json").write_text("{}")
    open_run(options(tmp_path), "abc")


def test_what_a_kill_leaves_at_the_beginning_is_known_for_a_run_that_begins(tmp_path):
    (tmp_path / ".config.yaml.123.partial").write_text("half")
    open_run(options(tmp_path), "abc")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "config.yaml"]


def test_a_kill_during_overwrite_leaves_what_overwrite_goes_on_with(tmp_path, monkeypatch):
    open_run(options(tmp_path), "abc")
    MetricsFile(tmp_path, after_step=0).append({"step": 1})

    def killed(*_):
        raise KeyboardInterrupt

    for name in ("write_bytes", "make_folder"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"train.run_folder.{name}", killed)
            begin_run(options(tmp_path, seed=1, overwrite=True), "abc")
        check_run(options(tmp_path, seed=1, overwrite=True), "abc")
    open_run(options(tmp_path, seed=1, overwrite=True), "abc")


def test_nothing_of_the_users_goes_when_a_run_is_refused(tmp_path):
    (tmp_path / ".lock").write_text("precious")
    with pytest.raises(UserError, match="mended elsewhere"), claimed(tmp_path):
        raise UserError("mended elsewhere")
    assert (tmp_path / ".lock").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="mended elsewhere"), claimed(tmp_path / "empty"):
        raise UserError("mended elsewhere")
    assert (tmp_path / "empty").is_dir()


def test_settings_that_leave_the_past_alone_may_change(tmp_path):
    open_run(options(tmp_path), "abc")
    changed = dataclasses.replace(options(tmp_path, steps=20), data=DataOptions(latents="moved", prefetch=2))
    open_run(changed, "abc")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["steps"] == 20


def test_a_folder_with_other_contents_is_refused_and_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"is not empty and holds no run \(no config.yaml, but holiday.jpg\)"):
            open_run(options(tmp_path, overwrite=overwrite), "abc")
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="is a file, but a run needs a folder"):
        open_run(options(tmp_path / "run"), "abc")


def test_overwrite_removes_the_run_that_was_there(tmp_path):
    open_run(options(tmp_path), "abc")
    (tmp_path / "checkpoints" / "step-0000001").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    open_run(options(tmp_path, seed=5, overwrite=True), "abc")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (saved["seed"], saved["overwrite"]) == (5, False)
    assert not list((tmp_path / "checkpoints").iterdir()) and not (tmp_path / "metrics.jsonl").exists()


def test_a_run_is_held_by_one_process_at_a_time(tmp_path):
    with claimed(tmp_path), pytest.raises(UserError, match="another process is training in"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


def test_a_refused_run_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="mended elsewhere"), claimed(tmp_path / "a" / "run"):
        raise UserError("mended elsewhere")
    assert list((tmp_path / "a").iterdir()) == []


def test_metrics_past_a_step_and_torn_lines_are_dropped(tmp_path):
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_bytes(("\n".join(lines) + '\n{"step": 25, "lo').encode() + b"\xff\xfe")
    metrics = MetricsFile(tmp_path, after_step=20)
    metrics.append({"step": 21, "loss": None})
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 21]


@pytest.mark.parametrize("at", range(1, 6))
def test_a_kill_while_a_run_is_set_aside_is_undone_by_the_next_command(tmp_path, monkeypatch, at):
    """Killed before each rename: as long as the new settings do not stand, the old run is the run, and whole."""
    open_run(options(tmp_path), "abc")
    MetricsFile(tmp_path, after_step=0).append({"step": 1})
    for name in ("checkpoints/step-0000001", "samples", "tensorboard"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoints/step-0000001/config.json").write_text("{}")
    before = contents(tmp_path)
    rename, calls = type(tmp_path).rename, []

    def killed(path, target):
        calls.append(path)
        if len(calls) == at:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), claimed(tmp_path):
        patch.setattr(type(tmp_path), "rename", killed)
        begin_run(options(tmp_path, seed=1, overwrite=True), "abc")
    with claimed(tmp_path):
        check_run(options(tmp_path), "abc")
    assert contents(tmp_path) == before


def test_a_kill_before_the_new_settings_stand_brings_the_old_run_back_and_after_it_the_new_one_stays(
    tmp_path, monkeypatch
):
    open_run(options(tmp_path), "abc")
    MetricsFile(tmp_path, after_step=0).append({"step": 1})
    before = contents(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), claimed(tmp_path):
        patch.setattr("train.run_folder.write_bytes", killed)
        begin_run(options(tmp_path, seed=1, overwrite=True), "abc")
    assert not (tmp_path / "config.yaml").exists()
    with claimed(tmp_path):
        assert contents(tmp_path) == before
    open_run(options(tmp_path, seed=1, overwrite=True), "abc")
    open_run(options(tmp_path, seed=1), "abc")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1
    assert yaml.safe_load((tmp_path / ".replaced" / "config.yaml").read_text())["seed"] == 0
    drop_replaced(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name in {".replaced", ".leaving"}]


def contents(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_text() for path in folder.rglob("*")}


def test_lines_are_flushed_to_the_disk_when_that_is_asked_for(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        "os.fsync", lambda descriptor: flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    )
    metrics = MetricsFile(tmp_path, after_step=0)
    metrics.append({"step": 1})
    assert flushed == []
    metrics.flush()
    assert flushed == [str(tmp_path / "metrics.jsonl")]


def test_a_moved_runs_own_settings_go_on_with_it_where_it_lies(tmp_path, monkeypatch, capsys):
    """Its config.yaml names the old place; a run must not begin anew there in silence."""
    from tests.train.runs import make_store, train
    from train.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert train(make_store(tmp_path / "store"), "old", steps=1) == 0
    (tmp_path / "old").rename(tmp_path / "new")
    assert main(["--config", "new/config.yaml", "--steps", "2"]) == 0
    assert "new/config.yaml is the settings of a run that was at old" in capsys.readouterr().err
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "new/checkpoints/step-0000002").is_dir()
    assert main(["--config", "new/config.yaml", "--out", "third", "--steps", "1"]) == 0
    assert (tmp_path / "third/checkpoints/step-0000001").is_dir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/config.yaml").write_text((tmp_path / "new/config.yaml").read_text())
    assert main(["--config", "elsewhere/config.yaml", "--steps", "2"]) == 0  # a copy of the settings alone
    assert "going on with the one" not in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "elsewhere/checkpoints").exists()
