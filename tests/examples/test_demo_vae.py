"""The script behind the demo VAE runs, and gives a VAE that every command can take."""

import numpy as np
import pytest
import torch

from examples.demo_vae.drawings import draw_canvas
from examples.demo_vae.train import Options, batch_at, digit_pixels, main, new_model, to_signed
from pipeline.vae import load_vae


@pytest.fixture(scope="module")
def digits():
    return digit_pixels(0, 4)


def test_a_batch_depends_on_the_seed_and_the_step_alone(tmp_path, digits):
    options = Options(out=tmp_path, canvases=2, crops=2, digits=1)
    batch = batch_at(3, 32, options, digits)
    assert (batch.dtype, batch.shape) == (np.uint8, (5, 32, 32, 3))
    assert np.array_equal(batch, batch_at(3, 32, options, digits))
    assert not np.array_equal(batch, batch_at(4, 32, options, digits))


def test_drawings_come_in_colour_and_in_grey():
    draw = np.random.default_rng(0)
    spreads = [np.ptp(draw_canvas(draw).astype(int), axis=-1).mean() for _ in range(24)]
    assert min(spreads) == 0
    assert max(spreads) > 60


def test_the_untrained_model_already_knows_every_cells_colour(tmp_path, digits):
    pixels = to_signed(batch_at(0, 64, Options(out=tmp_path, canvases=2, crops=2, digits=0), digits))
    model = new_model(0)
    with torch.no_grad():
        mean = model.encode(pixels).latent_dist.mean
        decoded = torch.nn.functional.avg_pool2d(model.decode(mean).sample, 8)
    cells = torch.nn.functional.avg_pool2d(pixels, 8)
    for channel in range(3):
        for found in (mean, decoded):
            pair = torch.stack([found[:, channel].flatten(), cells[:, channel].flatten()])
            assert torch.corrcoef(pair)[0, 1] > 0.95


@pytest.mark.slow
def test_training_gives_a_vae_that_loads_and_the_same_one_again(tmp_path, capsys):
    arguments = ["--steps", "2", "--canvases", "1", "--crops", "1", "--digits", "1"]
    prints = []
    for name in ("first", "second"):
        assert main(["--out", str(tmp_path / name), *arguments]) == 0
        vae = load_vae(str(tmp_path / name))
        prints.append(vae.sha256)
        assert (vae.kind, vae.channels, vae.downsample) == ("moments", 4, 8)
        assert vae.scaling_factor > 0
    assert prints[0] == prints[1]
    assert main(["--out", str(tmp_path / "first"), *arguments]) == 2
    assert "first is already there" in capsys.readouterr().err
