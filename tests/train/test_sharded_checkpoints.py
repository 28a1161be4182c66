"""Checkpoints that all processes write, each a part: the same numbers as one process's files, whole or not at all."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint import find_damage, read_checkpoint
from pipeline.dit import DiT, DiTConfig
from pipeline.dit.macs import count_parameters
from pipeline.inspect.checkpoint import describe_checkpoint
from pipeline.runtime.errors import UserError
from tests.train.runs import (
    ROOT,
    assert_close_histories,
    checkpoints,
    environment,
    history,
    launch,
    tensors,
    torchrun,
    train,
)
from train.checkpointing import cut
from train.options import AverageOptions

STEPS = 6
SETTINGS = ["--save-every", "2", "--keep-last", "0", "--extra-ema", "slow=0.9"]
FSDP = ["--sharding", "fsdp"]
SHARDED = [*SETTINGS, *FSDP, "--sharded-checkpoints"]
INDEXES = ["ema-slow", "ema", "model", "state/optimizer"]


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """Two processes that divide the network, of which the main one writes whole files."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = launch(store, run, *SETTINGS, *FSDP, steps=STEPS)
    assert result.returncode == 0, result.stderr
    return run


@pytest.fixture(scope="module")
def sharded(store, tmp_path_factory):
    """The same, each writing its part."""
    run = tmp_path_factory.mktemp("sharded") / "run"
    result = launch(store, run, *SHARDED, steps=STEPS)
    assert result.returncode == 0, result.stderr
    return run


def folder_of(run, step):
    return run / "checkpoints" / f"step-{step:07d}"


def joined(run, step):
    """As `tensors`, put together by the indexes."""
    folder, found = folder_of(run, step), {}
    for name in INDEXES:
        index = json.loads((folder / f"{name}.safetensors.index.json").read_text())
        files = {file: load_file((folder / name).with_name(file)) for file in {*index["weight_map"].values()}}
        assert sum(map(len, files.values())) == len(index["weight_map"])
        of_all = {tensor: files[file][tensor] for tensor, file in index["weight_map"].items()}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in of_all.values())
        found |= {f"{name.rpartition('/')[2]}/{tensor}": value for tensor, value in of_all.items()}
    return found


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert {name for name in one if not torch.equal(one[name], other[name])} == set()


@pytest.mark.slow
def test_the_shards_of_two_processes_hold_the_bits_of_one_processs_files_and_each_about_half(whole, sharded):
    assert history(whole) == history(sharded)
    for step in (2, 4, 6):
        assert_equal(tensors(whole, step), joined(sharded, step))
        folder = folder_of(sharded, step)
        assert find_damage(folder) is None
        for name in INDEXES:
            sizes = [path.stat().st_size for path in sorted(folder.glob(f"{name}-00*-of-00002.safetensors"))]
            assert len(sizes) == 2 and 0.8 < sizes[0] / sizes[1] < 1.25
            assert not (folder / f"{name}.safetensors").exists()
        recorded = json.loads((folder / "state/files.json").read_text())["files"]
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert there == {*recorded, "state/files.json"}


@pytest.mark.slow
def test_the_same_processes_resume_from_shards_to_the_bit(store, sharded, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(sharded, run)
    shutil.rmtree(folder_of(run, 6))
    assert launch(store, run, *SHARDED, steps=STEPS).returncode == 0
    assert_equal(joined(sharded, 6), joined(run, 6))
    assert history(run) == history(sharded)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_another_number_of_processes_goes_on_from_shards(store, sharded, tmp_path, processes):
    run = tmp_path / "run"
    shutil.copytree(sharded, run)
    shutil.rmtree(folder_of(run, 6))
    if processes == 1:
        assert train(store, run, *SETTINGS, steps=STEPS) == 0
    else:
        flags = [*SETTINGS, "--sharding", "hsdp", "--shard-processes", "2", "--sharded-checkpoints"]
        result = launch(store, run, *flags, processes=4, steps=STEPS)
        assert result.returncode == 0, result.stderr
        assert len(list(folder_of(run, 6).glob("model-0000?-of-00004.safetensors"))) == 4
    assert_close_histories(history(sharded), history(run))


@pytest.mark.slow
def test_copies_that_are_divided_write_one_set_of_shards_with_the_bits_of_whole_files(store, tmp_path):
    flags = [*SETTINGS, "--sharding", "hsdp", "--shard-processes", "2", "--optimizer", "muon"]
    for name, more in (("whole", []), ("sharded", ["--sharded-checkpoints"])):
        result = launch(store, tmp_path / name, *flags, *more, processes=4, steps=2)
        assert result.returncode == 0, result.stderr
    assert_equal(tensors(tmp_path / "whole", 2), joined(tmp_path / "sharded", 2))


@pytest.mark.slow
def test_readers_of_checkpoints_take_a_run_in_shards(whole, sharded):
    for weights in ("raw", "ema", "slow"):
        one, other = (read_checkpoint(run, weights=weights).model.state_dict() for run in (whole, sharded))
        assert_equal(one, other)
    said = describe_checkpoint(str(sharded), verify=True)
    assert sum("in 2 shards" in line for line in said) == 3 and said[-1].startswith("verified: ")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_a_checkpoint_with_a_bad_shard_is_set_aside_for_the_one_before_it(store, sharded, tmp_path, capsys, damage):
    run = tmp_path / "run"
    shutil.copytree(sharded, run)
    shard = folder_of(run, 6) / "state/optimizer-00002-of-00002.safetensors"
    content = shard.read_bytes()
    changed = {"cut": content[:-7], "flipped": content[:-1] + bytes([content[-1] ^ 1])}
    shard.unlink() if damage == "lost" else shard.write_bytes(changed[damage])
    assert train(store, run, *SETTINGS, steps=STEPS) == 0
    assert "optimizer-00002-of-00002.safetensors" in capsys.readouterr().err
    assert checkpoints(run) == ["damaged-step-0000006", "step-0000002", "step-0000004", "step-0000006"]
    assert_close_histories(history(sharded), history(run))


@pytest.mark.slow
def test_shards_go_to_the_mirror_and_an_empty_machine_goes_on_from_there_to_the_same_bits(store, sharded, tmp_path):
    run, flags = tmp_path / "run", [*SHARDED, "--mirror", f"file://{tmp_path / 'far'}"]
    assert launch(store, run, *flags, steps=4).returncode == 0
    shutil.rmtree(run)
    result = launch(store, run, *flags, steps=STEPS)
    assert result.returncode == 0 and "going on from" in result.stderr, result.stderr
    assert_equal(joined(sharded, 6), joined(run, 6))
    assert find_damage(tmp_path / "far/checkpoints/step-0000006") is None


DISTURBED = """
import os, resource, signal, sys

rank, what = int(sys.argv.pop(1)), sys.argv.pop(1)
from train import checkpointing
from train.__main__ import main

steady = {name: getattr(checkpointing, name) for name in ("write_shards", "write_beside_shards", "publish_folder")}

def at_step_4(name, *given):
    if int(os.environ["RANK"]) != rank or "step-0000004" not in str(given[0]):
        return steady[name](*given)
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return steady[name](*given)
    made = steady[name](*given) if name == "write_shards" else None
    os.kill(os.getpid(), signal.SIGKILL)

if what == "full" or rank:
    disturbed = ["write_shards"]
else:
    disturbed = [what]
for name in disturbed:
    setattr(checkpointing, name, lambda *given, name=name: at_step_4(name, *given))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(main())
"""


def disturbed(store, run, tmp_path, rank, what):
    (tmp_path / "disturbed.py").write_text(DISTURBED)
    words = torchrun(store, run, *SHARDED, steps=STEPS)
    at = words.index("--module")
    words[at : at + 2] = [str(tmp_path / "disturbed.py"), str(rank), what]
    return subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "what"), [(0, "write_shards"), (1, "write_shards"), (0, "write_beside_shards"), (0, "publish_folder")]
)
def test_a_process_killed_while_it_saves_leaves_no_half_checkpoint_and_the_run_goes_on(
    store, sharded, tmp_path, rank, what
):
    run = tmp_path / "run"
    assert disturbed(store, run, tmp_path, rank, what).returncode != 0
    left = [name for name in checkpoints(run) if not name.startswith(".")]
    assert left == ["step-0000002"] and find_damage(folder_of(run, 2)) is None
    assert launch(store, run, *SHARDED, steps=STEPS).returncode == 0
    assert checkpoints(run) == ["step-0000002", "step-0000004", "step-0000006"]  # and nothing hidden
    assert_equal(joined(sharded, 6), joined(run, 6))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_whose_disk_is_full_ends_all_with_a_sentence_and_no_checkpoint(store, tmp_path, rank):
    run = tmp_path / "run"
    result = disturbed(store, run, tmp_path, rank, "full")
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if re.match(r"dit-train \(process \d of 2\): error:", line)]
    assert sum(line.startswith(f"dit-train (process {rank} of 2): error: cannot write") for line in said) == 1, said
    assert "checkpointing.py" not in result.stderr  # as a traceback would name it
    assert checkpoints(run) == ["step-0000002"]


def test_one_process_writes_whole_files_whatever_is_asked(store, tmp_path):
    for name, more in (("plain", []), ("asked", ["--sharded-checkpoints"])):
        assert train(store, tmp_path / name, *more, steps=2) == 0
    one, other = (folder_of(tmp_path / name, 2) for name in ("plain", "asked"))
    for path in (path for path in one.glob("*.safetensors")):
        assert path.read_bytes() == (other / path.name).read_bytes()


@pytest.mark.parametrize("parts", [1, 2, 5, 64])
def test_a_network_is_cut_in_order_and_evenly_into_parts_of_which_none_is_empty(parts):
    shapes = {f"{number}": (number % 7 + 1, 10) for number in range(100)}
    found = cut(shapes, parts)
    assert [name for names in found for name in names] == list(shapes)
    sizes = [sum(shapes[name][0] * 10 for name in names) for names in found]
    assert min(sizes) > 0 and max(sizes) <= sum(sizes) / parts + 70
    assert [len(names) for names in cut({"a": (3,), "b": (3,)}, 5)] == [1, 1]


def test_an_average_cannot_be_named_like_a_shard():
    with pytest.raises(UserError, match="is no plain file name"):
        _ = AverageOptions(extra_ema=("x-00001-of-00002=0.9",)).decays


MEASURED = """
import os, sys
from pathlib import Path
from train import run
from train.__main__ import main
from train.distributed import peak_resident_bytes

folder, steady = Path(sys.argv.pop(1)), run.run_steps

def noted(trainer, stop):
    (folder / f"start-{os.environ['RANK']}").write_text(str(peak_resident_bytes()))
    return steady(trainer, stop)

run.run_steps = noted
status = main()
(folder / f"end-{os.environ['RANK']}").write_text(str(peak_resident_bytes()))
sys.exit(status)
"""


def peaks(store, folder, *flags, processes=4, **sizes):
    """The most memory that each process held, [before the first step, at all], in MB."""
    folder.mkdir()
    (folder / "measured.py").write_text(MEASURED)
    words = torchrun(store, folder / "run", *flags, processes=processes, steps=1, **sizes)
    at = words.index("--module")
    words[at : at + 2] = [str(folder / "measured.py"), str(folder)]
    result = subprocess.run(
        words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stderr
    return {
        when: [int((folder / f"{when}-{rank}").read_text()) / 1e6 for rank in range(processes)]
        for when in ("start", "end")
    }


@pytest.mark.slow
def test_no_process_ever_holds_the_whole_of_a_divided_network_neither_at_the_start_nor_to_save_it(store, tmp_path):
    """Beyond what a tiny network takes; run with -s for the figures of docs/scaling.md."""
    network = ["--model", "DiT-B/2", "--batch-size", "4"]
    weights = 4e-6 * count_parameters(DiTConfig.from_preset("DiT-B/2", input_size=8, num_classes=4))
    tiny = peaks(store, tmp_path / "tiny", *FSDP, "--sharded-checkpoints")
    found = {}
    for name, more in (("whole", []), ("sharded", ["--sharded-checkpoints"])):
        taken = peaks(store, tmp_path / name, *network, *FSDP, *more, depth=None)
        found[name] = {
            when: [peak - least for peak, least in zip(taken[when], tiny[when], strict=True)] for when in taken
        }
        print(name, {when: [round(peak) for peak in of_all] for when, of_all in found[name].items()}, round(weights))
        assert max(found[name]["start"]) < 1.1 * 2 / 4 * weights  # weights and average, of which each has a quarter
    assert (
        max(found["sharded"]["end"]) < 1.15 * (5 + 4) / 4 * weights
    )  # moments, gradients, and a copy of all but those
    assert max(found["whole"]["end"]) > 4 * weights


@pytest.mark.slow
def test_a_divided_network_begins_with_the_weights_of_a_whole_one_to_the_bit(store, tmp_path):
    flags = ["--lr", "0", "--blocks", "modern", "--sharding", "hsdp", "--shard-processes", "2", "--seed", "5"]
    result = launch(store, tmp_path / "run", *flags, processes=4, steps=1)
    assert result.returncode == 0, result.stderr
    checkpoint = read_checkpoint(tmp_path / "run", weights="raw")
    assert_equal(checkpoint.model.state_dict(), DiT(checkpoint.config, seed=5).state_dict())
