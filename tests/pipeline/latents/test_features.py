"""Features that people already have become a store."""

import hashlib
import shutil

import numpy as np
import pytest
import torch

from pipeline.convert.features import _load, import_numpy_features
from pipeline.latents import LatentStore
from pipeline.latents.verify import verify
from pipeline.runtime.errors import UserError
from pipeline.vae import normalize

COUNT = 12


@pytest.fixture
def features(tmp_path):
    """A folder as fast-DiT's extract_features.py leaves it."""
    draws = np.random.default_rng(0)
    values = draws.standard_normal((COUNT, 1, 4, 8, 8)).astype(np.float32)
    for kind in ("features", "labels"):
        (tmp_path / "in" / f"imagenet256_{kind}").mkdir(parents=True)
    for index in range(COUNT):
        np.save(tmp_path / "in" / "imagenet256_features" / f"{index}.npy", values[index])
        np.save(tmp_path / "in" / "imagenet256_labels" / f"{index}.npy", np.array([index * 80]))
    return tmp_path / "in", values[:, 0]


def test_every_feature_becomes_an_unscaled_point_in_file_order(features, shard_format, tmp_path):
    folder, values = features
    import_numpy_features(folder, tmp_path / "out", shard_format=shard_format, samples_per_shard=5)
    store = LatentStore(tmp_path / "out")
    assert (store.manifest.latent.kind, store.manifest.latent.dtype, len(store)) == ("point", "float16", COUNT)
    latents, labels = store[:]
    listed = store.indices().numpy()
    assert sorted(listed) == list(range(COUNT)) and labels.tolist() == (listed * 80).tolist()
    again = normalize(latents[:, 0].float(), store.manifest.vae["scaling_factor"], store.manifest.vae["shift_factor"])
    np.testing.assert_allclose(again.numpy(), values[listed], rtol=1e-3, atol=1e-4)
    assert verify(tmp_path / "out") == []


def test_the_store_is_byte_for_byte_what_it_was_before_there_were_other_layouts(features, tmp_path):
    import_numpy_features(features[0], tmp_path / "out", samples_per_shard=5)
    digest = hashlib.sha256((tmp_path / "out" / "manifest.json").read_bytes()).hexdigest()  # with every shard's
    assert digest == "be97281961bcb6c855589830dfb781811e6060248e27d1f22e78b46143d9fc4a"


def test_imagenet_s_classes_are_recognised_by_the_folder_s_name(features, tmp_path):
    folder, _ = features
    manifest = import_numpy_features(folder, tmp_path / "out")
    assert len(manifest.classes) == 1000 and manifest.class_ids[0] == "n01440764"
    assert manifest.image == {"size": 64, "crop": "adm-center"} and manifest.views == ("center",)
    assert manifest.vae["name"] == "stabilityai/sd-vae-ft-ema" and manifest.vae["sha256"] is None


def test_a_folder_s_name_alone_does_not_make_data_imagenet(features, tmp_path):
    folder, _ = features
    for index in range(COUNT):
        np.save(folder / "imagenet256_labels" / f"{index}.npy", np.array([index % 10]))
    assert import_numpy_features(folder, tmp_path / "out").class_ids == tuple(map(str, range(10)))


def test_moments_are_not_taken_for_latents_of_twice_the_channels(features, tmp_path):
    folder, values = features
    for index in range(COUNT):
        np.save(folder / "imagenet256_features" / f"{index}.npy", np.concatenate([values[None, index]] * 2, axis=1))
    with pytest.raises(UserError, match="features of 8 channels.* has latents of 4, its means and log-variances"):
        import_numpy_features(folder, tmp_path / "out")


def test_vae_scale_names_and_dtype_can_be_given(features, tmp_path):
    folder, values = features
    vae = {"name": "mine", "class": "AutoencoderKL", "sha256": "ab", "scaling_factor": 2.0, "shift_factor": 1.0}
    names = [f"class {label}" for label in range(900)]
    manifest = import_numpy_features(folder, tmp_path / "out", vae=vae, class_names=names, store_dtype="float32")
    store = LatentStore(tmp_path / "out")
    expected = torch.from_numpy(values[store.indices().numpy()]) / 2 + 1
    assert torch.equal(store[:][0][:, 0], expected) and manifest.vae == vae and list(manifest.classes) == names


def test_running_it_again_continues_and_gives_the_same_bytes(features, tmp_path, bytes_of):
    folder, _ = features
    import_numpy_features(folder, tmp_path / "a", samples_per_shard=5)
    import_numpy_features(folder, tmp_path / "b", samples_per_shard=5)
    for name in ("manifest.json", "skipped.jsonl", "train-00001.json", "train-00002.json", "train-00002.safetensors"):
        (tmp_path / "b" / name).unlink()
    import_numpy_features(folder, tmp_path / "b", samples_per_shard=5)
    import_numpy_features(folder, tmp_path / "b", samples_per_shard=5)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    with pytest.raises(UserError, match="other settings"):
        import_numpy_features(folder, tmp_path / "b", samples_per_shard=6)


def test_other_features_under_the_same_names_are_not_taken_for_the_same(features, tmp_path):
    folder, values = features
    import_numpy_features(folder, tmp_path / "out", samples_per_shard=5)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(tmp_path / "out", unfinished)
    for name in ("manifest.json", "train-00002.json", "train-00002.safetensors"):
        (unfinished / name).unlink()
    for index in range(COUNT):
        np.save(folder / "imagenet256_features" / f"{index}.npy", -values[None, index])
    for place in (tmp_path / "out", unfinished):
        with pytest.raises(UserError, match="of other settings or inputs"):
            import_numpy_features(folder, place, samples_per_shard=5)
    manifest = import_numpy_features(folder, unfinished, samples_per_shard=5, overwrite=True)
    assert manifest.samples == COUNT and verify(unfinished) == []


def test_a_feature_that_is_no_number_is_named(features, tmp_path):
    folder, _ = features
    np.save(folder / "imagenet256_features" / "3.npy", np.full((1, 4, 8, 8), np.nan, "f4"))
    with pytest.raises(UserError, match=r"3\.npy \(and 0 others near it\) holds values that are not finite in float16"):
        import_numpy_features(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "imagenet256_labels" / "3.npy").unlink(), r"must hold the same names.*3\.npy \(and 0 others\)"),
        (lambda f: (f / "imagenet256_features" / "3.npy").write_bytes(b"x"), r"3\.npy cannot be read as a \.npy"),
        (
            lambda f: np.save(f / "imagenet256_features" / "3.npy", np.zeros((1, 4, 8, 9), "f4")),
            r"3\.npy is not \[1, 4",
        ),
        (lambda f: np.save(f / "imagenet256_features" / "0.npy", np.zeros(5)), r"0\.npy is no latent of shape"),
        (
            lambda f: np.save(f / "imagenet256_labels" / "3.npy", np.zeros(2)),
            r"3\.npy holds float64 .*one whole number",
        ),
        (lambda f: np.save(f / "imagenet256_labels" / "3.npy", np.array([-1])), r"the labels lie in -1"),
        (lambda f: np.save(f / "imagenet256_features" / "3.npy", np.array([{}]), allow_pickle=True), "cannot be read"),
        (lambda f: (f / "other_features").mkdir(), r"found 2 of them \(imagenet256_features, other_features\)"),
    ],
)
def test_what_does_not_fit_is_named(features, tmp_path, damage, message):
    folder, _ = features
    damage(folder)
    with pytest.raises(UserError, match=message):
        import_numpy_features(folder, tmp_path / "out")


def test_folders_that_are_no_features_or_no_place_for_a_store_are_refused(features, tmp_path):
    folder, _ = features
    with pytest.raises(UserError, match="found none"):
        import_numpy_features(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(UserError, match="holds other things"):
        import_numpy_features(folder, folder)
    with pytest.raises(UserError, match="5 names were given"):
        import_numpy_features(folder, tmp_path / "out", class_names=list("abcde"))


def test_a_npy_that_claims_terabytes_is_refused_by_its_length(tmp_path):
    with (tmp_path / "0.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(UserError, match=r"0\.npy cannot be read .*claims 4000000000000 bytes of data, but it holds 0"):
        _load(tmp_path / "0.npy")
