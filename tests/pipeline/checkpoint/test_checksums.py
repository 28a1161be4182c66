"""Damaged weights are never used: each file that is read is compared with what was recorded when it was written."""

import hashlib
import json
import logging
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.checkpoint import load_checkpoint, read_checkpoint, read_stored
from pipeline.checkpoint.folder import describe_files, find_damage, write_model_files
from pipeline.checkpoint.release import default_info
from pipeline.checkpoint.tensor_files import find_changed, save_safetensors
from pipeline.checkpoint.weight_files import save_pickled_tensors
from pipeline.dit import DiT, DiTConfig
from pipeline.runtime.errors import UserError

CONFIG = DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)


def weights(seed):
    return DiT(CONFIG, seed=seed).state_dict()


def flip_a_bit(path, at=-5):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def trained(tmp_path):
    """A checkpoint as training leaves it."""
    folder = tmp_path / "trained"
    (folder / "state").mkdir(parents=True)
    write_model_files(folder, info=default_info(CONFIG), model=weights(0), averages={"ema": weights(1)})
    files = describe_files(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    (folder / "state" / "files.json").write_text(json.dumps({"files": files}))
    return folder


@pytest.fixture
def converted(tmp_path):
    """A checkpoint as a conversion leaves it."""
    folder = tmp_path / "converted"
    folder.mkdir()
    write_model_files(folder, info=default_info(CONFIG), model=None, averages={"ema": weights(1)}, sums=True)
    return folder


@pytest.mark.parametrize("kind", ["trained", "converted"])
def test_one_flipped_bit_of_the_weights_is_refused_and_may_be_let_pass(kind, request):
    folder = request.getfixturevalue(kind)
    load_checkpoint(folder)
    flip_a_bit(folder / "ema.safetensors")
    for read in (read_checkpoint, read_stored):
        with pytest.raises(UserError, match=r"is damaged: ema.safetensors has other contents.*--no-verify-weights"):
            read(folder)
        read(folder, verify=False)


def test_only_the_files_that_are_read_are_looked_at(trained):
    flip_a_bit(trained / "ema.safetensors")
    assert read_checkpoint(trained, weights="raw").weights == "raw"
    assert "ema.safetensors has other contents" in find_damage(trained)


def test_a_changed_digit_of_the_settings_is_noticed(trained):
    path = trained / "config.json"
    path.write_text(path.read_text().replace("0.18215", "0.18216"))
    with pytest.raises(UserError, match=r"config.json has other contents"):
        read_checkpoint(trained)


def test_damage_is_said_before_what_it_led_to(trained):
    path = trained / "config.json"
    path.write_text(path.read_text().replace('"depth": 1', '"depth": 2'))
    with pytest.raises(UserError, match=r"config.json has other contents"):
        read_checkpoint(trained)


def test_a_damaged_record_is_no_traceback(trained, converted):
    (trained / "state" / "files.json").write_text('{"files": {"ema.safetensors": 3}}')
    with pytest.raises(UserError, match=r"files.json is damaged"):
        read_checkpoint(trained)
    content = json.loads((converted / "config.json").read_text()) | {"files": [1]}
    (converted / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config.json is damaged"):
        read_checkpoint(converted)


def test_a_folder_without_sums_loads_as_before_and_says_so(trained, caplog):
    (trained / "state" / "files.json").unlink()
    with caplog.at_level(logging.INFO):
        read_checkpoint(trained)
    assert "has no checksums, so that its weights are not checked" in caplog.text
    caplog.clear()
    read_checkpoint(trained, verify=False)
    assert caplog.text == ""


def test_a_lone_safetensors_file_carries_the_sum_of_all_but_its_metadata(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.float16)}
    save_safetensors(path, tensors, sealed=True)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.pop("__metadata__")
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert list(metadata) == ["format", "sha256"], "in this order every time"
    assert metadata == {"format": "pt", "sha256": hashlib.sha256(canonical + data).hexdigest()}
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
    assert {name: tensor.tolist() for name, tensor in load_file(path).items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert find_changed(path) is None
    flip_a_bit(path)
    assert find_changed(path) == "w.safetensors has other contents than were written"


def test_a_flipped_bit_of_a_lone_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_safetensors(path, weights(0), sealed=True)
    assert load_checkpoint(path, num_heads=2)[1].hidden_size == 32
    flip_a_bit(path)
    with pytest.raises(UserError, match=r"w.safetensors has other contents"):
        load_checkpoint(path, num_heads=2)
    read_checkpoint(path, num_heads=2, verify=False)


def test_a_flipped_bit_of_a_pickled_file_is_found_by_its_archives_crc(tmp_path):
    path = tmp_path / "w.pt"
    save_pickled_tensors(path, weights(0))
    load_checkpoint(path, num_heads=2)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    flip_a_bit(path, at=largest.header_offset + largest.file_size // 2 + 100)
    with pytest.raises(UserError, match=rf"is damaged: {largest.filename} in w.pt has other contents"):
        load_checkpoint(path, num_heads=2)
    read_checkpoint(path, num_heads=2, verify=False)
