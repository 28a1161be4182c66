"""Every command that a page shows is understood by the command itself, with flags and values that exist."""

import importlib
from pathlib import Path
from unittest import mock

import pytest

from pipeline.runtime.cli import parse_options
from pipeline.runtime.errors import UserError
from tests.docs.page_commands import blocks, command_lines, program_of
from tests.test_advice import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def shown():
    """(page, line, command, words) of each; what is optional is taken, and `…` stands for words that are left out."""
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in blocks(text, "bash", "sh") for line in command_lines(block)]
        lines += [line for block in blocks(text, "console", "text") for line in command_lines(block, prompt="$ ")]
        for line in lines:
            found = program_of(line.replace("[--", "--").replace("]", "").replace("[", ""))
            if found:
                yield page.relative_to(ROOT), line, *found


def settings_of(command):
    """What a command gives to the parser: its options' class, and the rest by name."""
    main = importlib.import_module(COMMANDS[command][0])
    with mock.patch.object(main, "run_command") as told:
        main.main()
    return (
        told.call_args.args[0],
        {key: told.call_args.kwargs[key] for key in ("prog", "description")},
        told.call_args.kwargs.get("presets"),
    )


def test_every_command_in_the_pages_is_understood(monkeypatch):
    monkeypatch.chdir(ROOT)  # for examples/digits/train.yaml and its like
    looked_at, wrong = set(), []
    for page, line, command, words in shown():
        options, about, presets = settings_of(command)
        given = [word for place, word in enumerate(words) if word != "…" or words[place - 1].startswith("--")]
        try:
            parse_options(options, given, presets=presets, **about)
        except UserError as error:
            if "…" not in words or "missing:" not in str(error):
                wrong.append(f"{page}: {line}: {error}")
        looked_at.add((line, command))
    assert wrong == []
    assert {command for _, command in looked_at} == set(COMMANDS) and len(looked_at) > 80


def test_a_flag_that_is_none_would_be_noticed():
    options, about, presets = settings_of("dit-train")
    with pytest.raises(UserError, match="unknown flag --stepz"):
        parse_options(options, ["--latents", "a", "--out", "b", "--stepz", "3"], presets=presets, **about)
