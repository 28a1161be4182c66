"""The frozen VAE: whichever it is, wherever it lies, it is known again, and latents mean the same everywhere."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.images import to_pixels
from pipeline.recorded import RecordedVae
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import typed
from pipeline.vae import denormalize, draw_posterior, find_vae, fingerprint, load_vae, normalize
from pipeline.vae_folder import DEMO_FOLDER, WEIGHTS

DEMO_SHA256 = "72fd28f43de6fa2c0fef370a27643b86a591f38a3fc1fdbe9dc493e9a41fbfff"


@pytest.fixture(scope="module")
def demo():
    return load_vae("demo")


@pytest.fixture(scope="module")
def pixels():
    """Four smooth random pictures in [-1, 1]."""
    coarse = torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear") * 2 - 1


@pytest.fixture
def copied(tmp_path):
    """A copy of the demo VAE that a test may damage."""
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "my-vae"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Folders of small untrained autoencoders of the other classes."""
    from diffusers import AutoencoderDC, AutoencoderTiny

    folder = tmp_path_factory.mktemp("autoencoders")
    with torch.random.fork_rng():
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        ).save_pretrained(folder / "tiny")
        AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            scaling_factor=0.41,
        ).save_pretrained(folder / "dc")
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not Ellipsis}))


def edit_weights(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_the_demo_vae_is_what_its_card_says(demo):
    assert (demo.name, demo.class_name, demo.kind, demo.channels, demo.downsample) == (
        "demo",
        "AutoencoderKL",
        "moments",
        4,
        8,
    )
    assert list(demo.describe()) == ["name", "class", "sha256", "scaling_factor", "shift_factor"]
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= 2_000_000
    assert "nothing else" in (DEMO_FOLDER / "README.md").read_text()


def test_a_loaded_vae_is_frozen_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    vae = load_vae("demo")
    assert torch.equal(torch.get_rng_state(), before)
    assert not vae.model.training
    assert not any(parameter.requires_grad for parameter in vae.model.parameters())
    assert not vae.encode(torch.zeros(1, 3, 64, 64, requires_grad=True)).requires_grad


def test_moments_are_the_encoders_own_unscaled_and_unclamped(demo, pixels):
    with torch.no_grad():
        expected = demo.model.quant_conv(demo.model.encoder(pixels))
    moments = demo.encode(pixels)
    assert (moments.dtype, moments.shape) == (torch.float32, (4, 8, 8, 8))
    assert torch.equal(moments, expected)


def test_decoding_rounds_to_the_nearest_byte(demo, pixels):
    latents = demo.encode(pixels)[:, :4]
    with torch.no_grad():
        x = demo.model.decode(latents).sample.permute(0, 2, 3, 1).double().numpy()
    images = demo.decode(latents)
    assert (images.dtype, images.shape, images.is_contiguous()) == (torch.uint8, (4, 64, 64, 3), True)
    exact = np.clip((x + 1) * 127.5, 0, 255)
    assert np.abs(images.numpy() - exact).max() <= 0.5 + 1e-4


def test_a_batch_padded_to_one_size_gives_the_same_bits(demo, pixels):
    padded = torch.cat([pixels[:1], torch.zeros(3, 3, 64, 64)])
    assert torch.equal(demo.encode(padded)[:1], demo.encode(pixels)[:1])


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_stays_near_and_comes_out_as_float32(demo, pixels, dtype, most):
    vae = load_vae("demo", dtype=dtype)
    assert vae.sha256 == demo.sha256
    small = pixels[:1, :, :32, :32]  # the CPU is slow at float16
    exact, mean = demo.encode(small)[:, :4], vae.encode(small)[:, :4]
    assert mean.dtype == torch.float32
    assert 0 < (mean - exact).square().mean().sqrt() * demo.scaling_factor < most
    assert vae.decode(mean).dtype == torch.uint8


def test_images_of_a_size_it_cannot_encode_are_refused(demo):
    with pytest.raises(UserError, match=r"60×64 pixels is no multiple of 8.*choose --image-size 64"):
        demo.encode(torch.zeros(1, 3, 60, 64))
    demo.check_size(64, 72)


@pytest.mark.parametrize(
    ("name", "class_name", "channels", "downsample", "scale"),
    [("tiny", "AutoencoderTiny", 4, 4, 1.0), ("dc", "AutoencoderDC", 4, 2, 0.41)],
)
def test_autoencoders_without_a_spread_give_points(others, pixels, name, class_name, channels, downsample, scale):
    vae = load_vae(str(others / name))
    assert (vae.name, vae.class_name, vae.kind) == (name, class_name, "point")
    assert (vae.channels, vae.downsample, vae.scaling_factor) == (channels, downsample, scale)
    latents = vae.encode(pixels)
    assert latents.shape == (4, channels, 64 // downsample, 64 // downsample)
    assert torch.equal(latents, vae.model.encode(pixels, return_dict=False)[0])
    assert vae.decode(latents).shape == (4, 64, 64, 3)


def test_the_fingerprint_of_the_demo_vae_never_changes(demo):
    assert demo.sha256 == DEMO_SHA256


def test_the_fingerprint_follows_its_recipe(demo):
    def line(value):
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    digest = hashlib.sha256(line({key: value for key, value in config.items() if key[0] != "_"}))
    raw = (DEMO_FOLDER / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items()):
        first, last = entry["data_offsets"]
        digest.update(line([name, entry["dtype"], entry["shape"]]))
        digest.update(raw[start + first : start + last])
    assert demo.sha256 == digest.hexdigest()


def test_the_fingerprint_does_not_see_how_the_files_are_laid_out(demo, copied):
    tensors = load_file(copied / WEIGHTS)
    names = sorted(tensors)
    parts = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, copied / file, metadata={"format": "pt", "by": "x"})
    index = {"metadata": {}, "weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (copied / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (copied / WEIGHTS).unlink()
    edit_config(copied, _diffusers_version="0.0.1", _name_or_path="/somewhere/else")
    vae = load_vae(str(copied))
    assert vae.sha256 == demo.sha256
    assert all(torch.equal(a, b) for a, b in zip(vae.model.parameters(), demo.model.parameters(), strict=True))


def test_the_fingerprint_sees_every_change(demo, copied):
    seen = {demo.sha256}

    def changed(edit):
        edit()
        seen.add(fingerprint(copied))
        return len(seen)

    def flip_last_bit(tensors):
        bits = tensors["decoder.conv_out.bias"].view(torch.int16)
        bits[-1] ^= 1

    assert changed(lambda: edit_weights(copied, flip_last_bit)) == 2
    assert changed(lambda: edit_config(copied, scaling_factor=0.5)) == 3
    assert changed(lambda: edit_config(copied, new_setting=None)) == 4
    assert changed(lambda: edit_weights(copied, lambda t: t.update(extra=torch.zeros(2, 3)))) == 5
    assert changed(lambda: edit_weights(copied, lambda t: t.update(extra=torch.zeros(3, 2)))) == 6
    assert changed(lambda: edit_weights(copied, lambda t: t.update(extra=torch.zeros(3, 2).half()))) == 7


def test_a_folder_of_a_whole_pipeline_gives_its_vae(demo, tmp_path):
    shutil.copytree(DEMO_FOLDER, tmp_path / "pipe" / "vae")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    vae = load_vae(str(tmp_path / "pipe"))
    assert (vae.name, vae.sha256) == ("pipe", demo.sha256)


def in_shards(folder):
    """Spread a VAE's weights over two files, as large ones come."""
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    names = sorted(tensors)
    places = {name: f"diffusion_pytorch_model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(names)}
    for place in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == place}, folder / place, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / f"{weights.name}.index.json").write_text(json.dumps(index))


def test_a_hub_name_is_found_in_the_local_cache(demo, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for repository, inner in (("some--vae", "."), ("some--pipeline", "vae")):
        root = tmp_path / f"models--{repository}"
        shutil.copytree(DEMO_FOLDER, root / "snapshots" / ("c" * 40) / inner)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("c" * 40)
    assert load_vae("some/vae").describe() == demo.describe() | {"name": "some/vae"}
    assert load_vae("some/pipeline").sha256 == demo.sha256
    shutil.copytree(tmp_path / "models--some--vae", tmp_path / "models--in--shards")
    in_shards(tmp_path / "models--in--shards" / "snapshots" / ("c" * 40))
    assert load_vae("in/shards").sha256 == demo.sha256
    with pytest.raises(UserError, match="some/other is no local folder and not in the local Hub cache"):
        load_vae("some/other")


@pytest.mark.parametrize("name", ["", "no-such-folder", "./no/such", "/no/such", "a/b/c"])
def test_a_vae_that_is_nowhere_is_named(name):
    with pytest.raises(UserError, match=r"there is no VAE folder .*; a VAE is `demo`, a local folder"):
        load_vae(name)


def test_folders_that_are_no_vae_are_refused(tmp_path, copied):
    with pytest.raises(UserError, match="no VAE in diffusers' layout: it has no config.json"):
        load_vae(str(tmp_path))
    edit_config(copied, _class_name="UNet2DConditionModel")
    with pytest.raises(UserError, match="is a UNet2DConditionModel; the VAEs that can be used are AutoencoderKL, "):
        load_vae(str(copied))
    edit_config(copied, _class_name=...)
    with pytest.raises(UserError, match="not a diffusers model"):
        load_vae(str(copied))
    (copied / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        load_vae(str(copied))


def test_pickled_weights_are_never_loaded(copied):
    (copied / WEIGHTS).rename(copied / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model.safetensors; its .bin file is a pickle"):
        load_vae(str(copied))
    (copied / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../../etc/x.safetensors"}}')
    with pytest.raises(UserError, match=r"must map every tensor to a \.safetensors file beside it"):
        load_vae(str(copied))


def test_damaged_weights_are_refused(copied):
    whole = (copied / WEIGHTS).read_bytes()
    for damaged in (b"", whole[:1000], whole[:-1]):
        (copied / WEIGHTS).write_bytes(damaged)
        with pytest.raises(UserError, match="my-vae.* cannot be loaded, its files are damaged"):
            load_vae(str(copied))


def test_weights_that_do_not_fit_the_configuration_are_refused(copied):
    edit_weights(copied, lambda tensors: tensors.pop("decoder.conv_in.bias"))
    with pytest.raises(UserError, match=r"do not fit its config.json \(missing keys: decoder\.conv_in\.bias\)"):
        load_vae(str(copied))
    edit_weights(copied, lambda tensors: tensors.update({"decoder.conv_in.bias": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"decoder\.conv_in\.bias"):
        load_vae(str(copied))


def test_a_library_that_is_missing_is_named(copied, monkeypatch):
    monkeypatch.setattr("pipeline.vae_folder.find_spec", lambda _: None)
    edit_config(copied, _class_name="AutoencoderRAE")
    with pytest.raises(UserError, match="is an AutoencoderRAE, which needs transformers; pip install transformers"):
        load_vae(str(copied))


def recorded(vae, **other):
    return typed(vae.describe() | other, RecordedVae, "the VAE", advice="look again")


def test_the_scale_and_shift_that_a_run_recorded_of_its_own_store_are_kept_beside_the_same_vae(demo, copied):
    own = {"scaling_factor": [0.5, 2.0, 1.0, 4.0], "shift_factor": [0.0, 1.0, -1.0, 3.0]}
    for override in (None, str(copied)):
        found = find_vae(recorded(demo, **own), override)
        assert (found.scaling_factor, found.shift_factor) == tuple(own.values())
    assert find_vae(recorded(demo, **own, sha256=None)).scaling_factor == demo.scaling_factor
    edit_config(copied, force_upcast=True)
    other = find_vae(recorded(demo, **own), str(copied), allow_other=True)
    assert other.describe() | {"name": "demo", "sha256": demo.sha256} == demo.describe()


def test_what_a_store_recorded_finds_the_same_vae(demo, copied):
    assert find_vae(recorded(demo)).sha256 == demo.sha256
    assert find_vae(recorded(demo), str(copied)).name == "my-vae"
    assert find_vae(recorded(demo, sha256=None)).name == "demo"
    for name in ("my-vae", None):
        with pytest.raises(UserError, match="were made with a VAE .*; say where it is with --vae FOLDER"):
            find_vae(recorded(demo, name=name))


def test_another_vae_is_refused_unless_it_is_asked_for(demo, copied):
    edit_config(copied, scaling_factor=0.5)
    with pytest.raises(UserError, match=r"made with the VAE demo of fingerprint .* weights or settings differ"):
        find_vae(recorded(demo), str(copied))
    assert find_vae(recorded(demo), str(copied), allow_other=True).scaling_factor == 0.5


def test_a_mean_and_spread_per_channel_become_factors_per_channel(copied, pixels):
    edit_config(copied, shift_factor=None, scaling_factor=0.5, latents_mean=[1, 2, 3, 4], latents_std=[1, 2, 4, 5])
    vae = load_vae(str(copied))
    assert (vae.scaling_factor, vae.shift_factor) == ([0.5, 0.25, 0.125, 0.1], [1.0, 2.0, 3.0, 4.0])
    z = vae.encode(pixels)[:, :4]
    expected = torch.stack([(z[:, c] - (c + 1)) / std * 0.5 for c, std in enumerate((1, 2, 4, 5))], dim=1)
    assert torch.allclose(normalize(z, vae.scaling_factor, vae.shift_factor), expected)
    edit_config(copied, shift_factor=0.1)
    with pytest.raises(UserError, match="must have one per channel, and no shift_factor beside"):
        load_vae(str(copied))


@pytest.mark.parametrize(("scale", "shift"), [(0.18215, None), (0.3611, 0.1159), ([1.0, 2.0], [3.0, 4.0])])
def test_denormalising_undoes_normalising(scale, shift):
    z = torch.randn((3, 2, 5, 4), generator=torch.Generator().manual_seed(0))
    fed = normalize(z, scale, shift)
    assert torch.allclose(denormalize(fed, scale, shift), z, atol=1e-6)
    if shift is None:
        assert torch.equal(fed, z * 0.18215)
    assert torch.equal(normalize(z[None, 1], scale, shift)[0], fed[1])


def test_a_draw_is_the_mean_plus_the_spread_times_the_noise():
    generator = torch.Generator().manual_seed(0)
    moments, noise = torch.randn((2, 8, 3, 3), generator=generator), torch.randn((2, 4, 3, 3), generator=generator)
    z = draw_posterior(moments, noise)
    assert torch.allclose(z, moments[:, :4] + torch.exp(moments[:, 4:]).sqrt() * noise)
    moments[:, 4:] = 1000.0
    assert torch.allclose(draw_posterior(moments, noise), moments[:, :4] + np.exp(10.0) * noise)
    moments[:, 4:] = -1000.0
    assert torch.allclose(draw_posterior(moments, noise), moments[:, :4], atol=1e-5)


def digits_not_seen():
    """Every twelfth digit of the half that the demo VAE was not trained on, as the demo writes them."""
    from PIL import Image
    from sklearn.datasets import load_digits

    greys = load_digits().images[898::12]
    small = [Image.fromarray((grey * (255 / 16)).round().astype(np.uint8)) for grey in greys]
    return np.stack([np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC).convert("RGB")) for image in small])


def reconstructed(vae, images):
    return vae.decode(vae.encode(torch.from_numpy(to_pixels(images)))[:, :4]).numpy()


def psnr(images, others):
    return 10 * np.log10(255**2 / np.square(images.astype(float) - others).mean(axis=(1, 2, 3)))


def test_the_demo_vae_reconstructs_digits_it_has_not_seen(demo):
    images = digits_not_seen()
    assert psnr(images, reconstructed(demo, images)).mean() >= 27


def test_the_demo_vae_reconstructs_colourful_photographs(demo):
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo).resize((256, 192)) for photo in load_sample_images().images]
    images = np.stack([np.asarray(photo) for photo in photos])
    copies = reconstructed(demo, images)
    assert psnr(images, copies).min() >= 20
    for image, copy in zip(images.astype(float), copies.astype(float), strict=True):
        for first, second in ((0, 1), (1, 2)):  # red against green, green against blue: the hues are right
            hue, copied_hue = (picture[..., first] - picture[..., second] for picture in (image, copy))
            assert np.corrcoef(hue.ravel(), copied_hue.ravel())[0, 1] > 0.7


def test_the_demo_vaes_scale_gives_latents_of_about_unit_spread(demo):
    images = digits_not_seen()
    z = normalize(demo.encode(torch.from_numpy(to_pixels(images)))[:, :4], demo.scaling_factor, demo.shift_factor)
    assert 0.5 < z.std() < 2
    with safe_open(DEMO_FOLDER / WEIGHTS, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
