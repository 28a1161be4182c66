"""Fine-tuning: weights from another checkpoint, as far as they fit."""

import pytest
import torch

from tests.train.runs import VAE, lines, make_store, tensors, train


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    assert train(store, run, "--lr", "1e-2", "--ema-decay", "0.5", steps=4) == 0
    return run


def test_the_same_network_starts_from_the_averaged_weights(store, trained, tmp_path, capsys):
    flags = ["--init-from", str(trained), "--lr", "0"]
    assert train(store, tmp_path / "run", *flags, steps=1) == 0
    assert "tensors copied as they are" in capsys.readouterr().err
    source, start = tensors(trained, 4), tensors(tmp_path / "run", 1)
    names = [name.removeprefix("model/") for name in start if name.startswith("model/")]
    assert all(torch.equal(start[f"model/{name}"], source[f"ema/{name}"]) for name in names)


def test_raw_weights_on_request(store, trained, tmp_path):
    assert (
        train(store, tmp_path / "run", "--init-from", str(trained), "--init-weights", "raw", "--lr", "0", steps=1) == 0
    )
    source, start = tensors(trained, 4), tensors(tmp_path / "run", 1)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(start[f"model/{name}"], source[f"model/{name}"])
    assert not torch.equal(start[f"model/{name}"], source[f"ema/{name}"])


def test_other_classes_another_grid_and_other_channels_are_adapted_and_reported(trained, tmp_path, capsys):
    folder = make_store(tmp_path / "latents", classes=7, shape=(6, 4, 12))
    assert train(folder, tmp_path / "run", "--init-from", str(trained), steps=2) == 0
    spoken = capsys.readouterr().err
    for part in ("adapted", "y_embedder.embedding_table.weight", "x_embedder.proj.weight", "pos_embed"):
        assert part in spoken


def test_going_on_with_a_fine_tuning_run_needs_its_start_no_more(store, trained, tmp_path):
    assert train(store, tmp_path / "run", "--init-from", str(trained), steps=2) == 0
    assert train(store, tmp_path / "run", "--init-from", str(tmp_path / "gone"), steps=3) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "7" * 64}, f"its sha256 is {'5' * 64} and the store's is {'7' * 64}"),
        ({"scaling_factor": 0.75}, "its scaling_factor is 0.5 and the store's is 0.75"),
        ({"shift_factor": 0.1}, "its shift_factor is None and the store's is 0.1"),
    ],
)
def test_latents_of_another_vae_or_scaling_are_refused_unless_a_flag_allows_them(
    trained, tmp_path, capsys, change, message
):
    folder = make_store(tmp_path / "latents", vae=VAE | change)
    flags = ["--init-from", str(trained)]
    assert train(folder, tmp_path / "run", *flags, steps=1) == 2
    spoken = capsys.readouterr().err
    assert message in spoken and "--allow-other-vae" in spoken
    assert train(folder, tmp_path / "run", *flags, "--allow-other-vae", steps=1) == 0


def test_a_fingerprint_that_was_not_recorded_is_not_compared(trained, tmp_path, capsys):
    folder = make_store(tmp_path / "latents", vae=VAE | {"sha256": None})
    assert train(folder, tmp_path / "run", "--init-from", str(trained), steps=1) == 0
    assert "fingerprint not recorded" in capsys.readouterr().err


def test_a_network_of_another_width_is_refused(store, trained, tmp_path, capsys):
    assert train(store, tmp_path / "run", "--init-from", str(trained), "--model", "DiT-S/2", steps=1) == 2
    assert "choose a --model of the same width or another --init-from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
