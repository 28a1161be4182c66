"""ADM's protocol on more images than FID asks for: the network is replaced by a projection that costs nothing."""

import json

import numpy as np
import pytest
import scipy.linalg

from sample.evaluate import features
from sample.evaluate.__main__ import main

COUNT = 2100
WIDTHS = {"features_2048": 2048, "spatial": 2023, "logits_unbiased": 1008}


def axes(name):
    """Twelve orthonormal directions in which the stand-in's features lie."""
    return np.linalg.qr(np.random.default_rng(WIDTHS[name]).standard_normal((WIDTHS[name], 12)))[0].T


AXES = {name: axes(name) for name in WIDTHS}


def coordinates(images):
    return images.reshape(len(images), 12).astype(np.float64) / 16


def stand_in(batch, network, wanted, device):
    return {name: (coordinates(batch) @ AXES[name]).astype(np.float32) for name in wanted}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    draw = np.random.default_rng(0)
    place = tmp_path_factory.mktemp("sets")
    images = {name: draw.integers(0, top, (COUNT, 2, 2, 3), dtype=np.uint8) for name, top in (("a", 256), ("b", 128))}
    for name, pixels in images.items():
        np.savez(place / f"{name}.npz", pixels)
    return place, images


@pytest.fixture
def run(weights_file, monkeypatch, capsys):
    monkeypatch.setattr(features, "_features_of_batch", stand_in)

    def go(*arguments):
        assert main([str(argument) for argument in (*arguments, "--inception", weights_file)]) == 0
        return capsys.readouterr()

    return go


def frechet(a, b):
    cov_a, cov_b = (np.cov(rows, rowvar=False) for rows in (a, b))
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + np.trace(cov_a + cov_b - 2 * np.real(scipy.linalg.sqrtm(cov_a @ cov_b)))


@pytest.mark.slow
def test_the_five_metrics_of_adm_from_images_to_numbers(run, sets, tmp_path):
    place, images = sets
    said = run("--samples", place / "a.npz", "--reference", place / "b.npz", "--out", tmp_path / "r.json")
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert list(metrics) == ["FID-2100", "sFID-2100", "IS-2100", "Precision-2100", "Recall-2100"]
    ours, theirs = (coordinates(pixels) for pixels in images.values())
    assert metrics["FID-2100"] == pytest.approx(frechet(ours, theirs), rel=1e-5)
    assert metrics["sFID-2100"] == pytest.approx(frechet(ours, theirs), rel=1e-5)
    logits = ours @ AXES["logits_unbiased"]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert metrics["IS-2100"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-6)
    assert metrics["Precision-2100"] < 0.2 < metrics["Recall-2100"]
    assert said.err.count("fewer than 10000") == 4, "FID and sFID, both sides"


@pytest.mark.slow
def test_a_reference_file_gives_the_very_numbers_of_its_images(run, sets, tmp_path):
    place, _ = sets
    run("--reference", place / "b.npz", "--make-reference", tmp_path / "ref.npz")
    results = []
    for name in (place / "b.npz", tmp_path / "ref.npz"):
        run(
            "--samples",
            place / "a.npz",
            "--reference",
            name,
            "--metrics",
            "fid,sfid",
            "--out",
            tmp_path / f"{len(results)}.json",
        )
        results.append(json.loads((tmp_path / f"{len(results)}.json").read_text())["metrics"])
    assert results[0] == results[1]
