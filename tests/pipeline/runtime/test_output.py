"""What commands print: on any terminal, and whatever a stranger has put into a name."""

import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.inspect.__main__ import main as inspect_main
from pipeline.runtime.console import printable, progress, run_command, say, show, warn
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


LOG = """
import time
from pipeline.runtime.console import progress, run_command, say
import dataclasses

@dataclasses.dataclass(frozen=True)
class Nothing:
    "No options."

def run(_):
    bar = progress(5, unit="steps", description="training", initial=1)
    for step in range(4):
        bar.update(1)
        bar.set_postfix({"loss": f"{step}"}, refresh=False)
        say(f"note {step}")
    bar.close()
    other = progress(None, unit="files", description="listing")
    other.update(3)
    other.close()

run_command(Nothing, run, prog="dit-test", description="Tests.", argv=[])
"""


def test_progress_in_a_log_is_lines_of_their_own_and_notes_repeat_none_of_them():
    done = subprocess.run(
        [sys.executable, "-c", LOG], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    said = done.stderr.decode()
    assert not set(said) & set("\r\x1b█▏")
    shown = [re.sub(r"\d\d:\d\d", "00:00", line) for line in said.splitlines()]
    assert all(shown)
    assert [line for line in shown if line.startswith("note")] == [f"note {step}" for step in range(4)]
    bars = [line for line in shown if not line.startswith("note")]
    assert re.fullmatch(r"training: 20%, 1 of 5 steps, .*", bars[0])
    assert re.fullmatch(r"training: 100%, 5 of 5 steps, 00:00 to go, 00:00 so far, .* steps/s, loss=3", bars[1])
    assert re.fullmatch(r"listing: 3 files, 00:00 so far, .*", bars[-1]) and len(bars) == 4


def test_the_rate_of_slow_steps_in_a_log_is_still_steps_a_second(capsys):
    bar = progress(5, unit="steps", description="training")
    bar.n, bar.start_t = 1, bar.start_t - 10
    assert re.search(r"so far, +0\.10 steps/s$", str(bar))
    bar.close()


@pytest.mark.parametrize("columns", [80, 140])
def test_help_keeps_to_the_width_and_has_no_colours_where_none_are_wanted(columns):
    """On a real pseudo-terminal; NO_COLOR is https://no-color.org's."""
    import pty

    for wish in ({"NO_COLOR": "1"}, {}):
        main, side = pty.openpty()
        given = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
        given |= {"PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "xterm-256color", **wish}
        process = subprocess.Popen(
            [sys.executable, "-m", "sample", "--help"], env=given, stdout=side, stderr=side, stdin=side
        )
        os.close(side)
        text = b""
        try:
            while piece := os.read(main, 1 << 16):
                text += piece
        except OSError:  # the other side is closed
            pass
        os.close(main)
        assert process.wait(60) == 0
        coloured = re.compile(rb"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38;)[0-9;]*m").search(text)
        assert bool(coloured) == (not wish), text[:400]
        plain = re.sub(rb"\x1b\[[0-9;]*m", b"", text).decode()
        assert max(map(len, plain.splitlines())) <= columns
