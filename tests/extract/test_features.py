"""Features beside latents: the same plan, bytes, kills and checks, and not a byte of the store changes by them."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from extract import feature_network
from pipeline.features import FeatureStore
from pipeline.features.store import features_faults
from pipeline.images import center_crop, to_pixels
from pipeline.inspect.__main__ import main as inspect_command
from pipeline.latents import LatentStore
from pipeline.runtime.errors import UserError
from tests.encoders import write_encoder
from tests.extract.test_processes import RANKS, finish_all, wait_for
from tests.train.runs import train

ENCODER_PX, WIDTH, PATCHES = 28, 8, 4


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoders") / "dino")


@pytest.fixture(scope="session")
def plain(tmp_path_factory, vae_folder, images):
    """A finished store without features, and their hashes with them: made once, undisturbed."""
    from extract.__main__ import main

    out = tmp_path_factory.mktemp("plain") / "store"
    base = ["--data", images, "--vae", vae_folder, "--image-size", 32, "--samples-per-shard", 8, "--out", out]
    assert main([str(argument) for argument in base]) == 0
    return out


@pytest.fixture
def store(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "store")


@pytest.fixture(scope="session")
def add(images, encoder):
    """Adds features to a store in this process; gives the exit status."""
    from extract.__main__ import main

    def run(store, *flags, data=images, features=encoder):
        words = ["--data", data, "--add-features", store, "--features", features, "--batch-size", 4, *flags]
        return main([str(word) for word in words])

    return run


@pytest.fixture(scope="session")
def reference_features(plain, tmp_path_factory, add, hashes):
    """The hashes of a store whose features one process made undisturbed, reduced to 3 numbers a patch."""
    out = shutil.copytree(plain, tmp_path_factory.mktemp("reference features") / "store")
    assert add(out, "--features-dim", 3) == 0
    return hashes(out)


@pytest.fixture
def start_adding(start, encoder):
    """Starts the command that adds features as a process of its own."""

    def run(store, *flags, before=""):
        words = ["--add-features", store, "--features", encoder, "--features-dim", 3, "--batch-size", 4, *flags]
        return start(*words, before=before, base=())

    return run


def read(store):
    with LatentStore(store) as latents:
        return FeatureStore(store, latents.manifest), latents.indices().numpy()


def by_hand(encoder, images, key):
    """[2 views, 4 patches, 8] and [2 views, 8] of an image, by transformers alone."""
    from transformers import AutoModel

    pixels = torch.from_numpy(to_pixels(center_crop(Image.open(images / key), ENCODER_PX)[None]))
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = ((pixels + 1) / 2 - mean) / std
    with torch.no_grad():
        states = AutoModel.from_pretrained(encoder).eval()(pixel_values=torch.cat([x, x.flip(-1)])).last_hidden_state
    return states[:, 1:], states[:, 0]


def test_features_and_class_token_are_those_of_the_encoder_on_each_view(store, add, encoder, images):
    assert add(store) == 0
    features, _ = read(store)
    keys = [key for n in range(7) for key in json.loads((store / f"train-{n:05d}.json").read_text())["keys"]]
    for row in (0, 7, 8, 49):
        patches, cls = by_hand(encoder, images, keys[row])
        for view in (0, 1):
            got = features.gather(np.array([row]), np.array([view]))
            torch.testing.assert_close(got["features"][0].float(), patches[view], atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(got["cls"][0].float(), cls[view], atol=2e-3, rtol=2e-3)


def test_not_a_byte_of_the_store_changes_and_plain_safetensors_reads_the_columns(store, plain, add, hashes):
    before = hashes(plain)
    assert add(store) == 0
    after = hashes(store)
    assert {name: sha for name, sha in after.items() if not name.startswith("features/")} == before
    _, indices = read(store)
    with safe_open(store / "features" / "train-00001.safetensors", framework="pt") as shard:
        assert shard.get_slice("features").get_shape() == [8, 2, PATCHES, WIDTH]
        assert shard.get_slice("cls").get_shape() == [8, 2, WIDTH]
        assert shard.get_tensor("index").tolist() == indices[8:16].tolist()


def test_features_with_the_latents_in_one_command_are_those_added_later(
    tmp_path, command, encoder, reference_features, hashes
):
    out = tmp_path / "store"
    words = ("--out", out, "--features", encoder, "--features-dim", 3, "--batch-size", 4)
    assert command(*words)[0] == 0
    assert hashes(out) == reference_features
    status, said = command(*words)
    assert status == 0 and "features is already finished" in said
    assert command(*words, "--overwrite")[0] == 0
    assert hashes(out) == reference_features


@pytest.mark.parametrize("count", [2])
def test_processes_of_one_command_wait_for_the_latents_and_share_the_features(
    tmp_path, start, encoder, reference_features, hashes, count
):
    out = tmp_path / "store"
    words = ("--out", out, "--features", encoder, "--features-dim", 3, "--batch-size", 4)
    processes = [start(*words) for _ in range(count)]
    assert finish_all(processes) == [0] * count, [process.log() for process in processes]
    assert hashes(out) == reference_features


def test_two_processes_make_the_bytes_of_one(store, start_adding, reference_features, hashes):
    both = [start_adding(store) for _ in range(2)]
    assert finish_all(both) == [0, 0], [process.log() for process in both]
    assert hashes(store) == reference_features


def kill_rounds(plain, tmp_path, start_adding, reference_features, hashes, rounds):
    longest = 0.4
    for number in range(rounds):
        store = shutil.copytree(plain, tmp_path / f"store-{number}")
        for kill in range(2):
            process = start_adding(store)
            wait_for(lambda at=store: (at / "features" / ".work").exists() or (at / "features/manifest.json").exists())
            time.sleep(longest * ((3 * number + 5 * kill) % 7) / 7)
            process.kill()
            finish_all([process])
        last = start_adding(store)
        assert finish_all([last]) == [0], last.log()
        assert hashes(store) == reference_features


def test_killed_and_continued_the_bytes_are_the_same(plain, tmp_path, start_adding, reference_features, hashes):
    kill_rounds(plain, tmp_path, start_adding, reference_features, hashes, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_rounds_of_kills(plain, tmp_path, start_adding, reference_features, hashes):
    kill_rounds(plain, tmp_path, start_adding, reference_features, hashes, 10)


def test_shard_ranges_meet_and_a_lost_shard_alone_is_made_anew(store, add, reference_features, hashes, capsys):
    assert add(store, "--features-dim", 3, "--shard-range", "0:4") == 0
    assert not (store / "features/manifest.json").exists()
    assert "3 of 7 shards of features are not in place yet" in capsys.readouterr().err
    assert add(store, "--features-dim", 3, "--shard-range", "4:") == 0
    assert hashes(store) == reference_features
    (store / "features/train-00002.safetensors").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (store / "features").glob("*.safetensors")}
    assert add(store, "--features-dim", 3) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert hashes(store) == reference_features


def test_other_settings_are_refused_and_overwrite_makes_them_anew(store, add, reference_features, hashes, capsys):
    assert add(store) == 0
    assert add(store, "--features-dim", 3) == 2
    assert "--features-dim None there, 3 now" in capsys.readouterr().err
    assert add(store, "--features-dim", 3, "--overwrite") == 0
    assert hashes(store) == reference_features


def test_two_ranks_overwrite_once(store, add, start_adding, reference_features, hashes):
    assert add(store) == 0
    time.sleep(0.02)
    both = [start_adding(store, "--overwrite", before=RANKS.format(rank, rank)) for rank in (1, 0)]
    assert finish_all(both) == [0, 0], [process.log() for process in both]
    assert hashes(store) == reference_features


def test_a_store_made_anew_takes_its_features_along_and_other_stores_features_are_refused(
    store, add, command, encoder, capsys
):
    assert add(store) == 0
    kept = shutil.copytree(store / "features", store.parent / "kept")
    assert command("--out", store, "--seed", 1, "--overwrite")[0] == 0
    assert not list((store / "features").glob("*"))
    shutil.rmtree(store / "features")
    shutil.copytree(kept, store / "features")
    with LatentStore(store) as latents, pytest.raises(UserError, match="features of other samples than the store's"):
        FeatureStore(store, latents.manifest)
    assert "other samples" in features_faults(store, latents.manifest)[0]


def test_inputs_left_out_of_the_store_have_no_features(tmp_path, add, command, make_picture, tree):
    files = {f"{'ab'[n % 2]}/{n}.jpg": make_picture(n) for n in range(9)} | {"a/bad.jpg": b"no picture"}
    data, out = tree(tmp_path / "data", files), tmp_path / "store"
    assert command("--out", out, "--allow-skips", 0.5, data=data)[0] == 0
    assert add(out, data=data) == 0
    features, indices = read(out)
    assert len(features) == len(indices) == 9
    assert features_faults(out, LatentStore(out).manifest) == []


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda file, other: file.write_bytes(other), "is not the image that its latent in"),
        (lambda file, _: file.write_bytes(b"none"), "cannot be read now"),
        (lambda file, _: file.rename(file.with_name("z.jpg")), "has not the inputs that"),
    ],
)
def test_images_that_are_not_those_of_the_latents_are_refused(
    tmp_path, store, images, add, make_picture, capsys, spoil, sentence
):
    data = shutil.copytree(images, tmp_path / "images")
    spoil(data / "b" / "10.jpg", make_picture(99))
    assert add(store, data=data) == 2
    assert sentence in capsys.readouterr().err
    assert not (store / "features/manifest.json").exists()
    assert add(store) == 0


@pytest.mark.parametrize("crop", [(), ("--crop", "random-resized", "--crops", 2, "--no-flip")])
def test_each_stored_view_has_features_of_its_own(tmp_path, command, add, crop):
    out = tmp_path / "store"
    assert command("--out", out, *crop, "--seed", 3)[0] == 0
    assert add(out) == 0
    features, _ = read(out)
    rows = np.arange(5)
    first, second = (features.gather(rows, np.full(5, view))["features"] for view in (0, 1))
    assert features.manifest.views == tuple(LatentStore(out).manifest.views)
    assert not torch.equal(first, second)


def test_a_store_of_tars_has_features_in_safetensors(tmp_path, command, add, reference_features):
    out = tmp_path / "store"
    assert command("--out", out, "--format", "webdataset")[0] == 0
    assert add(out, "--features-dim", 3) == 0
    features, _ = read(out)
    assert features_faults(out, LatentStore(out).manifest) == []
    for shard in features.manifest.shards:
        assert shard.sha256 == reference_features[f"features/{shard.file}"]


def test_remote_features_are_read_as_local_ones_and_a_reader_of_latents_fetches_none(
    tmp_path, store, add, serve, monkeypatch
):
    monkeypatch.setenv("DIT_LATENTS_CACHE", str(tmp_path / "cache"))
    assert add(store, "--features-dim", 3) == 0
    local, _ = read(store)
    with LatentStore(serve(store)) as latents:
        latents.gather(np.arange(50))
        copies = {path.stat().st_size for path in (tmp_path / "cache").iterdir()}
        sizes = {shard.bytes for shard in local.manifest.shards}
        assert not copies & sizes
        remote = FeatureStore(latents.path, latents.manifest)
        rows = np.array([49, 0, 13])
        for name, values in remote.gather(rows, np.array([1, 0, 1])).items():
            assert torch.equal(values, local.gather(rows, np.array([1, 0, 1]))[name])
        assert torch.equal(remote.projection.components, local.projection.components)
        assert features_faults(latents.path, latents.manifest) == []


@pytest.mark.parametrize("file", ["train-00001.safetensors", "train-00001.json", "pca.safetensors", "manifest.json"])
def test_one_flipped_bit_anywhere_is_found(store, add, file):
    assert add(store, "--features-dim", 3) == 0
    path = store / "features" / file
    whole = path.read_bytes()
    manifest = LatentStore(store).manifest
    for at in (5, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        faults = features_faults(store, manifest)
        assert faults and file in faults[0], at
    path.write_bytes(whole)
    assert features_faults(store, manifest) == []


def test_a_damaged_row_is_named(store, add, capsys):
    assert add(store) == 0
    path = store / "features/train-00003.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert inspect_run(store, "--verify") == 2
    key = json.loads((store / "features/train-00003.json").read_text())["keys"][7]
    assert f"train-00003.safetensors has not the SHA-256 of the manifest: row 7 ({key}) is damaged" in (
        capsys.readouterr().err
    )


def inspect_run(*words):
    import sys

    before, sys.argv = sys.argv, ["dit-inspect", *map(str, words)]
    try:
        return inspect_command()
    finally:
        sys.argv = before


def test_inspect_tells_of_the_features(store, add, capsys):
    assert inspect_run(store) == 0 and "\nencoder" not in capsys.readouterr().out
    assert add(store, "--features-dim", 3) == 0
    assert inspect_run(store, "--verify") == 0
    said = capsys.readouterr().out
    assert "2×2 patches of 3 numbers of 8, which keep" in said and "class token of 8" in said and "Dinov2Model" in said


def test_fewer_numbers_lie_in_the_directions_of_largest_variance_and_give_the_nearest_back(store, add, monkeypatch):
    assert add(store) == 0
    whole, _ = read(store)
    rows = np.arange(50)
    x = whole.gather(rows)["features"].double()
    monkeypatch.setattr(feature_network, "PCA_IMAGES", 40)
    assert add(store, "--features-dim", 3, "--overwrite") == 0
    reduced, _ = read(store)
    sample = x[:40].reshape(-1, WIDTH)
    variances, vectors = torch.linalg.eigh(torch.cov(sample.T, correction=0))
    pca = reduced.manifest.pca
    assert pca.images == 40 and pca.components == 3
    assert pca.kept_variance == pytest.approx(float(variances[-3:].sum() / variances.sum()), abs=1e-3)
    z = reduced.gather(rows)["features"]
    assert z.shape == (50, PATCHES, 3)
    nearest = sample.mean(0) + (x - sample.mean(0)) @ vectors[:, -3:] @ vectors[:, -3:].T
    torch.testing.assert_close(reduced.projection.back(z.float()).double(), nearest, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("flags", [(), ("--features-dim", 3)])
def test_int8_takes_half_the_room_and_gives_each_number_back_within_half_a_step(store, add, capsys, flags):
    assert add(store, *flags) == 0
    rows, views = np.arange(49, -1, -1), np.arange(50) % 2
    known = read(store)[0].gather(rows, views)
    assert add(store, *flags, "--features-dtype", "int8") == 2
    assert "features-dtype" in capsys.readouterr().err, "what is there is not gone on with in another precision"
    assert add(store, *flags, "--features-dtype", "int8", "--overwrite") == 0
    features = read(store)[0]
    made = features.gather(rows, views)
    assert {tensor.dtype for tensor in made.values()} == {torch.float16}
    assert torch.equal(made["cls"], known["cls"])
    scales = []
    for number, entry in enumerate(features.manifest.shards):
        with safe_open(store / "features" / entry.file, framework="pt") as shard:
            steps, scale = shard.get_tensor("features"), shard.get_tensor("features_scale")
            assert (steps.dtype, scale.shape) == (torch.int8, steps.shape[-1:])
            assert steps.abs().flatten(0, 2).amax(0).tolist() == [127] * len(scale)
            scales += [scale] * entry.samples
            own = slice(8 * number, 8 * number + entry.samples)
            given = features.gather(np.arange(50)[own])["features"]
            assert torch.equal(given, (steps[:, 0].float() * scale).half())
    away = (made["features"].double() - known["features"].double()).abs()
    allowed = torch.stack(scales)[torch.from_numpy(rows)][:, None].double() / 2
    assert (away <= allowed + known["features"].double().abs() * 2**-10 + 1e-7).all() and away.any()
    assert inspect_run(store, "--verify") == 0
    assert f"patches of {features.manifest.columns.dim} numbers" in (said := capsys.readouterr().out) and "int8" in said


def test_a_scale_that_is_damaged_is_found_and_one_that_is_no_scale_is_refused(store, add):
    assert add(store, "--features-dtype", "int8") == 0
    path = store / "features/train-00003.safetensors"
    for damage in (b"\x00\x00\xc0\x7f", bytes(4)):  # NaN, 0
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(damage)
        features, _ = read(store)
        with LatentStore(store) as latents:
            (fault,) = features_faults(store, latents.manifest)
        assert "train-00003.safetensors" in fault
        with pytest.raises(UserError, match="its features_scale must be numbers above 0"):
            features.gather(np.array([25]))


def test_the_disk_is_stated_before_anything_is_made(store, add, capsys):
    assert add(store, "--features-dim", 3) == 0
    said = capsys.readouterr().err
    assert "the features will take 4.0 kB of disk" in said and "80 B" in said
    assert said.index("will take") < said.index("principal directions")


def test_the_class_token_may_stand_alone(store, plain, add, capsys, tmp_path):
    whole = shutil.copytree(plain, tmp_path / "whole")
    assert add(whole) == 0 and add(store, "--features-dim", 0) == 0
    said = capsys.readouterr().err
    assert f"the class token of {WIDTH} numbers alone" in said and "the features will take 1.6 kB of disk" in said
    alone, (both, _) = read(store)[0], read(whole)
    rows, views = np.arange(50), np.arange(50) % 2
    found = alone.gather(rows, views)
    assert found.keys() == {"cls"} and torch.equal(found["cls"], both.gather(rows, views)["cls"])
    with LatentStore(store) as latents:
        assert features_faults(store, latents.manifest) == []
    assert train(store, tmp_path / "run", "--class-token", steps=1) == 0
    assert train(store, tmp_path / "other", "--class-token", "--align-features", steps=1) == 2
    assert "--align-features needs patches" in capsys.readouterr().err


def test_in_one_command_it_is_stated_and_the_encoder_found_right_before_the_latents(
    tmp_path, command, encoder, monkeypatch
):
    out = tmp_path / "store"
    words = ("--out", out, "--features", encoder, "--batch-size", 4)
    status, said = command(*words, "--features-dim", WIDTH)
    assert status == 2 and f"--features-dim {WIDTH} is no less than" in said and not [*out.glob("train-*")]
    usage = type(shutil.disk_usage(tmp_path))
    latents, features = 50 * 2 * 8 * 4 * 4 * 2, 50 * 2 * (PATCHES + 1) * WIDTH * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 0, latents + features - 1))
    status, said = command(*words)
    assert status == 2 and "the store with its features needs" in said and not [*out.glob("train-*")]
    monkeypatch.undo()
    status, said = command(*words)
    assert status == 0 and said.index("its features 8.0 kB then") < said.index("the features will take 8.0 kB of disk")


KINDS = {
    "ViT": {"center_crop": False},
    "Dinov2WithRegisters": {"num_register_tokens": 2},
    "DINOv3ViT": {"num_register_tokens": 4},
    "IJepa": {"center_crop": False},
    "SiglipVision": {"center_crop": False},
    "CLIPVision": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_the_last_tokens_whatever_stands_before_them(tmp_path, store, add, kind):
    folder = write_encoder(tmp_path / kind, kind, **KINDS[kind])
    assert add(store, features=folder) == 0
    features, _ = read(store)
    shapes = {name: tuple(values.shape) for name, values in features.gather(np.arange(2)).items()}
    cls = {} if kind in {"SiglipVision", "IJepa"} else {"cls": (2, WIDTH)}
    assert shapes == {"features": (2, PATCHES, WIDTH)} | cls


def pickle_alone(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without(name):
    return lambda folder: (folder / name).unlink()


def damaged(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def of_remote_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('ran a stranger\\'s code')")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (pickle_alone, "has no model.safetensors; its .bin file is a pickle, which could run code"),
        (without("preprocessor_config.json"), "has no preprocessor_config.json"),
        (without("config.json"), "has no config.json"),
        (damaged, "cannot be used"),
        (of_remote_code, "cannot be used"),
    ],
)
def test_an_encoder_that_is_not_whole_or_needs_its_own_code_is_refused(tmp_path, store, add, capsys, spoil, sentence):
    folder = write_encoder(tmp_path / "encoder")
    spoil(folder)
    assert add(store, features=folder) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said
    assert not (store / "features").exists()


@pytest.mark.parametrize("flags", [(), ("--features-dim", 3)])
def test_features_that_half_precision_cannot_hold_are_refused(tmp_path, store, add, capsys, flags):
    folder = write_encoder(tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.weight"] *= 1e6
    save_file(weights, folder / "model.safetensors")
    assert add(store, *flags, features=folder) == 2
    assert "features that are not finite in half precision; use --encode-dtype float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--features-dim", 8), "--features-dim 8 is no less than the 8 of dino"),
        (("--image-size", 64), "--image-size 64 now, 32 there"),
        (("--out", "x"), "--add-features names the store itself"),
        (("--features-dtype", "int4"), "int4"),
        (("--features-dim", 0, "--features-dtype", "int8"), "--features-dtype is of the patches"),
    ],
)
def test_flags_that_make_no_sense_are_refused(store, add, capsys, flags, sentence):
    assert add(store, *flags) == 2
    assert sentence in capsys.readouterr().err


def test_a_store_that_was_not_made_of_images_is_refused(store, add, capsys):
    from pipeline.latents.manifest import sealed

    values = json.loads((store / "manifest.json").read_text())
    del values["extraction"]
    (store / "manifest.json").write_bytes(sealed(values))
    assert add(store) == 2
    assert "was not made from images by dit-extract" in capsys.readouterr().err
