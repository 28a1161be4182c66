"""Guidance by another network: `--guide CHECKPOINT[@WEIGHTS]`."""

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from pipeline.diffusion import GaussianDiffusion, RectifiedFlow
from sample.guide import split_weights

FEW = ("--num-samples", 3, "--batch-size", 3)


def latents(path):
    return load_file(path)["latents"].numpy()


def made(command, path, *arguments, **settings):
    status, said = command("--out", path, *FEW, *arguments, vae=None, **settings)
    assert status == 0, said
    return latents(path)


@pytest.fixture(scope="module")
def other(make_checkpoint):
    """A narrower, shallower network for the same latents and classes."""
    return make_checkpoint("other", hidden_size=16, depth=1, num_heads=2, averages=("ema", "ema-0.5"))


@pytest.mark.parametrize("scale", [0, 1, 3])
def test_a_checkpoint_guided_by_its_own_weights_makes_what_it_makes_without_guidance(command, tiny, tmp_path, scale):
    plain = made(command, tmp_path / "plain.safetensors", "--guidance", 1)
    itself = made(command, tmp_path / "itself.safetensors", "--guide", tiny, "--guidance", scale)
    assert np.array_equal(plain, itself)


def test_another_network_moves_the_samples_unless_the_scale_is_1(command, tmp_path, other):
    plain = made(command, tmp_path / "plain.safetensors", "--guidance", 1)
    assert np.array_equal(plain, made(command, tmp_path / "1.safetensors", "--guide", other, "--guidance", 1))
    assert not np.array_equal(plain, made(command, tmp_path / "2.safetensors", "--guide", other))


def test_scale_0_makes_what_the_guide_makes_alone_on_the_same_noise(command, tmp_path, other, make_checkpoint):
    flow = make_checkpoint("flow", process=RectifiedFlow(), learn_sigma=False)
    guide = make_checkpoint("flow-guide", process=RectifiedFlow(timestep_law="uniform"), learn_sigma=False, depth=1)
    alone = made(command, tmp_path / "alone.safetensors", "--guidance", 1, checkpoint=guide)
    led = made(command, tmp_path / "led.safetensors", "--guide", guide, "--guidance", 0, checkpoint=flow)
    assert np.array_equal(alone, led)


def test_the_sidecar_records_the_guide_and_its_hash_and_nothing_of_where_it_is(command, tmp_path, other, read_json):
    status, said = command("--out", tmp_path / "a.npz", *FEW, "--guide", f"{other}@0.5")
    assert status == 0
    assert "guidance 2 by the ema-0.5 weights of step 10" in said
    text = (tmp_path / "a.npz.json").read_text()
    guide = read_json(tmp_path / "a.npz.json")["recipe"]["guide"]
    assert (guide["weights"], guide["step"], guide["network"]["depth"]) == ("ema-0.5", 10, 1)
    assert len(guide["sha256"]) == 64
    assert str(other.parent) not in text
    status, said = command("--out", tmp_path / "a.npz", *FEW)
    assert status == 2
    assert "made another way" in said


def test_a_changed_guide_is_another_recipe(command, tmp_path, make_checkpoint, read_json):
    arguments = ("--out", tmp_path / "a.npz", *FEW, "--no-verify-weights", "--guide")
    guide = make_checkpoint("to-change", hidden_size=16, depth=1, num_heads=2)
    assert command(*arguments, guide)[0] == 0
    weights = load_file(guide / "ema.safetensors")
    weights["x_embedder.proj.bias"] += 1
    save_file(weights, guide / "ema.safetensors")
    status, said = command(*arguments, guide)
    assert status == 2
    assert "guide" in said


def test_unconditional_checkpoints_are_guided_too(command, tmp_path, make_checkpoint):
    one, two = (make_checkpoint(name, num_classes=0) for name in ("free", "free-guide"))
    plain = made(command, tmp_path / "plain.safetensors", checkpoint=one)
    assert not np.array_equal(plain, made(command, tmp_path / "led.safetensors", "--guide", two, checkpoint=one))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 4}, "its latents 4×4×4, not 4×8×8"),
        ({"num_classes": 7}, "its classes 7, not 8"),
        ({"process": RectifiedFlow(), "learn_sigma": False}, "its objective flow, not ddpm"),
        ({"process": GaussianDiffusion(schedule="cosine")}, "its schedule cosine, not linear"),
        ({"process": GaussianDiffusion(prediction="v")}, "its prediction v, not epsilon"),
        ({"info": {"class_ids": ["a", "b", *(f"n0{k}" for k in range(2, 8))]}}, "others: a for n00, b for n01"),
        ({"info": {"vae": {"name": "x", "sha256": "0" * 64, "scaling_factor": 1.0}}}, "its VAE is x, of another finge"),
        ({"info": {"vae": {"name": "x", "scaling_factor": 9.0}}}, "its latents are scaled by 9.0, not"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused_in_a_sentence(command, tmp_path, make_checkpoint, changes, message):
    guide = make_checkpoint("unfit", **changes)
    status, said = command("--out", tmp_path / "a.npz", *FEW, "--guide", guide)
    assert status == 2
    assert message in said
    assert f"--guide {guide} cannot guide this checkpoint" in said
    assert "choose one that fits it" in said
    assert not list(tmp_path.iterdir())


def test_a_guide_that_is_not_there_or_has_no_such_weights_is_told(command, tmp_path, other):
    for guide, message in ((tmp_path / "none", "there is no checkpoint at"), (f"{other}@0.7", "has no 0.7 weights")):
        status, said = command("--out", tmp_path / "a.npz", *FEW, "--guide", guide)
        assert status == 2
        assert message in said


def test_weights_stand_behind_the_last_at_sign_unless_it_is_part_of_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run@raw").mkdir()
    assert split_weights("run@raw") == ("run@raw", "ema")
    assert split_weights("run@raw@raw") == ("run@raw", "raw")
    assert split_weights("old@home/run") == ("old@home/run", "ema")
    assert split_weights("run@sigma=0.1") == ("run", "sigma=0.1")
