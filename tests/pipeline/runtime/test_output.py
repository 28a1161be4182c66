"""What commands print: on any terminal, and whatever a stranger has put into a name."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.inspect.__main__ import main as inspect_main
from pipeline.runtime.console import printable, run_command, say, show, warn
from pipeline.runtime.errors import UserError
from tests.train.runs import make_store

ROOT = Path(__file__).parents[3]
NASTY = "a\x1b[31mred\x1b]0;title\x07\rb\nc\x9bd\u202ee\udcff"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """None."""


def on(encoding, run, monkeypatch):
    """What a command writes to a terminal of that encoding: (status, standard output, standard error)."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    status = run_command(Options, run, prog="dit-x", description="", argv=[])
    for stream in streams:
        stream.flush()
    return status, *(stream.buffer.getvalue().decode(encoding) for stream in streams)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_that_lacks_a_character_gets_its_number(encoding, monkeypatch):
    def run(_):
        show(["4×32×32 … größe 犬"])
        say("über 犬")
        warn("über 犬")
        raise UserError("größe 犬")

    status, out, notes = on(encoding, run, monkeypatch)
    assert status == 2
    assert ("犬" in out) == (encoding == "utf-8")
    assert ("\\u72ac" in out) == (encoding != "utf-8")
    assert notes.count("犬" if encoding == "utf-8" else "\\u72ac") == 3


def test_names_are_shown_escaped_in_every_kind_of_message(monkeypatch):
    def run(_):
        show([NASTY])
        say(NASTY)
        warn(NASTY)
        raise UserError(NASTY)

    status, out, notes = on("utf-8", run, monkeypatch)
    assert status == 2
    for text in (out, notes):
        assert not set(text) & set("\x1b\x07\r\x9b\u202e\udcff")
        assert "a\\x1b[31mred\\x1b]0;title\\x07\\rb\\nc\\x9bd\\u202ee\\udcff" in text
    assert (out.count("\n"), notes.count("\n")) == (1, 3)


def test_a_path_of_the_systems_is_escaped_too(monkeypatch):
    def run(_):
        Path(f"/nowhere/{NASTY[:-1]}").read_text()

    status, _, notes = on("utf-8", run, monkeypatch)
    assert (status, notes.count("\n"), "\x1b" in notes) == (2, 1, False)


def test_what_is_text_stays_as_it_is():
    for text in ("plain", "größe × 犬 — …", "👩‍🔬", ""):
        assert printable(text) == text


def test_a_class_with_an_escape_in_its_name_and_a_tensor_with_one_are_shown_escaped(tmp_path, capsys, monkeypatch):
    from tests.train import runs

    original = runs.StoreDescription
    named = lambda **given: original(**{**given, "classes": ["a\x1b[2Jb", "c\nd"], "class_ids": ["x\x1b[2J", "y"]})  # noqa: E731
    monkeypatch.setattr(runs, "StoreDescription", named)
    make_store(tmp_path / "store", classes=2, samples=4, shards=1)
    monkeypatch.setattr(sys, "argv", ["dit-inspect", str(tmp_path / "store")])
    assert inspect_main() == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "a\\x1b[2Jb" in out
    save_file({"evil\x1b[2J\nname": torch.zeros(1)}, tmp_path / "w.safetensors")
    monkeypatch.setattr(sys, "argv", ["dit-inspect", str(tmp_path / "w.safetensors")])
    assert inspect_main() == 2
    said = capsys.readouterr().err
    assert ("\x1b" in said, said.count("\n")) == (False, 1)
    assert "evil\\x1b[2J\\nname" in said


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_real_command_ends_well_on_a_terminal_that_is_not_utf_8(encoding):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.inspect", "--models"],
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"DiT-XL/2" in done.stdout
