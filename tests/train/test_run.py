"""Whole runs in the less usual settings."""

import json

import pytest

from pipeline.checkpoint import read_checkpoint
from pipeline.diffusion import RectifiedFlow
from pipeline.dit import compile_blocks
from tests.train.runs import (
    VAE,
    assert_close_histories,
    assert_same_run,
    checkpoints,
    history,
    lines,
    make_store,
    tensors,
    train,
)


def test_unlabelled_images_train_an_unconditional_network(tmp_path):
    folder = make_store(tmp_path / "latents", classes=0)
    assert train(folder, tmp_path / "run", steps=2) == 0
    info = json.loads((tmp_path / "run" / "checkpoints" / "step-0000002" / "config.json").read_text())
    assert info["model"]["num_classes"] == 0 and info["classes"] == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--conditioning", "in-context", "--qk-norm"],
        ["--class-dropout", "0", "--no-flip"],
        ["--blocks", "modern", "--gradient-checkpointing"],
    ],
)
def test_other_networks_train_too(store, tmp_path, flags):
    assert train(store, tmp_path / "run", *flags, steps=2) == 0


def test_sizes_that_are_not_the_models_are_the_networks_and_what_does_not_fit_together_is_named(
    store, tmp_path, capsys
):
    sizes = ["--hidden-size", "24", "--depth", "3", "--num-heads", "2", "--patch-size", "4"]
    assert train(store, tmp_path / "run", *sizes, steps=2) == 0
    info = json.loads((tmp_path / "run" / "checkpoints" / "step-0000002" / "config.json").read_text())
    told = {"hidden_size": 24, "depth": 3, "num_heads": 2, "patch_size": 4}
    assert info["model"] | told == info["model"]
    assert "DiT-Ti/2 --hidden-size 24 --depth 3 --num-heads 2 --patch-size 4, 0.0 M" in capsys.readouterr().err
    assert train(store, tmp_path / "run", steps=3, depth=None) == 2
    assert "--depth was 3 and is now None" in capsys.readouterr().err
    assert train(store, tmp_path / "other", "--hidden-size", "30", "--num-heads", "4", steps=2) == 2
    assert "hidden_size 30 does not divide among num_heads 4" in capsys.readouterr().err


def test_a_run_of_before_there_were_other_blocks_goes_on_with_the_releases_alone(store, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(store, run, steps=2) == 0
    config = run / "config.yaml"
    lines_before = config.read_text().splitlines(keepends=True)
    new = ("blocks:", "mlp:", "norm:", "rotary:", "value-residual:")
    config.write_text("".join(line for line in lines_before if not line.startswith(new)))
    assert train(store, run, "--blocks", "modern", steps=3) == 2
    assert "--mlp was gelu and is now swiglu" in capsys.readouterr().err
    assert train(store, run, steps=3) == 0


def test_points_that_are_not_square_train_too(tmp_path):
    folder = make_store(tmp_path / "latents", shape=(3, 4, 8), kind="point", views=("center",))
    assert train(folder, tmp_path / "run", "--variance", "fixed-small", steps=2) == 0


# The tracer itself looks at gradients of intermediate tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.slow
def test_a_compiled_network_trains_as_it_does_plainly_and_saves_plain_names(store, tmp_path, monkeypatch):
    monkeypatch.setattr("train.run.compile_blocks", lambda network: compile_blocks(network, backend="aot_eager"))
    assert train(store, tmp_path / "plain", steps=3) == 0
    assert train(store, tmp_path / "compiled", "--compile", steps=3) == 0
    assert_close_histories(history(tmp_path / "plain"), history(tmp_path / "compiled"))
    assert tensors(tmp_path / "plain", 3).keys() == tensors(tmp_path / "compiled", 3).keys()


def test_a_held_out_store_gives_the_validation_loss(store, tmp_path):
    held_out = make_store(tmp_path / "held-out", samples=40, seed=5)
    flags = ["--validation", str(held_out), "--validate-every", "2", "--validation-samples", "35"]
    assert train(store, tmp_path / "run", *flags, steps=2) == 0
    assert lines(tmp_path / "run")[1]["validation_loss"] == pytest.approx(1.0, abs=0.15)  # an untrained network's
    assert "validation_loss" not in lines(tmp_path / "run")[0]


def test_a_remote_store_is_read_through_the_cache_and_is_the_same_data(store, tmp_path):
    assert train(store, tmp_path / "run", steps=2) == 0
    assert train(f"file://{store}", tmp_path / "run", "--cache", str(tmp_path / "cache"), steps=4) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_newest_checkpoint_is_what_sampling_reads(store, tmp_path):
    assert train(store, tmp_path / "run", "--objective", "flow", steps=2) == 0
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint.info["step"] == 2 and checkpoint.process.to_json()["objective"] == "flow"
    assert checkpoint.config.num_classes == 4 and checkpoint.weights == "ema"


def test_a_vae_with_a_factor_per_channel_trains_too(tmp_path):
    factors = {"scaling_factor": [0.5, 1.0, 2.0, 1.0], "shift_factor": [0.0, 0.1, 0.2, 0.3]}
    folder = make_store(tmp_path / "latents", vae=VAE | factors)
    assert train(folder, tmp_path / "run", steps=2) == 0
    checkpoint = read_checkpoint(tmp_path / "run")
    assert {name: checkpoint.info["vae"][name] for name in factors} == factors


def test_an_order_for_slow_disks_trains_too(store, tmp_path):
    assert train(store, tmp_path / "run", "--order", "runs", steps=3) == 0


def test_every_edge_at_once_trains(store, tmp_path):
    flags = ["--batch-size", "1", "--prefetch", "1", "--save-every", "1", "--keep-last", "1", "--log-every", "1"]
    flags += ["--validation-share", "0.5", "--validate-every", "1", "--validation-samples", "1", "--ema-decay", "0"]
    flags += ["--class-dropout", "1", "--max-rollbacks", "0", "--clip-norm", "1e-30"]
    assert train(store, tmp_path / "run", *flags, steps=2) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    assert all(line["validation_loss"] > 0 for line in lines(tmp_path / "run"))


def test_no_time_at_all_saves_the_beginning_from_which_the_run_goes_on(store, tmp_path):
    assert train(store, tmp_path / "run", "--time-limit", "0", steps=2) == 142
    assert checkpoints(tmp_path / "run") == ["step-0000000"]
    assert train(store, tmp_path / "run", steps=2) == 0
    assert train(store, tmp_path / "straight", steps=2) == 0
    assert_same_run(tmp_path / "run", tmp_path / "straight", 2)


def test_an_empty_folder_that_is_there_takes_a_run(store, tmp_path):
    (tmp_path / "run").mkdir()
    assert train(store, tmp_path / "run", steps=1) == 0


def test_what_a_flow_predicts_and_how_its_times_are_shifted_is_in_the_checkpoint_and_resumed(tmp_path):
    """A latent of 6·32·48 numbers is shifted by 1.5."""
    store = make_store(tmp_path / "store", samples=8, shape=(6, 32, 48))
    flags = ["--objective", "flow", "--prediction", "x0", "--time-mean", "-0.4", "--time-std", "0.8"]
    for steps in (1, 2):
        assert train(store, tmp_path / "run", *flags, "--time-shift", "auto", "--batch-size", "2", steps=steps) == 0
    process = read_checkpoint(str(tmp_path / "run")).process
    assert process == RectifiedFlow(prediction="x0", time_mean=-0.4, time_std=0.8, time_shift=1.5)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]


def test_a_flow_with_the_defaults_says_in_its_checkpoint_what_it_always_said(store, tmp_path):
    assert train(store, tmp_path / "run", "--objective", "flow", "--time-shift", "auto", steps=1) == 0
    info = json.loads((tmp_path / "run/checkpoints/step-0000001/config.json").read_text())
    assert info["diffusion"] == {"objective": "flow", "timestep_law": "logit-normal"}


def test_weights_that_predicted_the_velocity_are_said_to_learn_anew_for_the_data(store, tmp_path, capsys):
    flow = ["--objective", "flow"]
    assert train(store, tmp_path / "v", *flow, steps=1) == 0
    assert train(store, tmp_path / "same", *flow, "--init-from", str(tmp_path / "v"), steps=1) == 0
    assert "learns anew" not in capsys.readouterr().err
    x0 = [*flow, "--prediction", "x0", "--init-from", str(tmp_path / "v")]
    assert train(store, tmp_path / "x0", *x0, steps=1) == 0
    wanted = "was trained for --objective flow --prediction v, this run is for flow --prediction x0: it learns anew"
    assert wanted in capsys.readouterr().err
