"""Power-function averages: tracked, kept as snapshots, and made afterwards of what was kept."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint import read_checkpoint
from pipeline.checkpoint.snapshots import snapshots, write_average
from pipeline.convert.options import ConvertOptions
from pipeline.convert.run import convert
from pipeline.runtime.errors import UserError
from tests.train.runs import assert_same_run, launch, make_store, poison, train
from train.kept_checkpoints import discard_after

FLAGS = ["--ema-sigma", "0.05,0.10", "--ema-snapshot-every", "2", "--save-every", "4", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def kept(store, tmp_path_factory):
    """A run of 12 steps with snapshots of two averages; learning so fast that weights move far."""
    run = tmp_path_factory.mktemp("kept") / "run"
    assert train(store, run, *FLAGS, "--keep-last", "1") == 0
    return run


@pytest.fixture(scope="module")
def direct(store, tmp_path_factory):
    """The same run with the average of width 0.08 tracked in it."""
    run = tmp_path_factory.mktemp("direct") / "run"
    assert train(store, run, "--ema-sigma", "0.08", "--ema-snapshot-every", "0", *FLAGS[4:]) == 0
    return run


def bytes_of(run):
    return {path.name: path.read_bytes() for path in sorted((run / "averages").iterdir())}


def off_by(found, wanted):
    difference = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return (difference / sum(float(tensor.double().square().sum()) for tensor in wanted.values())) ** 0.5


def test_snapshots_are_half_precision_with_a_record_each_and_outlive_their_checkpoints(kept):
    assert [(one.step, one.sigma) for one in snapshots(kept)] == [(n, s) for n in range(2, 13, 2) for s in (0.05, 0.1)]
    assert len(list((kept / "checkpoints").iterdir())) == 1
    path = kept / "averages" / "step-0000012-sigma-0.05.safetensors"
    tensors, tracked = load_file(path), load_file(kept / "checkpoints" / "step-0000012" / "ema-sigma-0.05.safetensors")
    assert all(torch.equal(tensors[name], tracked[name].half()) for name in tracked)
    record = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert (record["format"], record["version"], record["step"], record["sigma"]) == ("dit-average", 1, 12, 0.05)
    assert record["bytes"] == path.stat().st_size and len(record["sha256"]) == 64
    assert len(list((kept / "averages").iterdir())) == 24


def test_what_the_snapshots_will_take_is_told(store, tmp_path, capsys):
    assert train(store, tmp_path / "run", *FLAGS, "--dry-run") == 0
    said = capsys.readouterr().err
    assert "of widths 0.05, 0.1 every 2 steps" in said
    assert "until step 12, all kept" in said


def test_a_run_that_was_stopped_leaves_the_same_bytes(store, kept, tmp_path):
    for steps in (5, 12):
        assert train(store, tmp_path / "run", *FLAGS, "--keep-last", "1", steps=steps) == 0
    assert_same_run(kept, tmp_path / "run", 12)
    assert bytes_of(kept) == bytes_of(tmp_path / "run")


def test_an_average_made_afterwards_is_the_one_tracked_in_the_same_run(kept, direct, tmp_path):
    wanted = load_file(direct / "checkpoints" / "step-0000012" / "ema-sigma-0.08.safetensors")
    raw = load_file(kept / "checkpoints" / "step-0000012" / "model.safetensors")
    made = read_checkpoint(kept, weights="sigma=0.08").model.state_dict()
    assert off_by(made, wanted) < 1e-3
    assert off_by(raw, wanted) > 0.01
    convert(ConvertOptions(from_=str(kept), to=str(tmp_path / "made"), format="dit", average=0.08))
    written = load_file(tmp_path / "made" / "ema.safetensors")
    assert all(torch.equal(written[name], made[name]) for name in wanted)
    checkpoint = read_checkpoint(tmp_path / "made")
    assert checkpoint.info["training"]["average"] == {"sigma": 0.08, "step": 12, "snapshots": 12}


def test_a_tracked_width_comes_back_as_it_was_and_an_earlier_step_from_the_snapshots_up_to_it(kept, tmp_path):
    tracked = load_file(kept / "checkpoints" / "step-0000012" / "ema-sigma-0.1.safetensors")
    assert off_by(read_checkpoint(kept, weights="sigma=0.1").model.state_dict(), tracked) < 1e-6
    convert(ConvertOptions(from_=str(kept), to=str(tmp_path / "made"), format="dit", average=0.1, at_step=6))
    snapshot = load_file(kept / "averages" / "step-0000006-sigma-0.1.safetensors")
    made = read_checkpoint(tmp_path / "made")
    assert made.info["step"] == 6
    assert off_by(made.model.state_dict(), {name: tensor.float() for name, tensor in snapshot.items()}) < 1e-5


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("sigma=0.3", "must lie above 0 and below 0.289"),
        ("sigma=0.08@7", "has no power-function averages at step 7; it has them at 2, 4, 6, 8, 10, 12"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(kept, weights, message):
    with pytest.raises(UserError, match=message):
        read_checkpoint(kept, weights=weights)


def test_a_run_without_such_averages_says_how_to_get_them(store, tmp_path):
    assert train(store, tmp_path / "run", steps=1) == 0
    assert not (tmp_path / "run" / "averages").exists()
    with pytest.raises(UserError, match=r"keeps no power-function averages .* dit-train --ema-sigma 0.05,0.10"):
        read_checkpoint(tmp_path / "run", weights="sigma=0.08")


def test_a_snapshot_with_another_byte_is_never_used(kept, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(kept, run)
    path = run / "averages" / "step-0000010-sigma-0.1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"step-0000010-sigma-0.1.safetensors has other contents than were written"):
        read_checkpoint(run, weights="sigma=0.08")
    read_checkpoint(run, weights="sigma=0.08", verify=False)
    path.with_name(f"{path.name}.json").unlink()  # without its record it is not there
    assert len(snapshots(run)) == 11


def test_what_was_rolled_back_behind_leaves_no_snapshots(tmp_path):
    for step in (2, 4, 6):
        path = tmp_path / "averages" / f"step-{step:07d}-sigma-0.1.safetensors"
        write_average(path, {"a": torch.ones(2).half()}, step=step, sigma=0.1)
    discard_after(tmp_path, 4)
    assert [one.step for one in snapshots(tmp_path)] == [2, 4]
    assert len(list((tmp_path / "averages").iterdir())) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ema-sigma", "0.05,x"], "must be numbers between commas"),
        (["--ema-sigma", "0.05,0.3"], "lie above 0 and below 0.289"),
        (["--ema-sigma", "0.05,0.05"], "the widths must differ"),
        (["--ema-snapshot-every", "5"], "give that too, as in 0.05,0.10"),
        (["--ema-sigma", "0.05", "--extra-ema", "sigma-0.05=0.9"], "both name ema-sigma-0.05"),
    ],
)
def test_wrong_widths_are_refused_by_their_flag(store, tmp_path, capsys, flags, message):
    assert train(store, tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_copied_or_sharded_keep_the_same_averages(store, kept, tmp_path, sharding):
    made = launch(store, tmp_path / "run", *FLAGS, "--sharding", sharding)
    assert made.returncode == 0, made.stderr
    for one in snapshots(kept):
        other = load_file(tmp_path / "run" / "averages" / one.path.name)
        assert off_by(other, load_file(one.path)) < 2e-3, one.path.name


@pytest.mark.slow
def test_a_run_that_rolls_back_and_one_that_was_stopped_on_the_way_keep_the_same_snapshots(tmp_path, capsys):
    poisoned = make_store(tmp_path / "latents")
    poison(poisoned, [3])
    flags = ["--ema-sigma", "0.1", "--ema-snapshot-every", "1", "--save-every", "2", "--keep-last", "0"]
    flags += ["--max-skipped-in-a-row", "1"]
    assert train(poisoned, tmp_path / "run", *flags) == 0
    back_to = int(re.search(r"back to step (\d+), going on", capsys.readouterr().err)[1])
    for steps in (back_to + 3, 12):
        assert train(poisoned, tmp_path / "again", *flags, steps=steps) == 0
    assert [one.step for one in snapshots(tmp_path / "run")] == list(range(1, 13))
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "again")
