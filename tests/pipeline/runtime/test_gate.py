"""What the gate lets through, and what it says of the rest."""

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.checkpoint.info import make_info
from pipeline.latents.manifest import make_manifest
from pipeline.latents.records import parse_record
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import parse_json, read_regular
from tests.hostile.test_mutants import CONFIG, MANIFEST

ROOT = Path(__file__).parents[3]

SUMS = {"count": 4, "mean": [0.0], "mean_square": [1.0], "variance": [0.0]}
RECORD = {"file": "train-00000.tar", "samples": 1, "bytes": 9, "sha256": "0", "sums": SUMS, "keys": ["a"]}


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "folder"])
@pytest.mark.timeout(10)
def test_what_is_no_regular_file_is_named_and_never_opened(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    path = {"pipe": tmp_path / "pipe", "link to a pipe": tmp_path / "link", "device": tmp_path / "device"}
    with pytest.raises(UserError, match=r"is a (named pipe|device|folder), where a file is expected"):
        read_json(path.get(kind, tmp_path))


def test_a_file_larger_than_the_limit_is_refused_after_the_limit(tmp_path):
    (tmp_path / "x").write_bytes(bytes(11))
    assert read_regular(tmp_path / "x", most=11) == bytes(11)
    with pytest.raises(UserError, match="more than the 10 "):
        read_regular(tmp_path / "x", most=10)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"9" * 5000, "x is not valid JSON .*4300 digits"),
        (b"[" * 100_000, "x nests too deeply"),
        (b"[" * 70 + b"]" * 70, "x nests lists and objects more than 64 deep"),
        (b'{"a": 1', "x is not valid JSON"),
        (b'"\xff"', "x is not valid JSON"),
    ],
)
def test_json_out_of_bounds_is_one_sentence(data, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_json(data, "x")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"samples": "1"}, "samples is '1', but must be a whole number"),
        ({"samples": True}, "samples is True, but must be a whole number"),
        ({"bytes": -1}, "bytes is -1, but must be a whole number >= 0"),
        ({"keys": ["\x1b[31m", 1]}, r"keys\[1\] is 1, but must be a text"),
        ({"file": ["\x1b"]}, r"file is \['\\x1b'\], but must be a text"),
        ({"sums": {**SUMS, "mean": None}}, r"sums.mean is None, but must be a list"),
        ({"sums": {"count": 4}}, "sums.mean is missing"),
        ({"crc32": [1 << 40]}, r"crc32\[0\] is 1099511627776"),
        ({"sums": {**SUMS, "mean": [float("nan")]}}, "contradicts itself"),
    ],
)
def test_a_record_of_other_types_is_refused_by_key(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_record(json.dumps({**RECORD, **change}).encode(), tmp_path / "r.json")


def test_keys_of_a_later_version_are_ignored(tmp_path):
    assert parse_record(json.dumps({**RECORD, "colour": "red"}).encode(), tmp_path / "r.json").keys == ("a",)


@pytest.mark.parametrize(("make", "values"), [(make_manifest, MANIFEST), (make_info, CONFIG)])
def test_what_passes_is_typed_and_frozen_and_holds_every_key_of_the_file(make, values):
    values = {**values, "colour": ["red"], "vae": {**values["vae"], "colour": "blue"}}
    passed = make(values)
    assert dict(passed) == values and passed.vae == values["vae"] and passed.vae.scaling_factor == 0.5
    assert list(passed) == list(values), "in the file's order"
    with pytest.raises(dataclasses.FrozenInstanceError):
        passed.vae = None
    assert make({**passed, "step": 7})["step"] == 7


def test_every_fault_of_an_object_is_named_and_no_more_than_eight():
    broken = {
        **MANIFEST,
        "seed": "x",
        "views": [],
        "vae": {"scaling_factor": None},
        "latent": {**MANIFEST["latent"], "kind": "z"},
    }
    with pytest.raises(UserError) as refusal:
        make_manifest(broken)
    for words in (
        "views is [], but must be a list of length >= 1",
        "vae.scaling_factor is None, but must be",
        "latent.kind is 'z', but must be one of moments, point",
        "seed is 'x', but must be a whole number",
    ):
        assert words in str(refusal.value)
    with pytest.raises(UserError) as refusal:
        make_manifest({"format": "dit-latents", "version": 1})
    assert str(refusal.value).count("is missing") == 8


def test_nothing_asks_the_raw_json_of_a_manifest_or_of_a_checkpoint_once_it_has_passed():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    asks = re.compile(r"\b(info|_?manifest|training)(\[[\"']|\.get\()")
    passes = {"pipeline/checkpoint/info.py"}
    found = [
        f"{name}: {line.strip()}"
        for name in files.stdout.split()
        if name.split("/")[0] not in {"tests", "docs"} and name not in passes
        for line in (ROOT / name).read_text().splitlines()
        if asks.search(line) and "request.match_info" not in line
    ]
    assert found == []
