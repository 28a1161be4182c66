"""Records with values of other types, or with names that leave their folder: refused by key."""

import json
from pathlib import Path

import numpy as np
import pytest

from extract.class_names import class_names
from pipeline.checkpoint.folder import find_damage, recorded_files
from pipeline.checkpoint.origins import origin_of
from pipeline.checkpoint.snapshots import snapshots
from pipeline.checkpoint.tensor_files import PROCESS
from pipeline.diffusion.process import make_process
from pipeline.dit import DiTConfig
from pipeline.latents.manifest import is_intact
from pipeline.runtime.errors import UserError
from sample.evaluate.reference import StatisticsFile, read_written
from sample.evaluate.report import read_result
from sample.sidecar import read_sidecar
from tests.hostile.test_mutants import FILES, SCORES, SIDECAR, TRAINER
from train.checkpointing import restore
from train.kept_checkpoints import tells_skips
from train.plot.reference import make_reference
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


def test_a_recipe_of_other_types_is_refused_by_key_and_unknown_keys_are_kept(tmp_path):
    recipe = {"steps": "\x1b[2J", "guidance": 1e999, "checkpoint": {"step": -1}, "mine": [1]}
    (tmp_path / "x.png.json").write_text(json.dumps({**SIDECAR, "recipe": recipe, "mine": 3}))
    refusal = "recipe.steps is .*x1b.*; recipe.guidance is inf, but must be a finite number"
    with pytest.raises(UserError, match=f"recipe.checkpoint.step is -1, .*{refusal}"):
        read_sidecar(tmp_path / "x.png")
    (tmp_path / "x.png.json").write_text(json.dumps({**SIDECAR, "recipe": {"mine": [1]}, "mine": 3}))
    sidecar = read_sidecar(tmp_path / "x.png")
    assert (sidecar["mine"], sidecar.recipe["mine"], sidecar.recipe.steps) == (3, [1], None)


def reference(path, provenance=None):
    arrays = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(path, **arrays, **({} if provenance is None else {"provenance": np.asarray(json.dumps(provenance))}))
    return path


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"inception": ["x"]}, r"inception is \['x'\], but must be an object"),
        ({"inception": {"sha256": 3}}, "inception.sha256 is 3, but must be a text"),
        ({"version": 2}, "of version 2, but version 1 is known"),
    ],
)
def test_what_a_reference_says_of_itself_is_refused_by_key(tmp_path, said, sentence):
    path = reference(tmp_path / "r.npz", {"format": "dit-reference", "version": 1, **said})
    with pytest.raises(UserError, match=rf"r.npz .*{sentence}"):
        StatisticsFile(path)


def test_references_of_other_projects_are_read_and_unknown_keys_of_ours_are_kept(tmp_path):
    for provenance in (None, {"format": "theirs", "inception": 3}, [1]):
        foreign = StatisticsFile(reference(tmp_path / "r.npz", provenance))
        assert not foreign.provenance and foreign.provenance.inception is None
        assert foreign.gaussian("features_2048").mean.shape == (2048,)
    ours = {"format": "dit-reference", "version": 1, "inception": {"sha256": "a", "file": "f"}, "mine": [1]}
    read = StatisticsFile(reference(tmp_path / "r.npz", ours)).provenance
    assert (dict(read), read.inception.sha256) == (ours, "a")


@pytest.mark.parametrize(
    ("text", "sentence"), [("[]", "it is"), ('{"request": 3}', "request is 3"), ("{", "not valid")]
)
def test_the_json_beside_a_reference_and_a_result_of_other_types_are_refused(tmp_path, text, sentence):
    (tmp_path / "r.npz.json").write_text(text)
    with pytest.raises(UserError, match=f"r.npz.json is .*{sentence}"):
        read_written(tmp_path / "r.npz.json")
    (tmp_path / "RESULT.json").write_text(json.dumps({**SCORES, "metrics": {"FID-50k": text}}))
    with pytest.raises(UserError, match="RESULT.json is damaged: metrics.* must be a number"):
        read_result(tmp_path / "RESULT.json")


@pytest.mark.parametrize("key", ["made", "final"])
@pytest.mark.parametrize(
    "name", ["../../victim", "/victim", "..", "../..", "ready/0/..", "ready/../../victim", "", "\0"]
)
def test_a_record_of_names_elsewhere_moves_nothing(tmp_path, key, name):
    (tmp_path / "data" / ".x.png.work" / "ready" / "0").mkdir(parents=True)
    (tmp_path / "data" / ".x.png.work" / "ready" / "0" / "x.png").write_text("theirs")
    (tmp_path / "victim").write_text("mine")
    names = {"made": "ready/0/x.png", "final": "../x.png", "inode": 1, key: name}
    record = tmp_path / "data" / ".x.png.work" / "ready" / "publish.json"
    record.write_text(json.dumps({"overwrite": True, "names": [names]}))
    with pytest.raises(UserError, match=rf"publish.json is damaged: names\[0\].{key} is"):
        read_sidecar(tmp_path / "data" / "x.png")
    assert (tmp_path / "victim").read_text() == "mine"
    record.write_text(
        json.dumps({"overwrite": True, "names": [{**names, key: {"made": "ready/0/x.png", "final": "../x.png"}[key]}]})
    )
    read_sidecar(tmp_path / "data" / "x.png")
    assert (tmp_path / "data" / "x.png").read_text() == "theirs"


BOMB = "".join(f"a{k}: &a{k} {{<<: [{', '.join(4 * [f'*a{k - 1}' if k else '*b'])}]}}\n" for k in range(20))
"""Of 4^20 keys, made of twenty lines."""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a", r"it is \['a'\], but must be an object"),
        ("log-every: {a: 1}", "must be"),
        ("steps: [[1]]", "must be"),
        ("1: 2", "must be a text"),
        ("a: " + "[" * 5000, "cannot be read"),
        ("a: &b {x: 1}\n" + BOMB, r"line 2 refers to another by \*"),
        ("a: !!python/object/apply:os.system [ls]", "cannot be read"),
        ("a: \0", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("a: " + "x" * (1 << 20), "more than the 131"),
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


@pytest.mark.parametrize("text", ["seed: 1e400", "seed: abc", "seed: [1]", "seed: true"])
def test_a_seed_that_is_no_number_makes_no_reference(tmp_path, text):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").write_text(text)
        (tmp_path / run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="have the seed .*, which is no whole number"):
        make_reference([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("skipped", ["1" + "0" * 400, "[]", '"x"', "{}", "null"])
def test_a_trainers_record_that_does_not_tell_of_skips_is_taken_for_one_amid_them(skipped):
    assert tells_skips(f'{{"skipped_in_a_row": {skipped}}}'.encode()) and not tells_skips(b'{"skipped_in_a_row": 0}')


@pytest.mark.parametrize("steps", [0, 100_001, 10**9, 10**30])
def test_a_process_of_more_steps_than_any_has_is_refused_before_its_tables_are_made(steps):
    with pytest.raises(UserError, match="must be at least 1 and at most 100,000"):
        make_process({"objective": "ddpm", "steps": steps})


def test_a_seal_over_lists_as_deep_as_python_reads_is_broken_and_no_more():
    for depth in range(980, 1000):
        assert not is_intact(b'{"a": ' + b"[" * depth + b"]" * depth + b', "checksum": "' + b"0" * 64 + b'"}')


@pytest.mark.parametrize("text", ["[" * 5000, '{"objective":' + "[" * 100 + "]" * 100 + "}", "1" * 5000])
def test_a_process_in_a_files_metadata_passes_the_gate(text):
    with pytest.raises(UserError, match="the process in x.safetensors .*; it is damaged, convert it again"):
        origin_of(Path("x.safetensors"), {PROCESS: text}, DiTConfig(), projectors=False, objective=None)


@pytest.mark.parametrize("text", ["[" * 5000, "[" * 100 + "]" * 100, "1" * 5000, '{"a": '])
def test_class_names_pass_the_gate(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="--class-names .*x.json .*mend it"):
        class_names(["a"], str(tmp_path / "x.json"))


def test_an_average_with_no_number_for_its_width_is_none(tmp_path):
    (tmp_path / "averages").mkdir()
    for name in ("step-1-sigma-1.2.3", "step-1-sigma-e", "step-1-sigma-0.05"):
        (tmp_path / "averages" / f"{name}.safetensors").touch()
        (tmp_path / "averages" / f"{name}.safetensors.json").touch()
    assert [one.sigma for one in snapshots(tmp_path)] == [0.05]


@pytest.mark.parametrize("line", ['{"step": 1, "lr": 1.0}', '{"step": 1, "loss": "x"}', ""])
def test_runs_without_losses_make_no_reference(tmp_path, line):
    for seed, run in enumerate("ab"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").write_text(f"seed: {seed}")
        (tmp_path / run / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match="a has logged no loss|holds no|no losses"):
        make_reference([tmp_path / "a", tmp_path / "b"])
