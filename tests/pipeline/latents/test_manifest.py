"""The manifest: what it promises, and what is refused."""

import json

import pytest

from pipeline.latents import LatentStore, Manifest
from pipeline.latents.manifest import parse_manifest, read_manifest
from pipeline.runtime.errors import UserError


def change(folder, **values):
    """Edit the manifest on purpose: without the checksum, which tells an edit from damage."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("checksum", None)
    manifest.update(values)
    path.write_text(json.dumps(manifest))


def test_it_is_a_mapping_over_the_json_and_has_typed_properties(whole_store, shard_format):
    manifest = read_manifest(whole_store)
    plain = json.loads((whole_store / "manifest.json").read_text())
    assert dict(manifest) == plain and isinstance(manifest, Manifest)
    assert manifest["samples"] == manifest.samples == 12 and manifest["shard_format"] == shard_format
    assert manifest.latent.channels == manifest["latent"]["channels"] == 4
    assert (manifest.shards[0].samples, manifest.shards[0].file) == (7, plain["shards"][0]["file"])
    assert manifest.views == ("center", "center-hflip") and manifest.vae["scaling_factor"] == 0.5
    assert manifest.classes == ("tench", "crane", "pot", "cup") and manifest.seed == 3


def test_it_has_every_key_of_version_1_and_no_time_host_or_path(whole_store, shard_format):
    plain = json.loads((whole_store / "manifest.json").read_text())
    promised = "format version shard_format split samples skipped classes class_ids image views latent vae statistics seed shards"
    assert list(plain)[: len(promised.split())] != [] and set(promised.split()) <= set(plain)
    assert set(plain) - set(promised.split()) == {"plan", "checksum"}
    assert (plain["format"], plain["version"], plain["skipped"]) == ("dit-latents", 1, 2)
    assert set(plain["latent"]) == {"kind", "channels", "height", "width", "dtype", "downsample"}
    assert all(set(shard) == {"file", "samples", "bytes", "sha256"} for shard in plain["shards"])
    assert str(whole_store.parent) not in (whole_store / "manifest.json").read_text()


def test_unknown_keys_are_ignored(own_store):
    change(own_store, colour="blue")
    assert read_manifest(own_store)["colour"] == "blue"


def test_an_unfinished_store_is_refused(own_store):
    (own_store / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"not finished.*manifest\.json.*dit-extract"):
        read_manifest(own_store)


def test_a_missing_folder_an_empty_one_and_a_file_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path / "no")
    with pytest.raises(UserError, match="holds no latent store"):
        read_manifest(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        read_manifest(tmp_path / "file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 2}, "version 2 .*knows version 1"),
        ({"version": "1"}, "version '1'"),
        ({"format": "other"}, "format 'other'"),
        ({"samples": 13}, "samples is 13, but the shards have 12"),
        ({"samples": "12"}, "samples is '12'"),
        ({"views": []}, r"views is \[\], but must be a list of length >= 1"),
        ({"shard_format": "zip"}, "shard_format is 'zip'"),
        ({"classes": ["one"]}, "1 classes and 4 class_ids"),
        (
            {"latent": {"kind": "mean"}},
            r"latent.kind is 'mean', but must be one of moments, point; latent.channels is missing",
        ),
        ({"shards": [5]}, r"shards\[0\] is 5, but must be an object"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_with_the_reason(own_store, values, message):
    change(own_store, **values)
    with pytest.raises(UserError, match=message):
        read_manifest(own_store)


def test_a_changed_digit_in_a_sealed_manifest_is_refused_at_open_and_an_edit_says_how(own_store):
    path = own_store / "manifest.json"
    path.write_text(path.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 0.7'))
    with pytest.raises(UserError, match=r"was changed after it was written.*edited on purpose, take .*checksum.* out"):
        LatentStore(own_store)
    change(own_store)
    assert LatentStore(own_store).manifest.vae["scaling_factor"] == 0.7


VAE = {"name": "mine", "scaling_factor": 0.5, "shift_factor": None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"statistics": {"mean": [0.0] * 4, "std": [1.0] * 3}}, r"statistics.std is \[1.0, 1.0, 1.0\]"),
        (
            {"statistics": {"mean": [0.0] * 4, "std": [1.0, 1.0, -1.0, 1.0]}},
            r"statistics.std\[2\] is -1.0, but must be a number >= 0",
        ),
        (
            {"statistics": {"mean": [0.0, 1.0, 2.0, float("nan")], "std": [1.0] * 4}},
            r"statistics.mean\[3\] is nan, but must be a finite number",
        ),
        ({"statistics": {}}, "statistics.mean is missing; statistics.std is missing"),
        ({"vae": VAE | {"scaling_factor": 0}}, "vae.scaling_factor is 0"),
        ({"vae": VAE | {"scaling_factor": "0.18"}}, "vae.scaling_factor is '0.18'"),
        ({"vae": VAE | {"scaling_factor": [1.0, 2.0]}}, r"vae.scaling_factor is \[1.0, 2.0\]"),
        ({"vae": VAE | {"shift_factor": float("inf")}}, "vae.shift_factor is inf"),
    ],
)
def test_numbers_that_cannot_be_true_are_refused_whoever_wrote_them(own_store, values, message):
    change(own_store, **values)
    with pytest.raises(UserError, match=message):
        LatentStore(own_store)


def test_factors_for_every_channel_are_as_good_as_one(own_store):
    change(own_store, vae=VAE | {"scaling_factor": [1.0, 2.0, 3.0, 4.0], "shift_factor": [0.0, -1.0, 0.0, 1.0]})
    assert LatentStore(own_store).manifest.vae["scaling_factor"] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("names", [{"classes": []}, {"class_ids": []}, {"classes": [], "class_ids": []}])
def test_classes_may_lack_readable_names_or_ids(own_store, names):
    change(own_store, **names)
    manifest = read_manifest(own_store)
    assert all(manifest[key] == [] for key in names)


@pytest.mark.parametrize("key", ["classes", "class_ids"])
def test_a_class_whose_name_is_no_text_is_refused(own_store, key):
    change(own_store, **{key: ["a", 1, "c", "d"]})
    with pytest.raises(UserError, match=rf"{key}\[1\] is 1, but must be a text"):
        read_manifest(own_store)


@pytest.mark.parametrize(
    "name", ["../train-00000{}", "/etc/train{}", "a/b{}", "a\\b{}", "..{}", ".hidden{}", "", "train-00000.exe", 5, None]
)
def test_a_shard_name_that_leaves_the_folder_is_refused(own_store, name):
    manifest = json.loads((own_store / "manifest.json").read_text())
    suffix = manifest["shards"][0]["file"][11:]
    manifest["shards"][0]["file"] = name.format(suffix) if isinstance(name, str) else name
    change(own_store, shards=manifest["shards"])
    with pytest.raises(UserError, match=r"shards\[0\].file is .*(no plain file name|must be a text)"):
        read_manifest(own_store)


def test_a_shard_listed_twice_is_refused(own_store):
    shards = json.loads((own_store / "manifest.json").read_text())["shards"]
    shards[1] = {**shards[1], "file": shards[0]["file"]}
    change(own_store, shards=shards)
    with pytest.raises(UserError, match="is listed twice"):
        read_manifest(own_store)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(data):
    with pytest.raises(UserError, match="here"):
        parse_manifest(data, "here")


def test_every_key_is_needed_and_all_missing_ones_are_named():
    with pytest.raises(UserError, match=r"shard_format is missing; split is missing; .*latent is missing|samples"):
        parse_manifest(b'{"format": "dit-latents", "version": 1}', "here")
