import os
import pty
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from pipeline.runtime.cli import flag_values, nearest
from pipeline.runtime.console import run_command, show, warn
from pipeline.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A nested group."""

    depth: int = 3
    """How deep."""

    def __post_init__(self):
        if self.depth < 0:
            raise UserError(f"--depth {self.depth} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command reads."""

    data: str
    """Where the data is."""
    flip: bool = True
    """Whether to flip."""
    batch_size: int | None = None
    """Samples per batch."""
    kind: Literal["a", "b"] = "a"
    """Which kind."""
    lr: float = 1e-4
    """Learning rate."""
    scales: tuple[float, ...] = ()
    """Several scales."""
    group: Group = field(default_factory=Group)


def command(*argv, presets=None):
    seen = []
    status = run_command(Options, seen.append, prog="dit-x", description="Does it.", argv=argv, presets=presets)
    return status, (seen[0] if seen else None)


def test_flags_are_kebab_case_and_groups_are_flat():
    status, options = command("--data", "d", "--no-flip", "--batch-size", "4", "--depth", "7", "--scales", "1", "2")
    assert status == 0
    assert options == Options(data="d", flip=False, batch_size=4, scales=(1.0, 2.0), group=Group(depth=7))
    assert flag_values(options) == {
        "data": "d", "flip": False, "batch-size": 4, "kind": "a", "lr": 1e-4, "scales": [1.0, 2.0], "depth": 7,
    }  # fmt: skip


def test_every_option_can_come_from_a_file_and_flags_override_it(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("data: d\nflip: false\nbatch_size: 8\nlr: 1e-3\nscales: [1, 2.5]\ndepth: 5\n")
    _, options = command("--config", str(config), "--batch-size", "16", "--flip")
    assert options == Options(data="d", flip=True, batch_size=16, lr=1e-3, scales=(1.0, 2.5), group=Group(depth=5))


def test_the_options_written_down_are_read_back_the_same(tmp_path):
    import yaml

    _, options = command("--data", "d e", "--no-flip", "--scales", "1", "--kind", "b")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(flag_values(options)))
    assert command("--config", str(tmp_path / "c.yaml")) == (0, options)


def test_a_preset_is_named_without_its_folder(tmp_path):
    (tmp_path / "small.yaml").write_text("data: d\nbatch-size: 2\n")
    assert command("--config", "small", presets=tmp_path)[1].batch_size == 2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--data", "d", "--batchsize", "3"], "unknown flag --batchsize; did you mean --batch-size?"),
        (["--data", "d", "--no-flop"], "unknown flag --no-flop; did you mean --no-flip?"),
        (["--data", "d", "--batch-size", "many"], "--batch-size"),
        (["--data", "d", "--kind", "c"], "('a', 'b')"),
        (["--data", "d", "--depth", "-1"], "--depth -1 must not be negative"),
        (["--data", "d", "stray"], "stray"),
        ([], "--data"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml is not a file"),
        (["--config"], "--config needs the path"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_status_2(capsys, argv, sentence):
    assert command(*argv) == (2, None)
    printed = capsys.readouterr().err
    assert sentence in printed and printed.count("\n") == 1 and printed.startswith("dit-x: error: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: d\nbatch-sise: 3\n", "unknown key 'batch-sise' in FILE; did you mean batch-size?"),
        ("data: d\nflip: maybe\n", "flip in FILE is 'maybe', but must be true or false"),
        ("data: d\nbatch-size: {a: 1}\n", "must be the value of the flag --batch-size"),
        ("data: d\nbatch-size: many\n", "--batch-size"),
        ("- data\n", "must hold `flag: value` lines"),
        ("data: [\n", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence_and_status_2(tmp_path, capsys, text, sentence):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert command("--config", str(config)) == (2, None)
    printed = capsys.readouterr().err
    assert sentence.replace("FILE", str(config)) in printed and printed.count("\n") == 1


def test_a_range_in_a_file_is_no_number_to_the_base_of_sixty(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("data: 1:30\nlr: 0.5\n")
    assert command("--config", str(config))[1].data == "1:30"
    config.write_text("data: 0:0.8\n")
    assert command("--config", str(config))[1].data == "0:0.8"


@pytest.mark.parametrize(("word", "flip"), [("yes", True), ("no", False), ("on", True), ("true", True)])
def test_no_is_a_word_and_yes_and_no_are_truth_values_where_one_is_wanted(tmp_path, word, flip):
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {word}\nflip: {word}\n")
    _, options = command("--config", str(config))
    assert options.flip is flip and options.data == ("True" if word == "true" else word)


@dataclass(frozen=True, kw_only=True, slots=True)
class WithPath:
    """A command that is given a path without a flag."""

    path: Annotated[str, tyro.conf.Positional]
    """Where."""
    verify: bool = False
    """Whether to verify."""


def test_what_has_no_flag_can_come_from_a_file_too_and_the_command_line_overrides_it(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("path: there\nverify: true\n")
    for argv, wanted in (([], "there"), (["here"], "here"), (["--no-verify", "here"], "here")):
        seen = []
        words = ["--config", str(config), *argv]
        assert run_command(WithPath, seen.append, prog="dit-x", description="", argv=words) == 0
        assert (seen[0].path, seen[0].verify) == (wanted, "--no-verify" not in argv)


def test_help_has_a_line_with_the_default_for_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        command("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--data", "--flip, --no-flip", "--batch-size", "--kind {a,b}", "--lr", "--depth", "--config FILE"):
        assert flag in text
    assert "(default: 0.0001)" in text and "Samples per batch." in text


def test_only_the_users_mistakes_are_swallowed():
    def fail(_):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(Options, fail, prog="dit-x", description="", argv=["--data", "d"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_nothing_watches_for_ends_the_command_with_its_status_and_a_line(capsys, number):
    before = signal.getsignal(number)
    ended = []

    def run(_):
        try:
            signal.raise_signal(number)
        finally:
            ended.append("tidied")

    assert run_command(Options, run, prog="dit-x", description="", argv=["--data", "d"]) == 128 + number
    assert capsys.readouterr().err == f"dit-x: stopped by {number.name}; run the same command again to continue\n"
    assert ended == ["tidied"] and signal.getsignal(number) == before


def test_a_path_that_may_not_be_entered_is_named(capsys):
    def run(_):
        raise PermissionError(13, "Permission denied", "/secret/store")

    assert run_command(Options, run, prog="dit-x", description="", argv=["--data", "d"]) == 2
    said = capsys.readouterr().err
    assert said == "dit-x: error: /secret/store cannot be used (Permission denied); change the path or its rights\n"


def test_a_reader_that_has_seen_enough_is_no_traceback():
    code = """
import sys
from dataclasses import dataclass
from pipeline.runtime.console import run_command, show, warn
@dataclass
class Options:
    '''None.'''
def run(_):
    for line in range(100_000):
        print(line)
sys.exit(run_command(Options, run, prog="dit-x", description="", argv=[]))
"""
    reader = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    done = subprocess.run(
        [sys.executable, "-u", "-c", code], stdout=reader.stdin, stderr=subprocess.PIPE, text=True, check=False
    )
    reader.stdin.close()
    reader.wait()
    assert "Traceback" not in done.stderr and done.returncode == 1


def test_a_mistake_is_one_plain_sentence_on_a_terminal_too():
    """tyro draws coloured boxes where standard output is a terminal."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "sample", "--checkpoint", "run", "--out", "a.png", "--steps", "x"]
    done = subprocess.run(
        words, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "\x1b" not in done.stderr and "─" not in done.stderr
    assert "--steps" in done.stderr and "see dit-sample --help" in done.stderr


def test_nearest_ignores_case():
    assert nearest("Golden Retreiver", ["golden retriever", "goldfish", "tench"])[0] == "golden retriever"


@pytest.mark.parametrize("name", ["x" * 10**6, "\x1b" * 10**5, "é\0" * 10**5])
def test_a_line_with_a_name_of_a_million_characters_keeps_its_beginning_and_its_advice(name, capsys):
    def run(_):
        show([f"shown {name} to its end"])
        warn(f"warned of {name} to its end")
        raise UserError(f"refused {name}; do this")

    assert run_command(Options, run, prog="dit-x", description="", argv=["--data", "d"]) == 2
    printed = capsys.readouterr()
    (shown,), (warned, refused) = printed.out.splitlines(), printed.err.splitlines()
    assert shown.startswith("shown ") and warned.startswith("warning: warned of ") and refused.endswith("; do this")
    assert all(len(line) < 10_100 and line.isprintable() for line in (shown, warned, refused))
