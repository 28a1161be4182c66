"""One clear sentence for every mistake, status 2, and nothing written."""

import subprocess
import sys

import pytest

from tests.train.runs import ROOT, command, fork, make_store, train
from train.__main__ import main
from train.data import check_labels


def refused(capsys, status):
    assert status == 2
    spoken = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in spoken if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in "".join(spoken)
    return errors[0]


def test_an_unfinished_store(tmp_path, capsys):
    folder = make_store(tmp_path / "latents")
    (folder / "manifest.json").unlink()
    assert "is not finished" in refused(capsys, train(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_no_store_at_all(tmp_path, capsys):
    assert "there is no latent store" in refused(capsys, train(tmp_path / "nowhere", tmp_path / "run"))


def test_a_shard_with_a_wrong_hash_is_found_on_request(tmp_path, capsys):
    folder = make_store(tmp_path / "latents")
    shard = folder / "train-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3000] ^= 1
    shard.write_bytes(data)
    message = refused(capsys, train(folder, tmp_path / "run", "--verify-data"))
    assert "train-00001.safetensors" in message and "damaged" in message


def test_labels_outside_the_class_list(tmp_path, capsys):
    folder = make_store(tmp_path / "latents", labels=[0, 1, 2, 9] * 5, samples=20)
    message = refused(capsys, train(folder, tmp_path / "run"))
    assert "a sample with label 9, but its manifest lists 4 classes, 0 … 3" in message
    check_labels(make_array(-1), 0, "an unlabelled store")


def make_array(value):
    import numpy as np

    return np.full(3, value, dtype=np.int64)


def test_a_grid_that_does_not_divide_by_the_patch(tmp_path, capsys):
    folder = make_store(tmp_path / "latents", shape=(4, 9, 8))
    message = refused(capsys, train(folder, tmp_path / "run"))
    assert "9×8 cells does not divide into patches of 2×2" in message and "--image-size" in message


def test_an_unknown_model_names_the_nearest(store, tmp_path, capsys):
    message = refused(capsys, train(store, tmp_path / "run", "--model", "DiT-XL2"))
    assert "--model DiT-XL2 does not exist; did you mean DiT-XL/2?" in message


def test_an_unknown_flag_names_the_nearest(store, tmp_path, capsys):
    assert "did you mean --batch-size?" in refused(capsys, train(store, tmp_path / "run", "--batchsize", "3"))


def test_an_unknown_key_of_a_file_names_the_nearest(store, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("leraning-rate: 1\n")
    flags = ["--latents", str(store), "--out", str(tmp_path / "run"), "--config", str(tmp_path / "c.yaml")]
    assert "unknown key 'leraning-rate'" in refused(capsys, main(flags))


def test_a_preset_that_does_not_exist_names_those_that_do(store, tmp_path, capsys):
    flags = ["--latents", str(store), "--out", str(tmp_path / "run"), "--config", "paper-1024"]
    assert "paper-256, paper-512, small-data" in refused(capsys, main(flags))


def test_a_batch_that_does_not_divide(store, tmp_path, capsys):
    message = refused(capsys, train(store, tmp_path / "run", "--batch-size", "8", "--grad-accumulation", "3"))
    assert "use 6 or 9" in message


def test_an_output_folder_with_other_contents(store, tmp_path, capsys):
    (tmp_path / "holiday.jpg").write_text("x")
    assert "holds no run" in refused(capsys, train(store, tmp_path))
    assert (tmp_path / "holiday.jpg").read_text() == "x" and not (tmp_path / "checkpoints").exists()


def test_a_validation_store_of_another_vae(store, tmp_path, capsys):
    from tests.train.runs import VAE

    other = make_store(tmp_path / "other", vae=VAE | {"sha256": "6" * 64}, classes=3)
    message = refused(capsys, train(store, tmp_path / "run", "--validation", str(other)))
    assert "they differ in the VAE's sha256, the classes" in message


def test_too_little_memory_says_what_to_lower(store, tmp_path):
    """A real process whose address space ends just where a batch would begin."""
    limited = "import resource, torch; from train.run import train; "
    limited += "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
    limited += "resource.setrlimit(resource.RLIMIT_AS, (used + 700_000_000,) * 2)"
    flags = command(store, tmp_path / "run", "--batch-size", "4096", "--prefetch", "1", depth=None)[2:]
    with fork(*flags, before=limited) as process:
        said = process.communicate()[1]
    assert process.returncode == 2, said
    assert "memory ran out on cpu with DiT-Ti/2 and 4096 samples per process at a time" in said
    assert "raise --grad-accumulation (now 1)" in said and "lower --batch-size" in said


def test_help_is_quick_and_names_every_default():
    words = [sys.executable, "-X", "importtime", "-m", "train", "--help"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "| torch\n" not in result.stderr
    for flag in ("--latents", "--out", "--model", "--grad-accumulation", "--time-limit", "--init-from", "--sharding"):
        assert flag in result.stdout


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        pytest.param(
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"PMI_SIZE": "2", "PMI_RANK": "0"}, marks=pytest.mark.slow),
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_a_process_that_was_started_with_others_and_finds_none_refuses(store, tmp_path, variables):
    with fork(*command(store, tmp_path / "run", steps=2)[2:], **variables) as process:
        said = process.communicate()[1]
    assert process.returncode == 2
    assert "the launcher started 2 processes" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_more_preview_steps_than_the_process_has_are_told_under_their_own_flag(tmp_path, capsys):
    store = make_store(tmp_path / "store")
    assert train(store, tmp_path / "run", "--sample-every", "1", "--preview-steps", "1001", steps=1) == 2
    assert "--preview-steps 1001 must be at most 1000" in capsys.readouterr().err
