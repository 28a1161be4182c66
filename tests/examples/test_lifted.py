"""Digits lifted into 64 channels: the same data, taken back exactly, trained on and measured by the public commands."""

import numpy as np
import pytest
import torch

from examples.digits import lifted
from pipeline.latents import LatentStore


@pytest.fixture(scope="module")
def real():
    return lifted.real_digits()


def test_lifting_is_a_fixed_rotation_that_is_undone_exactly_and_fills_4_of_64_directions(real):
    digits = real[0][:300]
    narrow = lifted.cells(digits)
    wide = lifted.lift(narrow, 64)
    assert narrow.shape == (300, 4, 4, 4) and wide.shape == (300, 64, 4, 4)
    np.testing.assert_allclose(lifted.pixels(lifted.lower(wide)), digits, atol=1e-6)
    np.testing.assert_array_equal(lifted.pixels(narrow), digits.astype(np.float32))
    torch.testing.assert_close(wide.norm(dim=1), narrow.norm(dim=1))
    assert torch.linalg.matrix_rank(wide.transpose(0, 1).flatten(1).double(), rtol=1e-4) == 4
    assert torch.equal(lifted.rotation(), lifted.rotation())


def test_real_digits_are_at_distance_0_and_recognised_and_others_are_not(real):
    digits, labels = real
    distance, named = lifted.measure((digits, labels), digits, labels)
    assert abs(distance) < 1e-6 and named > 0.99
    assert lifted.frechet(digits + 0.5, digits) == pytest.approx(64 * 0.25, rel=1e-6)
    assert lifted.measure((digits, (labels + 1) % 10), digits, labels)[1] < 0.01


@pytest.mark.slow
def test_a_row_is_trained_sampled_and_measured_and_what_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lifted, "SAMPLES", 40)
    row = "64 channels, x_0, shifted, head"
    words = ["--out", str(tmp_path / "l"), "--steps", "1", "--rows", row]
    assert lifted.main(words) == 0
    said = capsys.readouterr().err
    assert f"| {row} | " in said and "--head-width 96" in said
    monkeypatch.setattr(lifted, "dit_train", None)
    assert lifted.main(words) == 0
    assert f"| {row} | " in capsys.readouterr().err
    with LatentStore(tmp_path / "l" / "wide") as store:
        assert len(store) == 1797 and store.manifest.latent.channels == 64
