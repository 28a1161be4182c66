"""Weights cut into shards with an index, as huggingface_hub cuts them: read like a whole file, strictly, from inside their folder alone."""

import json
import shutil

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import load_checkpoint, read_checkpoint
from pipeline.checkpoint.folder import describe_files, find_damage, weight_files, write_model_files
from pipeline.checkpoint.release import default_info
from pipeline.convert.options import ConvertOptions
from pipeline.convert.run import convert
from pipeline.dit import DiT, DiTConfig
from pipeline.inspect.checkpoint import describe_checkpoint
from pipeline.runtime.errors import UserError

CONFIG = DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)


def weights(seed):
    return {name: tensor + seed for name, tensor in DiT(CONFIG, seed=seed).state_dict().items()}


def cut(folder, stem, tensors, *, most="20KB"):
    save_torch_state_dict(dict(tensors), folder, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=most)
    return sorted(folder.glob(f"{stem}-0*-of-0*.safetensors"))


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint as training leaves it, its raw weights and two averages in shards."""
    folder = tmp_path / "sharded"
    (folder / "state").mkdir(parents=True)
    write_model_files(folder, info=default_info(CONFIG), model=None, averages={})
    for seed, stem in enumerate(("model", "ema", "ema-slow")):
        assert len(cut(folder, stem, weights(seed))) > 2
    seal(folder)
    return folder


def seal(folder):
    (folder / "state/files.json").unlink(missing_ok=True)
    files = describe_files(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    (folder / "state/files.json").write_text(json.dumps({"files": files}))


def is_network(path, seed, **asked):
    model, wanted = read_checkpoint(path, **asked).model, weights(seed)
    return all(tensor.equal(wanted[name]) for name, tensor in model.state_dict().items())


def test_shards_are_read_as_the_whole_file_by_its_name_and_by_any_of_theirs(sharded):
    assert list(weight_files(sharded)) == ["ema-slow", "ema", "raw"]
    for seed, name in enumerate(("raw", "ema", "slow")):
        assert is_network(sharded, seed, weights=name)
    for name in ("model.safetensors", "model.safetensors.index.json", "model-00002-of-00003.safetensors"):
        shard = name if (sharded / name).exists() else min(sharded.glob("model-*")).name
        assert is_network(sharded / (shard if "-of-" in name else name), 0)


def test_shards_without_settings_are_read_as_a_bare_state_dict(tmp_path):
    cut(tmp_path, "model", weights(2))
    model, config = load_checkpoint(tmp_path / "model.safetensors.index.json", num_heads=2)
    assert config.hidden_size == CONFIG.hidden_size
    assert all(tensor.equal(weights(2)[name]) for name, tensor in model.state_dict().items())


def test_what_describes_or_converts_checkpoints_takes_shards(sharded, tmp_path):
    said = describe_checkpoint(str(sharded), verify=True)
    shards = len(list(sharded.glob("ema-0*")))
    assert any("ema.safetensors" in line and f"in {shards} shards" in line for line in said)
    assert said[-1] == "verified: ema-slow and ema and raw fit the network exactly, every value is finite"
    convert(ConvertOptions(from_=str(sharded), to=str(tmp_path / "whole"), format="dit"))
    whole = load_file(tmp_path / "whole/ema.safetensors")
    assert whole.keys() == weights(1).keys() and all(whole[name].equal(weights(1)[name]) for name in whole)


def test_a_flipped_bit_in_any_shard_or_in_the_index_is_refused(sharded):
    for path in sorted(sharded.glob("ema-0*")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert path.name in (find_damage(sharded) or "")
        with pytest.raises(UserError, match=f"is damaged: {path.name} has other contents"):
            read_checkpoint(sharded)
        path.write_bytes(content)
    index = sharded / "ema.safetensors.index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(UserError, match="is damaged: ema.safetensors.index.json has"):
        read_checkpoint(sharded)
    assert is_network(sharded, 1, verify=False)


def lose(folder):
    max(folder.glob("ema-0*")).unlink()


def shorten(folder):
    path = max(folder.glob("ema-0*"))
    path.write_bytes(path.read_bytes()[:-9])


def take_from_another_network(folder):
    path = max(folder.glob("ema-0*"))
    save_file({f"other.{name}": tensor for name, tensor in load_file(path).items()}, path)


def rename_in_index(folder, new):
    path = max(folder.glob("ema-0*"))
    index = folder / "ema.safetensors.index.json"
    index.write_text(index.read_text().replace(path.name, new))


def point_outside(folder):
    shutil.copy(max(folder.glob("ema-0*")), folder.parent / "elsewhere.safetensors")
    rename_in_index(folder, "../elsewhere.safetensors")


def point_at_other_weights(folder):
    rename_in_index(folder, max(folder.glob("model-0*")).name)


def spoil_index(folder):
    (folder / "ema.safetensors.index.json").write_text('{"weight_map": {"x": 3}}')


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lose, r"ema-0000\d-of-0000\d.safetensors is missing, one of the \d shards of ema.safetensors; restore"),
        (shorten, r"ema-0000\d-of-0000\d.safetensors is damaged"),
        (take_from_another_network, r"ema-0000\d-of-0000\d.safetensors does not hold what ema.safetensors.index.json"),
        (point_outside, "but names '../elsewhere.safetensors'; restore"),
        (point_at_other_weights, r"names model-0000\d-of-0000\d.safetensors, which cannot be its shards"),
        (spoil_index, "ema.safetensors.index.json must map every tensor to a .safetensors file beside it"),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_shards_that_are_not_whole_are_one_sentence_even_where_nothing_is_compared(sharded, damage, sentence):
    damage(sharded)
    with pytest.raises(UserError, match=sentence):
        read_checkpoint(sharded, verify=False)


def test_tensors_of_another_shape_are_listed(sharded):
    path = next(path for path in sharded.glob("ema-0*") if "final_layer.linear.bias" in load_file(path))
    save_file(load_file(path) | {"final_layer.linear.bias": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"final_layer.linear.bias \[3\] instead of \[32\]"):
        read_checkpoint(sharded, verify=False)
