"""Latents of any number of channels: normalised one by one, given back by samples, and not learned by a narrow network."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint import read_checkpoint
from pipeline.diffusion import RectifiedFlow
from pipeline.dit import DiTConfig
from pipeline.latents import LatentStore
from pipeline.latents.manifest import make_manifest
from pipeline.runtime.errors import UserError
from pipeline.runtime.units import factors
from sample.__main__ import main as sample
from tests.train.runs import VAE, assert_close_histories, assert_same_run, history, launch, make_store, train
from train import build
from train.losses import clean_latents
from train.options import DataOptions

CHANNEL = ["--latent-normalization", "channel"]
FLOW = ["--objective", "flow", "--lr", "0"]  # the network gives 0, so that samples are the noise


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Points of six channels of very different means and spreads, the last of which does not vary."""
    folder = tmp_path_factory.mktemp("uneven") / "latents"
    scale, shift = torch.tensor([1, 30, 0.01, 2, 5, 0]), torch.tensor([0, 100, 0, -7, 1, 3])
    with pytest.MonkeyPatch.context() as patch:
        plain = torch.randn
        patch.setattr(torch, "randn", lambda *a, **k: plain(*a, **k) * scale[:, None, None] + shift[:, None, None])
        return make_store(folder, shape=(6, 4, 4), kind="point")


def test_each_channel_is_fed_with_mean_0_and_deviation_1_and_one_that_does_not_vary_is_only_shifted(uneven):
    with LatentStore(uneven) as store:
        manifest = build.as_fed(store.manifest, DataOptions(latents="", latent_normalization="channel"))
        latents = store[:][0].flatten(0, 1)
    normalization = build.normalization_of(manifest, torch.device("cpu"))
    fed = clean_latents(latents, normalization, torch.zeros_like(latents, dtype=torch.float32)).double()
    torch.testing.assert_close(fed.mean((0, 2, 3)), torch.zeros(6).double(), atol=1e-3, rtol=0)
    wanted = torch.tensor([1, 1, 1, 1, 1, 0]).double()
    torch.testing.assert_close(fed.std((0, 2, 3), unbiased=False), wanted, atol=2e-3, rtol=0)


def test_by_default_the_manifest_is_the_stores_own(uneven):
    with LatentStore(uneven) as store:
        assert build.as_fed(store.manifest, DataOptions(latents="")) is store.manifest
    nothing = make_manifest({**store.manifest, "statistics": {"mean": [1.0] * 6, "std": [0.0] * 6}})
    fed = build.as_fed(nothing, DataOptions(latents="", latent_normalization="channel"))
    assert fed["vae"]["scaling_factor"] == [1.0] * 6 and fed["vae"]["shift_factor"] == [1.0] * 6


def test_a_checkpoint_says_it_and_samples_come_back_in_the_stores_own_units(uneven, tmp_path, capsys):
    raw = {}
    for name, flags in (("vae", []), ("channel", CHANNEL)):
        assert train(uneven, tmp_path / name, *FLOW, *flags, steps=1) == 0
        out = tmp_path / f"{name}.safetensors"
        wanted = ["--num-samples", "64", "--steps", "2", "--sampler", "euler", "--batch-size", "64"]
        assert sample(["--checkpoint", str(tmp_path / name), "--out", str(out), *wanted]) == 0
        raw[name] = load_file(out)["latents"].double()
    assert "scale [" in capsys.readouterr().err
    with LatentStore(uneven) as store:
        mean, std = (torch.tensor(store.manifest.statistics[key], dtype=torch.float64) for key in ("mean", "std"))
    std[5] = 1
    noise = raw["vae"] * VAE["scaling_factor"]
    torch.testing.assert_close(raw["channel"], noise * std[:, None, None] + mean[:, None, None], rtol=1e-5, atol=1e-5)

    info = read_checkpoint(tmp_path / "channel").info
    assert info["training"]["latent_normalization"] == "channel" and info["vae"]["sha256"] == VAE["sha256"]
    assert info["vae"]["scaling_factor"][:5] == [1 / value for value in std.tolist()[:5]]
    config = (tmp_path / "vae" / "checkpoints" / "step-0000001" / "config.json").read_text()
    assert "latent_normalization" not in config and json.loads(config)["vae"] == VAE
    identities = {read_checkpoint(tmp_path / name).info["training"]["data_identity"] for name in raw}
    assert len(identities) == 1, "the data are the same"


def test_a_run_does_not_go_on_with_another_normalization(uneven, tmp_path, capsys):
    assert train(uneven, tmp_path / "run", *FLOW, steps=1) == 0
    assert train(uneven, tmp_path / "run", *FLOW, *CHANNEL, steps=2) == 2
    assert "--latent-normalization was vae and is now channel" in capsys.readouterr().err
    assert train(uneven, tmp_path / "other", *FLOW, *CHANNEL, "--init-from", str(tmp_path / "run"), steps=1) == 2
    assert "its scaling_factor is 0.5 and the store's is [" in capsys.readouterr().err


def test_many_factors_are_told_by_the_least_and_the_largest():
    assert factors(0.5) == "0.5" and factors(None) == "None" and factors([1.0, 2.0]) == "[1.0, 2.0]"
    assert factors([3.0, *[1.0] * 8, 0.25]) == "one for each of 10 channels (0.25 … 3)"
    assert factors(["?"] * 9) == str(["?"] * 9)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Points of 36 channels, of which a network of width 32 cannot predict the noise."""
    return make_store(tmp_path_factory.mktemp("wide") / "latents", shape=(36, 4, 4), kind="point", samples=32)


NARROW = ["--hidden-size", "32", "--depth", "2", "--patch-size", "1", "--objective", "flow"]
HEAD = ["--head-width", "48"]
SENTENCE = "a token has 36 numbers of the latent and the network is 32 wide: too narrow to predict the noise in them"


def test_a_network_as_wide_as_a_token_has_numbers_is_taken_without_a_word(monkeypatch):
    said = []
    monkeypatch.setattr(build, "warn", said.append)
    config = DiTConfig(input_size=4, in_channels=32, patch_size=1, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    build.refuse_too_wide_latents(config, RectifiedFlow(), allowed=False)
    assert said == []
    with pytest.raises(UserError, match="too narrow"):
        build.refuse_too_wide_latents(replace(config, in_channels=33), RectifiedFlow(), allowed=False)


def test_velocities_of_more_channels_than_the_width_are_refused_and_what_learns_is_not(wide, tmp_path, capsys):
    assert train(wide, tmp_path / "run", *NARROW, steps=1) == 2
    said = capsys.readouterr().err
    assert (
        f"{SENTENCE}, so it is known not to learn; use --prediction x0 with --objective flow, or --head-width" in said
    )
    assert not (tmp_path / "run").exists()
    assert train(wide, tmp_path / "run", *NARROW, "--anyway", steps=1) == 0
    assert f"warning: {SENTENCE}" in capsys.readouterr().err
    assert train(wide, tmp_path / "run", *NARROW, steps=2) == 0, "a run that is there goes on"
    for name, flags in {"x0": ["--prediction", "x0"], "head": HEAD}.items():
        assert train(wide, tmp_path / name, *NARROW, *flags, steps=1) == 0
    assert "too narrow" not in capsys.readouterr().err


def test_where_a_smaller_patch_would_do_it_is_only_said(store, tmp_path, capsys):
    assert train(store, tmp_path / "run", "--hidden-size", "32", "--depth", "1", "--patch-size", "4", steps=1) == 0
    assert "so it is known not to learn all of it; use a smaller --patch-size" in capsys.readouterr().err


def test_a_run_with_a_head_goes_on_to_the_same_bits_and_is_sampled_from(wide, tmp_path, capsys):
    flags = [*NARROW, *HEAD, "--head-depth", "1", "--optimizer", "muon", "--lr", "1e-3"]
    assert train(wide, tmp_path / "whole", *flags, steps=4) == 0
    assert train(wide, tmp_path / "again", *flags, steps=2) == 0
    assert train(wide, tmp_path / "again", *flags, steps=4) == 0
    assert_same_run(tmp_path / "again", tmp_path / "whole", 4)
    config = read_checkpoint(tmp_path / "whole").config
    assert (config.head_width, config.head_depth) == (48, 1)
    out = str(tmp_path / "made.safetensors")
    assert sample(["--checkpoint", str(tmp_path / "whole"), "--out", out, "--num-samples", "4", "--steps", "2"]) == 0
    assert load_file(out)["latents"].shape == (4, 36, 4, 4)
    assert train(wide, tmp_path / "deep", *NARROW, "--head-depth", "1", "--prediction", "x0", steps=1) == 2
    assert "--head-depth is for --head-width; give that too" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_a_head_as_one_does(wide, tmp_path, sharding):
    flags = [*NARROW, *HEAD, *CHANNEL, "--optimizer", "muon"]
    assert train(wide, tmp_path / "alone", *flags, steps=6) == 0
    result = launch(wide, tmp_path / "both", *flags, "--grad-accumulation", "2", "--sharding", sharding, steps=6)
    assert result.returncode == 0, result.stderr
    assert_close_histories(history(tmp_path / "both"), history(tmp_path / "alone"))
