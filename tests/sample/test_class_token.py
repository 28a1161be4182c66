"""A class token in sampling: it goes along as noise of its own, no sampler or guide need know, and it leaves no trace."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.convert import __main__ as convert
from pipeline.diffusion import RectifiedFlow
from pipeline.dit.embeddings import joined, parted
from pipeline.inspect import __main__ as inspect
from pipeline.vae import load_vae
from sample.__main__ import main
from tests.train.runs import make_store, train
from tests.train.test_alignment import add_features

DIM = 70
FLOW = {"process": RectifiedFlow(), "learn_sigma": False}


@pytest.fixture(scope="module")
def made(make_checkpoint):
    return make_checkpoint("with-token", class_token=DIM, depth=3, middle_head=True)


@pytest.fixture(scope="module")
def flow(make_checkpoint):
    return make_checkpoint("flow-with-token", class_token=DIM, depth=3, middle_head=True, **FLOW)


def latents(checkpoint, out, *flags, count=6, steps=4):
    words = ["--checkpoint", str(checkpoint), "--out", str(out), "--num-samples", str(count), "--steps", str(steps)]
    assert main([*words, *flags]) == 0
    return load_file(out)["latents"]


@pytest.mark.parametrize(
    "flags",
    [
        *(("--sampler", name) for name in ("ddpm", "ddim", "dpm++", "unipc")),
        ("--guidance", "1"),
        ("--guidance-channels", "3"),
        ("--guidance-source", "middle", "--guidance", "2"),
        ("--guidance-source", "both"),
    ],
)
def test_an_image_depends_on_its_number_and_the_seed_alone(made, tmp_path, flags):
    one = latents(made, tmp_path / "a.safetensors", "--batch-size", "4", *flags)
    other = latents(made, tmp_path / "b.safetensors", "--batch-size", "8", *flags)
    assert one.shape == (6, 4, 8, 8) and one.isfinite().all()
    assert (one - other).norm() < 1e-4 * one.norm()
    assert not torch.allclose(one[0], latents(made, tmp_path / "c.safetensors", "--seed", "1", *flags, count=1)[0])


@pytest.mark.parametrize("sampler", ["heun", "euler", "sde", "dpm++2m"])
def test_every_sampler_of_a_flow_takes_it_and_the_guide_of_another_checkpoint(flow, tmp_path, sampler):
    found = latents(flow, tmp_path / "a.safetensors", "--sampler", sampler, "--guide", str(flow), "--guidance", "1.5")
    assert found.isfinite().all()


def test_the_token_is_denoised_by_the_same_steps_as_the_latent(flow, tmp_path):
    """Euler's steps once more, by hand."""
    from pipeline.checkpoint import read_checkpoint
    from pipeline.randomness import normal

    found = latents(flow, tmp_path / "a.safetensors", "--sampler", "euler", "--guidance", "1", count=2, steps=3)
    checkpoint = read_checkpoint(flow)
    labels = torch.from_numpy(load_file(tmp_path / "a.safetensors")["label"].numpy())
    x = torch.stack([normal((4, 8, 8), 0, "sample-noise", k) for k in range(2)])
    token = torch.stack([normal((DIM,), 0, "class token sample-noise", k) for k in range(2)])
    with torch.no_grad():
        for k in range(3):
            t = torch.full((2,), 1000 * (1 - k / 3))
            velocity, of_token = parted(checkpoint.model(joined(x, token), t, labels), 4, DIM)
            x, token = x - velocity / 3, token - of_token / 3
    torch.testing.assert_close(found, x / checkpoint.info.vae.scaling_factor, rtol=1e-4, atol=1e-4)


def test_a_trained_run_draws_previews_and_its_samples_decode_and_tell_of_it(vae_folder, tmp_path, capsys, monkeypatch):
    store = add_features(make_store(tmp_path / "latents", vae=load_vae(str(vae_folder)).describe()), cls=10)
    flags = [
        "--class-token",
        "--align-features",
        "--objective",
        "flow",
        "--sample-every",
        "2",
        "--vae",
        str(vae_folder),
    ]
    assert train(store, tmp_path / "run", *flags, "--preview-steps", "2", steps=2) == 0
    assert (tmp_path / "run" / "samples" / "step-0000002.png").is_file()
    words = ["--checkpoint", str(tmp_path / "run"), "--vae", str(vae_folder), "--num-samples", "4", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path / "images.npz"), "--trajectory", "3"]) == 0
    assert np.load(tmp_path / "images.npz")["arr_0"].shape == (4, 64, 64, 3)
    sidecar = json.loads((tmp_path / "images.npz.json").read_text())
    assert '"class_token": 10' in json.dumps(sidecar)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["dit-inspect", str(tmp_path / "run")])
    assert inspect.main() == 0
    assert "a class token of 10 numbers" in capsys.readouterr().out


def test_what_is_inpainted_keeps_its_rest_and_what_is_interpolated_has_its_ends(flow, tmp_path):
    from PIL import Image

    known = latents(flow, tmp_path / "known.safetensors", count=2)
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))
    mask.save(tmp_path / "mask.png")
    flags = ["--inpaint", f"{tmp_path / 'known.safetensors'}@{tmp_path / 'mask.png'}", "--seed", "3"]
    made = latents(flow, tmp_path / "painted.safetensors", *flags, count=2)
    torch.testing.assert_close(made[..., 4:], known[..., 4:], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(made[..., :4], known[..., :4], atol=1e-2)
    rows = ["--classes", "2", "--sampler", "euler"]
    strip = _of_classes(flow, tmp_path / "strip.safetensors", *rows, "--seed", "3", "--interpolate", "8", each=3)
    ends = [_of_classes(flow, tmp_path / f"{seed}.safetensors", *rows, "--seed", seed, each=1)[0] for seed in "38"]
    torch.testing.assert_close(strip[0], ends[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(strip[2], ends[1], rtol=1e-4, atol=1e-4)


def _of_classes(checkpoint, out, *flags, each):
    words = ["--checkpoint", str(checkpoint), "--out", str(out), "--samples-per-class", str(each), "--steps", "3"]
    assert main([*words, *flags]) == 0
    return load_file(out)["latents"]


@pytest.mark.parametrize("target", ["facebook", "diffusers"])
def test_formats_that_have_no_such_token_are_refused_by_name(made, tmp_path, capsys, monkeypatch, target):
    out = tmp_path / ("out.safetensors" if target == "facebook" else "out")
    monkeypatch.setattr(sys, "argv", ["dit-convert", "--from", str(made), "--to", str(out), "--format", target])
    assert convert.main() == 2
    assert "it denoises a class token along with the latent" in capsys.readouterr().err
    assert not out.exists()


def test_a_variation_and_a_guide_without_one_are_refused_in_a_sentence(made, make_checkpoint, tmp_path, capsys):
    known, out = tmp_path / "known.safetensors", tmp_path / "x.safetensors"
    latents(made, known, count=2)
    words = ["--checkpoint", str(made), "--out", str(out), "--num-samples", "2"]
    assert main([*words, "--vary", f"{known}@0.5"]) == 2
    assert "the class token that this checkpoint's network denoises" in capsys.readouterr().err
    assert main([*words, "--guide", str(make_checkpoint("no-token"))]) == 2
    assert "its class token 0, not 70" in capsys.readouterr().err
