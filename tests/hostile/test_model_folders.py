"""JSON of diffusers' and transformers' folders: typed and bounded before a library gets it, refused by file and key."""

import json
from functools import partial

import pytest

from pipeline.runtime.errors import UserError
from tests.hostile import model_folders
from tests.hostile.model_folders import FILES, INDEX, VAE_CONFIG, encoder_json, read_encoder, read_pipeline

ENCODER, PIXELS = "config.json", "preprocessor_config.json"
READERS = {
    "VAE": (lambda: VAE_CONFIG, partial(model_folders.read_vae, load=True)),
    "encoder": (lambda: encoder_json(ENCODER), partial(read_encoder, ENCODER, load=True)),
    "processor": (lambda: encoder_json(PIXELS), partial(read_encoder, PIXELS, load=True)),
    "index": (lambda: INDEX, model_folders.read_index),
    **{name: (lambda name=name: FILES[name], partial(read_pipeline, name)) for name in FILES},
}
NEAR_ENDLESS = 10**400


@pytest.mark.parametrize("name", READERS)
def test_the_folders_that_are_changed_are_sound_and_unknown_keys_are_no_matter(name, tmp_path):
    value, read = READERS[name]
    read(tmp_path, json.dumps(value() | {"_mine": [1]}).encode())


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("VAE", {"block_out_channels": 16}, "config.json is damaged: block_out_channels is 16, but must be a list"),
        ("VAE", {"block_out_channels": []}, "block_out_channels is .*, but must be"),
        ("VAE", {"latent_channels": "4"}, "latent_channels is '4', but must be a whole number"),
        ("VAE", {"layers_per_block": True}, "layers_per_block is True, but must be a whole number"),
        ("VAE", {"sample_size": 1e38}, "sample_size is 1e.38, but must be a whole number"),
        ("VAE", {"norm_num_groups": 0}, "norm_num_groups is 0, but must be a whole number >= 1"),
        ("VAE", {"latent_channels": 900_000}, "has latent_channels 900000 .* none longer than"),
        ("VAE", {"_class_name": ["AutoencoderKL"]}, "is a .*AutoencoderKL.*; the VAEs that can be used are"),
        ("VAE", {"scaling_factor": NEAR_ENDLESS}, "scaling_factor"),
        ("VAE", {"down_block_types": ["\x1b[31m"] * 4}, "cannot be loaded"),
        ("encoder", {"model_type": None}, "config.json is damaged: model_type is None, but must be a text"),
        ("encoder", {"hidden_size": "8"}, "hidden_size is '8', but must be"),
        ("encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but must be .* <= 10000"),
        ("encoder", {"num_hidden_layers": 9000}, "num_hidden_layers 9000 in its config.json, but its weights are"),
        ("encoder", {"num_hidden_layers": -1}, "num_hidden_layers is -1, but must be a whole number >= 0"),
        ("encoder", {"patch_size": 0}, "config.json is damaged: patch_size is 0, but must be"),
        ("encoder", {"vision_config": {"patch_size": 0}}, "vision_config.patch_size is 0, but must be"),
        ("encoder", {"id2label": ["a"]}, "id2label is ..a.., but must be an object"),
        ("encoder", {"mlp_ratio": []}, "cannot be used"),
        ("processor", {"size": {"height": 10**6, "width": 10**6}}, "size.* is .*1000000.*, but must be .* <= 4096"),
        ("processor", {"rescale_factor": "x"}, "rescale_factor is 'x', but must be a number"),
        ("processor", {"image_std": [0.2, 0, 0.2]}, "image_std has a 0"),
        ("processor", {"image_mean": [float("nan")] * 3}, "image_mean.* is nan, but must be a finite number"),
        ("index", {"weight_map": {"a": "../x.safetensors"}}, "a .safetensors file beside it, but names '../x.safet"),
        ("index", {"weight_map": {"a": 3}}, "weight_map.* is 3, but must be a text"),
        ("index", {"weight_map": {"a": "\x1b.safetensors"}}, r"names '\\x1b.safetensors'"),
        ("model_index.json", {"id2label": {"-1": "ant"}}, "id2label has the key '-1', but must have labels"),
        ("model_index.json", {"_dit": {"step": "3"}}, "_dit.step is '3', but must be a whole number"),
        ("model_index.json", {"_dit": {"vae": 3}}, "_dit.vae is 3, but must be an object"),
        ("transformer/config.json", {"num_layers": 1.5}, "config.json is damaged: num_layers is 1.5, but must be"),
        ("transformer/config.json", {"sample_size": 1 << 30}, "sample_size is 1073741824, but must be .* <= 1048576"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps is 0, but must be"),
        ("scheduler/scheduler_config.json", {"beta_end": None}, "beta_end is None, but must be a number"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor is 'x', but must be a number"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_setting_of_another_type_or_size_is_refused_by_file_and_key(name, change, sentence, tmp_path):
    value, read = READERS[name]
    with pytest.raises(UserError, match=sentence) as refusal:
        read(tmp_path, json.dumps(value() | change).encode())
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 1000


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 200 + "]" * 200, "nests lists"),
        ('{"a": ' + "1" * 5000 + "}", "digits"),
        ("[]", "describes? a|must|is no|not a"),
        ("{", "not valid JSON"),
    ],
)
def test_json_that_is_too_deep_too_long_or_no_object_is_refused(name, text, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        READERS[name][1](tmp_path, text.encode())
