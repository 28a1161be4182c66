"""Images made on the fly: a store through its VAE, a checkpoint through the reverse process."""

import json
import shutil

import pytest
import torch

from pipeline.latents import LatentSpec
from pipeline.latents.writer import StoreDescription, finish_store, write_shard
from pipeline.runtime.errors import UserError
from pipeline.vae import Vae, load_vae
from sample.__main__ import main as sample
from sample.evaluate import features
from sample.evaluate.__main__ import main
from sample.evaluate.generated import StoreImages, open_store
from sample.evaluate.image_set import image_digests, pixels_fingerprint
from sample.evaluate.options import EvaluateOptions
from sample.options import ComputeOptions

SETTINGS = ("--steps", "2", "--seed", "3", "--batch-size", "2")


@pytest.fixture(scope="module")
def vae(vae_folder):
    return load_vae(str(vae_folder))


@pytest.fixture(scope="module")
def encoded(vae, pictures):
    pixels = torch.from_numpy(pictures(5, size=64)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return vae.encode(pixels)


@pytest.fixture(scope="module")
def store(vae, encoded, tmp_path_factory):
    """Moments of 5 images and of their mirror images, in two shards."""
    folder = tmp_path_factory.mktemp("store")
    views = torch.stack([encoded, encoded.flip(-1)], dim=1)
    for shard, rows in enumerate((range(3), range(3, 5))):
        keys = [f"{row}.png" for row in rows]
        write_shard(folder, "train", shard, "safetensors", views[list(rows)], [0] * len(keys), list(rows), keys)
    description = StoreDescription(
        split="train",
        shard_format="safetensors",
        latent=LatentSpec(kind="moments", channels=4, height=8, width=8, dtype="float32", downsample=8),
        views=["center", "center-hflip"],
        image={"size": 64, "crop": "adm-center"},
        vae=vae.describe(),
        classes=["only"],
        class_ids=["only"],
        seed=0,
    )
    assert finish_store(folder, description, shards=2) is not None
    return folder


@pytest.fixture
def evaluate(weights_file, vae_folder, capsys, tmp_path):
    """`evaluate(*arguments)`: (status, result file's content, stderr)."""

    def go(*arguments):
        out = tmp_path / "result.json"
        named = [*arguments, "--inception", weights_file, "--vae", vae_folder, "--out", out, "--overwrite"]
        status = main([str(argument) for argument in named])
        return status, json.loads(out.read_text()) if out.exists() else None, capsys.readouterr().err

    return go


def test_a_store_is_decoded_from_the_means_of_its_first_view(evaluate, store, vae, encoded):
    expected = vae.decode(encoded[:, :4].contiguous()).numpy()
    status, result, _ = evaluate("--samples", store, "--metrics", "is", "--batch-size", "8")
    assert status == 0
    described = result["samples"]["images"]
    assert described["pixels_sha256"] == pixels_fingerprint([image_digests(expected)])
    assert (described["count"], described["width"], described["view"]) == (5, 64, "center")
    assert described["vae"]["sha256"] == vae.sha256


@pytest.mark.slow
def test_the_pixels_of_a_store_depend_neither_on_the_batch_size_nor_on_the_number_of_cores(evaluate, store):
    found = set()
    before = torch.get_num_threads()
    for threads, batch_size in ((1, 8), (3, 8), (1, 2), (2, 3)):
        torch.set_num_threads(threads)
        try:
            _, result, _ = evaluate("--samples", store, "--metrics", "is", "--batch-size", batch_size)
        finally:
            torch.set_num_threads(before)
        found.add(result["samples"]["images"]["pixels_sha256"])
    assert len(found) == 1


def test_a_vae_of_other_latents_is_refused(store, tmp_path):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng():
        AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, **blocks).save_pretrained(tmp_path / "fine")
    options = EvaluateOptions(samples=str(store), metrics="is", vae=str(tmp_path / "fine"), allow_other_vae=True)
    with pytest.raises(UserError, match="cells of 2 pixels, but 4 channels and cells of 8 pixels are needed"):
        open_store(str(store), options)


@pytest.mark.slow
def test_every_form_of_checkpoint_that_is_sampled_is_evaluated(evaluate, tiny, tmp_path):
    from pipeline.convert.options import ConvertOptions
    from pipeline.convert.run import convert

    run = tmp_path / "run"
    shutil.copytree(tiny, run / "checkpoints" / "step-0000010")
    convert(ConvertOptions(from_=str(tiny), to=str(tmp_path / "pipe"), format="diffusers"))
    digests = set()
    for form in (tiny, run, run / "checkpoints", tmp_path / "pipe"):
        status, result, said = evaluate("--samples", form, "--num-samples", 4, "--metrics", "is", *SETTINGS)
        assert status == 0, said
        digests.add(result["samples"]["images"]["pixels_sha256"])
    assert len(digests) == 1


def test_a_run_without_a_checkpoint_and_an_unfinished_store_are_called_what_they_are(evaluate, store, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    _, _, said = evaluate("--samples", tmp_path / "run", "--num-samples", 4, "--metrics", "is")
    assert "is a run without a checkpoint yet" in said
    shutil.copytree(store, tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    _, _, said = evaluate("--samples", tmp_path / "store", "--metrics", "is")
    assert "is not finished" in said or "no finished latent store" in said, said


def test_a_latent_that_is_not_finite_is_named(store, vae_folder, monkeypatch):
    images = open_store(str(store), EvaluateOptions(samples=str(store), metrics="is", vae=str(vae_folder)))
    original = images.store.gather

    def poisoned(indices):
        latents, labels = original(indices)
        latents[list(indices).index(4), 0, 0, 0] = torch.nan
        return latents, labels

    monkeypatch.setattr(images.store, "gather", poisoned)
    with pytest.raises(Exception, match=r"not finite \(NaN or infinity\) for sample 4 of"):
        list(images.batches(3, 5, 2))
    images.close()


@pytest.mark.parametrize(("precision", "tf32"), [("no", False), ("auto", True)])
def test_a_store_is_decoded_with_tf32_unless_no_precision_is_spared_and_its_features_are_made_without(
    store, vae_folder, monkeypatch, noted_tf32, precision, tf32
):
    passes, here = [], noted_tf32.here

    def network(images, wanted):
        passes.append([*here])
        return {name: images.flatten(1)[:, :2].float() for name in wanted}

    decode = Vae.decode_values
    monkeypatch.setattr(Vae, "decode_values", lambda *given: passes.append([*here]) or decode(*given))
    for module in ("generated", "features"):
        monkeypatch.setattr(f"sample.evaluate.{module}.float32_products", noted_tf32)
    options = EvaluateOptions(
        samples=str(store), metrics="is", vae=str(vae_folder), compute=ComputeOptions(mixed_precision=precision)
    )
    images = open_store(str(store), options)
    for batch in images.batches(0, 2, 2):
        found = features._features_of_batch(batch, network, ("features_2048", "logits"), "cpu")
    images.close()
    assert passes == [[tf32], [False]] and {name: rows.shape for name, rows in found.items()} == {
        "features_2048": (2, 2),
        "logits": (2, 2),
    }


def test_the_key_of_a_store_changes_with_its_content_and_vae(store, vae_folder, vae):
    images = open_store(str(store), EvaluateOptions(samples=str(store), metrics="is", vae=str(vae_folder)))
    assert images.key() == StoreImages("elsewhere", images.store, vae).key()
    images.close()


def test_another_vae_is_refused(store, weights_file, capsys):
    status = main(["--samples", str(store), "--metrics", "is", "--inception", str(weights_file), "--vae", "demo"])
    assert status == 2
    assert "its weights or settings differ" in capsys.readouterr().err


def test_a_checkpoint_gives_the_images_of_dit_sample(evaluate, tiny, vae_folder, tmp_path):
    npz = tmp_path / "samples.npz"
    made = ["--checkpoint", str(tiny), "--out", str(npz), "--num-samples", "5", "--vae", str(vae_folder), *SETTINGS]
    assert sample(made) == 0
    status, result, _ = evaluate(
        "--samples", tiny, "--reference", npz, "--num-samples", 5, "--metrics", "precision,is", *SETTINGS
    )
    assert status == 0
    ours, theirs = result["samples"], result["reference"]
    assert ours["images"]["pixels_sha256"] == theirs["images"]["pixels_sha256"]
    assert result["metrics"]["Precision-5"] == 1.0
    assert ours["images"]["recipe"]["steps"] == 2
    assert ours["images"]["recipe"]["seed"] == 3
    assert theirs["made_by"]["recipe"]["checkpoint"] == ours["images"]["recipe"]["checkpoint"]


def test_a_checkpoint_that_makes_no_finite_latents_names_the_image(evaluate, make_checkpoint):
    poisoned = make_checkpoint("poisoned", poison=True)
    status, result, message = evaluate(
        "--samples", poisoned, "--num-samples", 4, "--labels", "balanced", "--metrics", "is", *SETTINGS
    )
    assert (status, result) == (2, None)
    assert "image 1 of class 1" in message, message[-300:]
