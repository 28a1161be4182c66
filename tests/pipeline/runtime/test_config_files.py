"""Options from files and command lines alike: `~`, lists, several files, what stands twice."""

import dataclasses
from pathlib import Path
from typing import Annotated

import pytest

from pipeline.runtime.config_files import BY_COMMAS
from pipeline.runtime.console import run_command


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is read."""

    out: Path
    """Where to."""
    data: str = "d"
    """Where from."""
    classes: Annotated[str | None, BY_COMMAS] = None
    """Classes, separated by commas."""
    lr: float = 1e-4
    """Learning rate."""
    flip: bool = True
    """Whether to flip."""
    pairs: tuple[str, ...] = ()
    """NAME=DECAY."""


def command(*argv):
    seen = []
    status = run_command(Options, seen.append, prog="dit-x", description="", argv=[str(word) for word in argv])
    return status, (seen[0] if seen else None)


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home with spaces, ünd"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_a_tilde_is_the_home_folder_in_every_flag_and_key_and_a_variable_is_left_alone(home, tmp_path):
    words = ["--out=~/a b", "--data", "~/x.tar,~/y.tar,$HOME/z~", "--pairs", "a=~/q"]
    _, given = command(*words)
    assert given.out == home / "a b"
    assert given.data == f"{home}/x.tar,{home}/y.tar,$HOME/z~"
    assert given.pairs == (f"a={home}/q",)
    (home / "c.yaml").write_text('out: "~/a b"\ndata: ~/x.tar,~/y.tar,$HOME/z~\npairs: [a=~/q]\n', encoding="utf-8")
    assert command("--config", "~/c.yaml")[1] == given
    assert command("--config=~/c.yaml")[1] == given
    _, given = command("--out", "~nobody-of-that-name/x", "--data=~$lock", "--classes=a~b,~*")
    assert (given.out, given.data, given.classes) == (Path("~nobody-of-that-name/x"), "~$lock", "a~b,~*")


def test_every_command_takes_a_tilde_in_its_paths(home):
    """None of them makes a folder named ~."""
    import extract.options
    import pipeline.convert.options
    import sample.evaluate.options
    import sample.options
    import sample.tune.options
    import train.options

    for kind, words, wanted in (
        (train.options.TrainOptions, ["--latents=~/s", "--out=~/r"], lambda o: (o.data.latents, str(o.run.out))),
        (sample.options.SampleOptions, ["--checkpoint=~/s", "--out=~/r"], lambda o: (o.checkpoint, o.out)),
        (extract.options.ExtractOptions, ["--data=~/s", "--out=~/r"], lambda o: (o.source.data, str(o.out))),
        (
            sample.evaluate.options.EvaluateOptions,
            ["--samples=~/s", "--reference=~/r"],
            lambda o: (o.samples, o.reference),
        ),
        (
            sample.tune.options.TuneOptions,
            ["--checkpoint=~/s", "--reference=~/r", "--out=o"],
            lambda o: (o.checkpoint, o.reference),
        ),
        (
            pipeline.convert.options.ConvertOptions,
            ["--from=~/s", "--to=~/r", "--format", "dit"],
            lambda o: (o.from_, o.to),
        ),
    ):
        seen = []
        assert run_command(kind, seen.append, prog="dit-x", description="", argv=words) == 0
        assert wanted(seen[0]) == (f"{home}/s", f"{home}/r")


def test_several_files_count_in_order_and_the_command_line_overrides_them(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("out: a\nlr: 1\ndata: first\n")
    second.write_text("lr: 2\nflip: false\n")
    _, options = command("--config", first, "--config", second)
    assert options == Options(out=Path("a"), lr=2, data="first", flip=False)
    assert command("--config", second, "--config", first)[1].lr == 1
    assert command("--config", first, f"--config={second}", "--lr", "3")[1].lr == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("out: a\nlr: 1e-4\nlr: 5e-3\n", "lr stands twice, in line 2 and in line 3"),
        ("out: a\nout: a\n", "out stands twice"),
        ("out: a\ndata: [x, y]\n", "data in FILE is a list, but the flag --data takes one value"),
        ("out: ~\n", "out in FILE has no value"),
        ("out:\n", "out in FILE has no value"),
        ("out: a\nno-flip: true\n", "write flip: false"),
    ],
)
def test_what_a_file_cannot_mean_is_refused(text, said, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert command("--config", file) == (2, None)
    printed = capsys.readouterr().err
    assert said.replace("FILE", str(file)) in printed
    assert printed.count("\n") == 1


def test_a_key_in_two_spellings_stands_twice_and_a_merged_one_does_not(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("batch_size: 1\nbatch-size: 2\n")
    from train.__main__ import main

    assert main(["--config", str(file)]) == 2
    assert "batch-size stands twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[0, 1]", "0,1"),
        ("[cat, golden retriever]", "cat,golden retriever"),
        ("'0, 7'", "0, 7"),
        ("7", "7"),
        ("010", "010"),  # in YAML 1.1 it is 8
        ("[007, 0x10, 1_000]", "007,0x10,1000"),
        ("null", None),
    ],
)
def test_a_flag_that_takes_values_between_commas_takes_a_list(text, wanted, tmp_path):
    (tmp_path / "c.yaml").write_text(f"out: a\nclasses: {text}\n")
    assert command("--config", tmp_path / "c.yaml")[1].classes == wanted


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_file_is_utf_8_whatever_the_locale_and_may_begin_with_a_mark(start, tmp_path, monkeypatch):
    import locale

    monkeypatch.setattr(locale, "getencoding", lambda: "ascii")
    (tmp_path / "c.yaml").write_bytes(f"{start}out: größe\r\n".encode())
    assert command("--config", tmp_path / "c.yaml")[1].out == Path("größe")


def test_no_command_makes_a_folder_named_tilde(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _ = command("--out=~/x")
    assert status == 0
    assert not (tmp_path / "~").exists()
