import re
import resource

from pipeline.checkpoint import read_checkpoint
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
