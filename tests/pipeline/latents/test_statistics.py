"""Mean and spread of the sampled latents, from sums per shard."""

import json
from itertools import permutations

import numpy as np
import pytest
import torch

from pipeline.latents.records import combine, sums_of
from pipeline.randomness import normal
from pipeline.vae import draw_posterior


def direct(latents):
    """The definition, on all samples at once in float64: std² = Var[mean] + E[exp logvar]."""
    mean, logvar = np.split(latents.double().numpy(), 2, axis=2)
    axes = (0, 1, 3, 4)
    variance = mean.var(axis=axes) + np.exp(np.clip(logvar, -30, 20)).mean(axis=axes)
    return mean.mean(axis=axes), np.sqrt(variance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_they_are_those_of_a_float64_computation_over_the_stored_values(new_sample, dtype, tmp_path):
    sample = new_sample(dtype=dtype)
    folder = sample.write(tmp_path / "store", "safetensors")
    found = json.loads((folder / "manifest.json").read_text())["statistics"]
    mean, std = direct(sample.latents)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found["std"], std, rtol=1e-12)


def test_they_are_the_mean_and_spread_of_drawn_latents():
    moments = normal((400, 1, 4, 8, 8), 0, "moments") * torch.tensor([2.0, 0.5, 1.0, 0.3])[:, None, None] + 3
    found = combine([sums_of(moments, "moments")])
    drawn = draw_posterior(moments, normal((400, 1, 2, 8, 8), 0, "noise")).double()
    assert drawn.mean((0, 1, 3, 4)).tolist() == pytest.approx(found["mean"], abs=0.15)
    assert drawn.std((0, 1, 3, 4)).tolist() == pytest.approx(found["std"], rel=0.02)


def test_the_log_variance_is_clamped_as_diffusers_clamps_it():
    moments = torch.tensor([0.0, 100.0]).reshape(1, 1, 2, 1, 1)
    assert combine([sums_of(moments, "moments")])["std"] == [pytest.approx(np.exp(10.0))]
    moments[:, :, 1] = -100.0
    assert combine([sums_of(moments, "moments")])["std"] == [pytest.approx(np.exp(-15.0))]


def test_points_have_the_spread_of_their_values(new_sample):
    sample = new_sample(kind="point")
    found = combine([sums_of(shard, "point") for shard in sample.shards])
    values = sample.latents.double().numpy()
    np.testing.assert_allclose(found["mean"], values.mean((0, 1, 3, 4)), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found["std"], values.std((0, 1, 3, 4)), rtol=1e-12)


def test_the_order_of_the_shards_changes_no_bit():
    parts = [sums_of(normal((5, 2, 4, 2, 2), 1, "part", i) * 10.0**i, "moments") for i in range(4)]
    assert len({json.dumps(combine(order)) for order in permutations(parts)}) == 1


def test_no_samples_have_no_statistics():
    with pytest.raises(ValueError, match="no samples"):
        combine([sums_of(torch.empty(0, 1, 8, 2, 2), "moments")])
