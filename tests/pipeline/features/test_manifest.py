"""The manifest of features and their directions: read as written, and refused in one sentence where they are not."""

import copy

import pytest
import torch

from pipeline.features.manifest import parse_features
from pipeline.features.pca import Covariance, read_projection, write_projection
from pipeline.latents.manifest import sealed
from pipeline.latents.remote import LocalFolder
from pipeline.runtime.errors import UserError

SHA = "0" * 64
VALUES = {
    "format": "dit-features",
    "version": 1,
    "split": "train",
    "samples": 5,
    "views": ["center", "center-hflip"],
    "encoder": {
        "name": "dino",
        "class": "Dinov2Model",
        "sha256": SHA,
        "resolution": 28,
        "grid": [2, 2],
        "width": 8,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
    "columns": {
        "features": {"dtype": "float16", "shape": [2, 4, 3]},
        "cls": {"dtype": "float16", "shape": [2, 8]},
    },
    "pca": {"file": "pca.safetensors", "sha256": SHA, "components": 3, "kept_variance": 0.5, "images": 5},
    "extraction": {"split": "train"},
    "plan": "a plan",
    "shards": [{"file": "train-00000.safetensors", "samples": 5, "bytes": 700, "sha256": SHA}],
}


def changed(path, value):
    values = copy.deepcopy(VALUES)
    *outer, last = path
    at = values
    for key in outer:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return sealed(values)


def test_it_is_read_and_written_to_the_same_bytes():
    data = sealed(VALUES)
    manifest = parse_features(data, "manifest.json")
    assert manifest.to_bytes() == data
    assert manifest.columns.sample_bytes == 2 * (4 * 3 + 8) * 2
    assert [name for name, *_ in manifest.columns.tensors(5)] == ["index", "cls", "features"]


def test_the_class_token_may_stand_alone_and_then_there_are_no_directions():
    values = copy.deepcopy(VALUES) | {"pca": None}
    del values["columns"]["features"]
    manifest = parse_features(sealed(values), "manifest.json")
    assert manifest.columns.sample_bytes == 2 * 8 * 2 and [*manifest.columns.shapes] == ["cls"]
    assert manifest.to_bytes() == sealed(values)
    del values["columns"]["cls"]
    with pytest.raises(UserError, match="columns contradict its encoder"):
        parse_features(sealed(values), "manifest.json")


def test_keys_of_later_versions_are_ignored():
    assert parse_features(changed(["later"], 1), "m").samples == 5


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (["format"], "dit-latents", "has format 'dit-latents' version 1"),
        (["version"], 2, "version 2, but this program knows"),
        (["samples"], 6, "its shards contradict it"),
        (["samples"], "5", "samples is '5', but must be a whole number"),
        (["shards", 0, "file"], "../x", "its shards contradict it"),
        (["shards", 0, "bytes"], None, r"shards\[0\].bytes is missing"),
        (["encoder", "grid"], [2, 0], "encoder.grid"),
        (["encoder", "grid"], [2, 3], "columns contradict its encoder"),
        (["encoder", "sha256"], "x", "encoder.sha256 is 'x'"),
        (["columns", "features", "shape"], [2, 4, 9], "columns contradict its encoder"),
        (["columns", "features", "shape"], [1, 4, 3], "columns contradict its encoder"),
        (["columns", "features", "dtype"], "float64", "columns contradict its encoder"),
        (["columns", "cls", "dtype"], "int8", "columns contradict its encoder"),
        (["columns", "features"], None, "columns contradict its encoder"),
        (["pca", "components"], 4, "its pca contradicts its columns"),
        (["pca", "file"], "../pca.safetensors", "its pca contradicts its columns"),
        (["views"], [], "columns contradict its encoder"),
    ],
)
def test_what_contradicts_itself_is_refused_by_key(path, value, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_features(changed(path, value), "manifest.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"null"])
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(UserError, match=r"manifest\.json"):
        parse_features(data, "manifest.json")


def test_a_changed_digit_is_noticed():
    with pytest.raises(UserError, match="was changed after it was written"):
        parse_features(sealed(VALUES).replace(b'"samples": 5', b'"samples": 6'), "manifest.json")


def test_directions_are_orthonormal_and_going_there_and_back_keeps_the_stated_variance(tmp_path):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=draw) * torch.tensor([9.0, 5, 4, 3, 1, 1, 1, 0.1]) + 2
    sums = Covariance(8)
    for part in x.split(64):
        sums.add(part)
    projection, variances = sums.principal(3)
    torch.testing.assert_close(projection.components @ projection.components.T, torch.eye(3), atol=1e-5, rtol=0)
    lost = (projection.back(projection.forth(x)) - x).square().sum(1).mean()
    torch.testing.assert_close(lost.double(), variances[3:].sum(), rtol=1e-4, atol=0)
    about = write_projection(tmp_path, projection, variances, images=7)
    assert (about.components, about.images) == (3, 7)
    assert about.kept_variance == pytest.approx(float(variances[:3].sum() / variances.sum()))
    encoder = parse_features(sealed(VALUES), "m").encoder
    again = read_projection(LocalFolder(tmp_path), about, encoder)
    assert torch.equal(again.components, projection.components) and torch.equal(again.mean, projection.mean)
    (tmp_path / about.file).write_bytes(b"x")
    with pytest.raises(UserError, match="has not the SHA-256 of the manifest"):
        read_projection(LocalFolder(tmp_path), about, encoder)
