"""Folders that hold almost a VAE: each is one sentence that names what is there and what to do."""

import json
import shutil
import time

import pytest

from pipeline import hub
from pipeline.checkpoint import read_stored
from pipeline.runtime.errors import UserError
from pipeline.vae import load_vae
from pipeline.vae_folder import DEMO_FOLDER, WEIGHTS

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(tmp_path):
    """A copy of the demo's VAE to spoil."""
    return shutil.copytree(DEMO_FOLDER, tmp_path / "my-vae")


def set_in_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"in_channels": 1, "out_channels": 1}, "takes images of 1 channels (in_channels in its config.json).*RGB"),
        ({"out_channels": 4}, "gives images of 4 channels"),
        ({"scaling_factor": None}, "has scaling_factor None in its config.json, where a number is needed; write there"),
        ({"scaling_factor": 0}, "has scaling_factor 0 "),
        ({"scaling_factor": "0.2"}, "has scaling_factor '0.2' "),
        ({"scaling_factor": float("nan")}, "has scaling_factor nan "),
        ({"shift_factor": [0.1]}, "has shift_factor"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "has latents_std"),
        ({"latents_mean": 0.5}, "has latents_mean 0.5"),
    ],
)
def test_settings_that_no_image_or_latent_fits_are_refused_before_anything_is_loaded(values, said, folder):
    set_in_config(folder, **values)
    (folder / WEIGHTS).write_bytes(b"not looked at yet")
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")):
        load_vae(str(folder))


def test_a_half_precision_variant_alone_is_named_with_the_way_out(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(UserError, match=r"there is diffusion_pytorch_model\.fp16\.safetensors.*variant='fp16'"):
        load_vae(str(folder))


@pytest.mark.parametrize("outer", ["{}", '{"_class_name": "DiTTransformer2DModel"}', "[]"])
def test_a_config_above_the_vae_of_a_pipeline_does_not_stand_in_for_it(outer, tmp_path):
    shutil.copytree(DEMO_FOLDER, tmp_path / "whole" / "vae")
    (tmp_path / "whole" / "config.json").write_text(outer)
    assert load_vae(str(tmp_path / "whole")).sha256 == load_vae("demo").sha256


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_what_git_lfs_left_in_place_of_a_file_is_told(name, folder):
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_vae(str(folder))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_so_it_is_of_weights(suffix, tmp_path):
    (tmp_path / f"w{suffix}").write_text(POINTER)
    with pytest.raises(UserError, match=r"is a Git LFS pointer.*git lfs pull"):
        read_stored(tmp_path / f"w{suffix}", verify=False)


def test_a_hub_name_that_is_only_partly_cached_says_so_and_not_where_the_cache_is(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text((DEMO_FOLDER / "config.json").read_text())
    monkeypatch.setattr("pipeline.vae_folder.fetch", lambda *_, offline: tmp_path)
    with pytest.raises(UserError, match=r"^the VAE owner/name has no diffusion.*go online once, or give a local"):
        load_vae("owner/name")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """Its libraries would retry for half a minute."""
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    with hub.offline_if_unreachable() as answers:
        assert not answers
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert time.monotonic() - began < 10
