"""Checkpoints: what is written comes back, every known form is read, and nothing half-right is ever loaded."""

import argparse
import json
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint import checkpoint_folders, load_checkpoint, newest_checkpoint, read_checkpoint, read_stored
from pipeline.checkpoint.folder import write_model_files
from pipeline.checkpoint.release import default_info
from pipeline.diffusion import GaussianDiffusion, RectifiedFlow
from pipeline.dit import DiT, DiTConfig
from pipeline.runtime.errors import UserError


@pytest.fixture(scope="module")
def forward_error(golden):
    """The largest difference between a network's output and the release's recorded one."""

    def measure(model):
        with torch.no_grad():
            output = model(golden["forward.x"], golden["forward.t"], golden["forward.y"])
        return float((output - golden["forward.out"]).abs().max())

    return measure


def tiny_config(**changes):
    sizes = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "in_channels": 4}
    return DiTConfig(**{**sizes, **changes})


def filled(config, seed=0):
    """A network whose every weight differs from zero, so that nothing hides."""
    model = DiT(config, seed=None)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.2)
    return model.eval()


def write_checkpoint(folder, config=None, *, averages=("ema",), raw=True, **info):
    """A checkpoint folder whose raw weights have seed 0 and whose averages have seeds 1, 2, …."""
    config = config or tiny_config()
    folder.mkdir(parents=True)
    write_model_files(
        folder,
        info={**default_info(config), **info},
        model=filled(config).state_dict() if raw else None,
        averages={name: filled(config, k).state_dict() for k, name in enumerate(averages, start=1)},
    )
    return folder


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_what_is_written_comes_back_with_all_that_sampling_needs(tmp_path):
    config = tiny_config(input_size=(4, 6), conditioning="cross-attention", qk_norm=True)
    folder = write_checkpoint(
        tmp_path / "c", config, step=70, classes=["a", "b", "c"], diffusion=RectifiedFlow().to_json()
    )
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config == config
    assert checkpoint.weights == "ema"
    assert checkpoint.folder == folder
    assert not checkpoint.model.training
    assert checkpoint.process == RectifiedFlow()
    assert (checkpoint.info["step"], checkpoint.info["classes"]) == (70, ["a", "b", "c"])
    assert same_weights(checkpoint.model, filled(config, 1))


def test_raw_and_further_averages_are_read_by_name(tmp_path):
    folder = write_checkpoint(tmp_path / "c", averages=("ema", "ema-0.99"))
    for weights, seed in {"raw": 0, "ema": 1, "0.99": 2, "ema-0.99": 2}.items():
        assert same_weights(read_checkpoint(folder, weights=weights).model, filled(tiny_config(), seed)), weights


def test_missing_averages_name_the_flag_that_helps(tmp_path):
    folder = write_checkpoint(tmp_path / "c", averages=())
    with pytest.raises(UserError, match="has no ema weights; pass --weights raw"):
        load_checkpoint(folder)


def test_equal_weights_give_equal_bytes(tmp_path):
    first, second = (write_checkpoint(tmp_path / name) for name in "ab")
    files = sorted(file.name for file in first.iterdir())
    assert files == ["config.json", "ema.safetensors", "model.safetensors"]
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_a_run_is_read_at_its_newest_whole_checkpoint(tmp_path):
    for step in (5, 20, 100):
        write_checkpoint(tmp_path / "checkpoints" / f"step-{step:07d}", step=step)
    (tmp_path / "checkpoints" / "step-0000200").mkdir()  # not whole
    (tmp_path / "checkpoints" / ".step-0000300.partial").mkdir()
    assert [step for step, _ in checkpoint_folders(tmp_path)] == [5, 20, 100]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-0000100"
    assert read_checkpoint(tmp_path).info["step"] == 100
    assert read_checkpoint(tmp_path / "checkpoints").info["step"] == 100


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="is a run without a checkpoint yet"):
        load_checkpoint(tmp_path)


def test_one_weight_file_is_read_with_the_config_beside_it(tmp_path):
    folder = write_checkpoint(tmp_path / "c")
    assert same_weights(load_checkpoint(folder / "model.safetensors")[0], filled(tiny_config(), 0))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_the_releases_state_dict_loads_and_computes_the_same(tmp_path, state, forward_error, suffix, prefix):
    path = tmp_path / f"weights{suffix}"
    prefixed = {prefix + name: tensor for name, tensor in state.items()}
    save_file(prefixed, path) if suffix == ".safetensors" else torch.save(prefixed, path)
    model, config = load_checkpoint(path, num_heads=4)
    assert forward_error(model) < 2e-5
    assert config == DiTConfig(input_size=8, hidden_size=64, depth=3, num_heads=4, num_classes=10)


def test_a_training_file_of_the_release_gives_its_ema_and_on_request_its_raw_weights(tmp_path, state, forward_error):
    path = tmp_path / "0050000.pt"
    raw = {name: tensor + 1 for name, tensor in state.items()}
    args = argparse.Namespace(model="DiT-XL/2", epochs=1400)
    torch.save({"model": raw, "ema": state, "opt": {"state": {}, "param_groups": []}, "args": args}, path)
    assert forward_error(load_checkpoint(path, num_heads=4)[0]) < 2e-5
    stored = read_stored(path, weights="raw", num_heads=4)
    assert torch.equal(stored.state["x_embedder.proj.bias"], state["x_embedder.proj.bias"] + 1)


def test_blocks_compiled_one_by_one_load_too(tmp_path, state, forward_error):
    names = {name: re.sub(r"^(blocks\.\d+)\.", r"\1._orig_mod.", name) for name in state}
    torch.save({names[name]: tensor for name, tensor in state.items()}, tmp_path / "w.pt")
    assert forward_error(load_checkpoint(tmp_path / "w.pt", num_heads=4)[0]) < 2e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"conditioning": "adaln"},
        {"conditioning": "in-context", "learn_sigma": False},
        {"conditioning": "cross-attention", "mlp_ratio": 2.0},
        {"patch_size": 1, "in_channels": 3, "num_classes": 0},
        {"input_size": (2, 8), "qk_norm": True},
    ],
)
def test_the_configuration_is_read_off_the_shapes(tmp_path, changes):
    model = filled(tiny_config(**changes))
    save_file({**model.state_dict(), "pos_embed": model.pos_embed}, tmp_path / "w.safetensors")
    assert load_checkpoint(tmp_path / "w.safetensors", num_heads=2)[1] == model.config


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16), (128, 4)])
def test_heads_come_from_the_published_widths(tmp_path, width, heads):
    model = DiT(tiny_config(hidden_size=width, num_heads=heads, depth=1))
    save_file({**model.state_dict(), "pos_embed": model.pos_embed}, tmp_path / "w.safetensors")
    assert load_checkpoint(tmp_path / "w.safetensors")[1].num_heads == heads


def test_an_unknown_width_asks_for_the_heads(tmp_path, state):
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"width 64 is none of the published ones.*give --num-heads"):
        load_checkpoint(tmp_path / "w.pt")
    with pytest.raises(UserError, match="--num-heads 5 does not divide"):
        load_checkpoint(tmp_path / "w.pt", num_heads=5)


def test_the_releases_facts_stand_in_where_a_file_has_none(tmp_path):
    model = filled(tiny_config(num_classes=1000, depth=1))
    torch.save({**model.state_dict(), "pos_embed": model.pos_embed}, tmp_path / "w.pt")
    checkpoint = read_checkpoint(tmp_path / "w.pt", num_heads=2)
    assert checkpoint.process == GaussianDiffusion()
    assert checkpoint.info["class_ids"][207] == "n02099601"
    assert checkpoint.info["classes"][207].startswith("golden retriever")
    assert checkpoint.info["vae"]["scaling_factor"] == 0.18215


def test_every_missing_surplus_and_misshapen_tensor_is_listed(tmp_path, state):
    broken = dict(state)
    del broken["blocks.1.mlp.fc2.bias"], broken["t_embedder.mlp.0.weight"]
    broken |= {"blocks.0.extra": torch.zeros(1), "another": torch.zeros(1)}
    broken["final_layer.linear.bias"] = torch.zeros(7)
    torch.save(broken, tmp_path / "w.pt")
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "w.pt", num_heads=4)
    assert "2 missing: blocks.1.mlp.fc2.bias, t_embedder.mlp.0.weight" in str(error.value)
    assert "2 surplus: another, blocks.0.extra" in str(error.value)
    assert "1 of another shape: final_layer.linear.bias [7] instead of [32]" in str(error.value)


def test_a_file_of_something_else_says_what_is_missing(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"is not a DiT's state dict: it lacks blocks\.0\.attn\.qkv\.weight"):
        load_checkpoint(tmp_path / "w.pt")


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, state, nested):
    content = {**state, "extra": Malicious(tmp_path / "ran")}
    torch.save({"ema": content} if nested else content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"is refused: opening it would run code \((os|posix)\.system\)"):
        load_checkpoint(tmp_path / "w.pt", num_heads=4)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_of_any_age_that_would_run_code_is_refused_by_the_name_of_what_it_calls(tmp_path, protocol):
    with (tmp_path / "w.pt").open("wb") as file:
        pickle.dump({"ema": Malicious(tmp_path / "ran")}, file, protocol=protocol)
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "w.pt")
    said = str(error.value)
    assert "is refused: opening it would run code (posix.system)" in said
    assert "weights_only" not in said, "no advice to switch the safeguard off"
    assert not (tmp_path / "ran").exists()


def test_weights_of_no_floating_point_type_are_refused_by_name(tmp_path, state):
    torch.save({**state, "final_layer.linear.bias": torch.zeros(32, dtype=torch.int8)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"1 of no floating-point type: final_layer\.linear\.bias torch\.int8"):
        load_checkpoint(tmp_path / "w.pt", num_heads=4)


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("final_layer.linear.weight", torch.zeros(()), r"final_layer\.linear\.weight is \[\]"),
        ("blocks.0.mlp.fc1.weight", torch.zeros(()), r"fc1\.weight is \[\]"),
        ("y_embedder.embedding_table.weight", torch.zeros(0, 64), r"embedding_table\.weight is \[0, 64\]"),
        ("x_embedder.proj.weight", torch.zeros(64, 4, 0, 0), r"proj\.weight is \[64, 4, 0, 0\]"),
        ("pos_embed", torch.zeros(()), r"pos_embed is \[\], not"),
        ("pos_embed", torch.zeros(2, 16, 64), r"pos_embed is \[2, 16, 64\], not"),
    ],
)
def test_tensors_of_another_rank_are_named(tmp_path, state, name, tensor, sentence):
    torch.save({**state, name: tensor}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(tmp_path / "w.pt", num_heads=4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "empty"])
def test_a_damaged_weight_file_is_named(tmp_path, state, suffix, damage):
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "zeros": bytes(len(whole)), "empty": b""}[damage])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        load_checkpoint(path, num_heads=4)


def test_unknown_formats_and_versions_are_refused_by_name(tmp_path):
    folder = write_checkpoint(tmp_path / "c")
    info = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**info, "version": 2}))
    with pytest.raises(UserError, match=r"is a dit-checkpoint of version 2, but this program reads version 1"):
        load_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({**info, "format": "dit-latents"}))
    with pytest.raises(UserError, match="has format 'dit-latents', not 'dit-checkpoint'"):
        load_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({**info, "model": {**info["model"], "spiral": True}}))
    with pytest.raises(UserError, match="has no setting spiral"):
        load_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"diffusion": {}}, "the objective is None"),
        ({"diffusion": {"objective": "ddpm", "steps": "x"}}, "steps is 'x' but must be a whole number"),
        ({"diffusion": "ddpm"}, "diffusion is 'ddpm', but must be an object"),
        ({"vae": None, "classes": None}, "classes is None, but must be a list; vae is None, but must be an object"),
        (
            {"latent": {"kind": "moments"}},
            "latent.channels is missing; latent.height is missing; latent.width is missing; latent.downsample",
        ),
        ({"step": "a"}, "step is 'a', but must be a whole number"),
        (
            {"vae": {"name": "demo"}, "image": {"size": 0}},
            "vae.scaling_factor is missing; image.size is 0, but must be",
        ),
        ({"vae": {"scaling_factor": [1.0, 2.0]}}, "vae.scaling_factor is [1.0, 2.0], but must be 4 numbers"),
        (
            {"latent": {"kind": "moments", "channels": 4, "height": 8, "width": 8, "downsample": "8"}},
            "latent.downsample is '8', but must be a whole number",
        ),
        ({"training": {"ema_sigma": "x"}}, "training.ema_sigma is 'x', but must be a list"),
        ({"model": {"input_size": [8]}}, "input_size is [8] but must be one whole number or two"),
        ({"model": {"depth": 6.0}}, "depth is 6.0 but must be a whole number"),
        ({"model": {"depth": "x"}}, "depth is 'x' but must be a whole number"),
    ],
)
def test_settings_of_another_type_are_one_sentence_that_names_the_file(tmp_path, changes, sentence):
    folder = write_checkpoint(tmp_path / "c")
    info = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**info, **changes}))
    with pytest.raises(UserError) as error:
        read_checkpoint(folder)
    assert sentence in str(error.value) and "config.json" in str(error.value)


def test_nothing_there_says_what_would_be_taken(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint at .*absent; give a run folder"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="is no checkpoint: it has neither"):
        load_checkpoint(tmp_path)


def test_values_of_another_precision_are_read_as_float32(tmp_path, state, forward_error):
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "w.pt")
    model, _ = load_checkpoint(tmp_path / "w.pt", num_heads=4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert forward_error(model) < 0.05


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [{"depth": 10**9}, {"hidden_size": 10**9}, {"num_classes": 10**12}])
def test_a_network_many_times_its_weights_is_refused_before_it_is_built(tmp_path, size):
    folder = write_checkpoint(tmp_path / "c")
    info = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**info, "model": {**info["model"], **size}}))
    with pytest.raises(UserError, match=r"describes a network of at least .* parameters .* but its weights hold"):
        load_checkpoint(folder)
