"""Records with values of other types, or with names that leave their folder: refused by key."""

import json

import pytest

from pipeline.checkpoint.folder import find_damage, recorded_files
from pipeline.runtime.errors import UserError
from sample.sidecar import read_sidecar
from tests.hostile.test_mutants import FILES, SIDECAR, TRAINER
from train.checkpointing import restore
from train.run_folder import recorded_intervals


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"step": "3"}, "trainer.json is damaged: step is '3', but must be a whole number"),
        ({"scale": None}, "scale is None, but must be a number"),
        ({"skipped": float("nan")}, "skipped is nan, but must be"),
        ({"rollbacks": -1}, "rollbacks is -1, but must be a whole number >= 0"),
        ({"version": [1]}, r"version \[1\], but this program resumes"),
    ],
)
def test_a_trainers_record_of_other_types_is_refused_by_key(tmp_path, change, sentence):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "trainer.json").write_text(json.dumps({**TRAINER, **change}))
    with pytest.raises(UserError, match=sentence):
        restore(tmp_path, None)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a//b", "a\0", "a\x1b[2J", "..\\x"])
def test_a_listed_file_outside_of_its_folder_is_refused_and_never_looked_at(tmp_path, name):
    (tmp_path / "state").mkdir()
    entry = FILES["files"]["state/trainer.json"]
    (tmp_path / "state" / "files.json").write_text(json.dumps({**FILES, "files": {name: entry}}))
    with pytest.raises(UserError, match="is no file of its folder"):
        recorded_files(tmp_path)
    assert "is no file of its folder" in find_damage(tmp_path)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [({"bytes": "4", "sha256": ""}, "bytes"), ({"bytes": 4}, "sha256 is missing"), (None, "None")],
)
def test_a_listed_file_of_other_types_is_refused(tmp_path, entry, sentence):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "files.json").write_text(json.dumps({**FILES, "files": {"a": entry}}))
    with pytest.raises(UserError, match=f"files.json is damaged: .*{sentence}"):
        recorded_files(tmp_path)


@pytest.mark.parametrize("key", ["recipe", "output", "strip"])
def test_a_sidecar_of_other_types_is_refused_by_key(tmp_path, key):
    (tmp_path / "x.png.json").write_text(json.dumps({**SIDECAR, key: ["\x1b"]}))
    with pytest.raises(UserError, match=rf"x.png.json is damaged: {key} is \['\\x1b'\], but must be an object"):
        read_sidecar(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a", r"it is \['a'\], but must be an object"),
        ("log-every: {a: 1}", "must be"),
        ("steps: [[1]]", "must be"),
        ("1: 2", "must be a text"),
        ("a: " + "[" * 5000, "cannot be read"),
        ("a: &b [x, x]\nc: &d [*b, *b]\ne: [*d, *d]", "must be"),
        ("a: !!python/object/apply:os.system [ls]", "cannot be read"),
        ("a: \0", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("a: " + "x" * (1 << 20), "more than the 1.0 MB"),
    ],
)
def test_the_settings_of_a_run_that_are_none_are_refused_in_one_sentence(tmp_path, text, sentence):
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"config.yaml .*{sentence}") as refusal:
        recorded_intervals(tmp_path)
    assert len(str(refusal.value)) < 1000


def test_the_settings_of_a_run_are_flags_and_values(tmp_path):
    (tmp_path / "config.yaml").write_text("log-every: 10\nvalidate-every: true\nbetas: [0.9, 0.999]\nvae: null\n")
    assert recorded_intervals(tmp_path) == {"log-every": 10}
