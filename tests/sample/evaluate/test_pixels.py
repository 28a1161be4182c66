"""Pixels as features: closed forms, any batch size, and what they refuse."""

import json

import numpy as np
import pytest
import torch
from scipy import linalg

from pipeline.runtime.errors import UserError
from sample.evaluate.evaluation import evaluate
from sample.evaluate.metrics import fit_gaussian, frechet_distance
from sample.evaluate.options import EvaluateOptions
from sample.evaluate.pixels import PixelFeatures, principal_axes, project
from sample.options import ComputeOptions


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name, low in (("a", 0), ("b", 60)):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(low, 200, (40, 4, 4, 3), dtype=np.uint8))
    return tmp_path


def judged(folder, samples, reference, *, batch_size=32):
    out = folder / f"{samples}{reference}{batch_size}.json"
    evaluate(
        EvaluateOptions(
            samples=str(folder / f"{samples}.npz"),
            reference=str(folder / f"{reference}.npz"),
            features="pixels",
            out=str(out),
            compute=ComputeOptions(device="cpu", batch_size=batch_size),
        )
    )
    return json.loads(out.read_text())["metrics"]


def test_fd_pixels_is_scipys_distance_of_the_pixels_themselves_where_all_axes_are_kept(images):
    x, y = (np.load(images / f"{name}.npz")["arr_0"].reshape(40, -1) / 255 for name in "ab")
    s, t = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(linalg.sqrtm(s) @ t @ linalg.sqrtm(s)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
    assert judged(images, "a", "b")["FD-pixels-40"] == pytest.approx(expected, rel=1e-4)


def test_the_same_images_are_at_no_distance_and_inside(images):
    found = judged(images, "a", "a")
    assert found["FD-pixels-40"] == pytest.approx(0, abs=1e-9)
    assert found["Precision-pixels-40"] == found["Recall-pixels-40"] == 1


def test_any_batch_size_gives_the_same_bits(images):
    assert judged(images, "a", "b", batch_size=7) == judged(images, "a", "b", batch_size=40)


def test_a_shift_along_the_first_axis_is_its_square_and_no_more_than_64_axes_are_kept():
    rows = np.random.default_rng(1).normal(size=(300, 100)) * np.linspace(3, 1, 100)
    gaussian = fit_gaussian([rows])
    axes = principal_axes(gaussian)
    moved = fit_gaussian([rows + 2 * axes[:, 0]])
    assert axes.shape == (100, 64)
    assert np.linalg.norm(axes.T @ gaussian.covariance @ axes[:, 0]) == pytest.approx(
        np.linalg.eigvalsh(gaussian.covariance)[-1]
    )
    assert frechet_distance(project(gaussian, axes), project(moved, axes)) == pytest.approx(4)


def test_statistics_of_the_network_are_refused_as_a_reference_of_pixels(images):
    np.savez(images / "s.npz", mu=np.zeros(2048), sigma=np.eye(2048), features=np.zeros((5, 2048)))
    with pytest.raises(UserError, match="fd-pixels needs images, which --reference .* does not hold"):
        judged(images, "a", "s")


def test_images_of_two_sizes_are_refused(images):
    np.savez(images / "c.npz", arr_0=np.zeros((40, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="compares images of one size"):
        judged(images, "a", "c")


@pytest.mark.parametrize("metric", ["sfid", "is", "fid"])
def test_metrics_of_the_network_are_refused_on_pixels(metric):
    with pytest.raises(UserError, match=f"--metrics {metric}: not defined on --features pixels"):
        EvaluateOptions(samples="a", reference="b", features="pixels", metrics=metric)


def test_a_reference_file_of_pixels_is_refused():
    with pytest.raises(UserError, match="give the images themselves as --reference"):
        EvaluateOptions(samples="a", features="pixels", make_reference="r.npz")


def test_larger_images_are_seen_as_means_of_areas_so_that_no_fine_pattern_is_left():
    board = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).repeat(32, 32).expand(1, 3, 64, 64)
    seen = PixelFeatures()(board, ["pixels"])["pixels"]
    assert seen.shape == (1, 3 * 32 * 32) and torch.equal(seen, torch.full_like(seen, 0.5))
