"""Every flag that a message names exists in the command that says it."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from extract.options import ExtractOptions
from pipeline.convert.options import ConvertOptions
from pipeline.inspect.options import InspectOptions
from pipeline.runtime.cli import _flags, nearest
from pipeline.runtime.other_names import OTHER_NAMES
from sample.evaluate.options import EvaluateOptions
from sample.options import SampleOptions
from sample.tune.options import TuneOptions
from tests.test_house import MODULES, SOURCES, module_of, taken_from
from train.options import TrainOptions
from view.options import ViewOptions

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "dit-extract": ("extract.__main__", ExtractOptions),
    "dit-train": ("train.__main__", TrainOptions),
    "dit-sample": ("sample.__main__", SampleOptions),
    "dit-evaluate": ("sample.evaluate.__main__", EvaluateOptions),
    "dit-tune": ("sample.tune.__main__", TuneOptions),
    "dit-inspect": ("pipeline.inspect.__main__", InspectOptions),
    "dit-convert": ("pipeline.convert.__main__", ConvertOptions),
    "dit-view": ("view.__main__", ViewOptions),
}
# A launcher's, git's and tar's own, and what this project's own flags begin with.
OTHERS = re.compile(r"--(multi_gpu|num_processes|module|hard-dereference|help|config|no-)")
# Messages of shared files that only some of the commands can come to say.
ENCODES, SAMPLES, TRAINS = {"dit-extract"}, {"dit-sample", "dit-evaluate", "dit-tune"}, {"dit-train"}
WRITES = {"dit-extract", "dit-sample", "dit-train", "dit-evaluate", "dit-tune", "dit-convert"}
COMPUTES = WRITES - {"dit-convert"}
ONLY_SAMPLES = {"dit-sample"}  # what dit-evaluate fills in by itself
NAMES_HEADS = {*SAMPLES, "dit-inspect", "dit-convert"}  # dit-train is told what to do instead
TAKES_LISTS = {"dit-sample", "dit-evaluate"}
EVALUATES = {"dit-evaluate"}  # what dit-tune fills in by itself
SAID_IN = {
    "pipeline/checkpoint/forms.py": {"--num-heads": NAMES_HEADS, "--weights": NAMES_HEADS - {"dit-inspect"}},
    "pipeline/checkpoint/release.py": {"--num-heads": NAMES_HEADS},
    "pipeline/checkpoint/weight_files.py": {"--weights": NAMES_HEADS - {"dit-inspect"}},
    "pipeline/diffusion/flow.py": {"--timesteps": TAKES_LISTS},
    "pipeline/diffusion/gaussian.py": {"--timesteps": TAKES_LISTS},
    "pipeline/diffusion/samplers.py": {
        **dict.fromkeys(("--steps", "--sampler", "--eta"), SAMPLES),
        "--timesteps": TAKES_LISTS,
    },
    "pipeline/diffusion/process.py": dict.fromkeys(("--loss-weight", "--objective", "--prediction"), TRAINS),
    "pipeline/dit/config.py": {"--model": TRAINS},
    "pipeline/inspect/machine.py": {"--overwrite": WRITES},
    "pipeline/latents/records.py": {"--overwrite": {"dit-extract", "dit-convert"}},
    "pipeline/latents/writer.py": {"--split": ENCODES, "--overwrite": {"dit-extract", "dit-convert"}},
    "pipeline/runtime/devices.py": {"--device": COMPUTES},
    "pipeline/runtime/files.py": {"--out": ONLY_SAMPLES},
    "pipeline/runtime/launchers.py": {"--sharding": TRAINS},
    "pipeline/runtime/publish.py": {"--overwrite": WRITES},
    "pipeline/runtime/remote_files.py": {"--remote-tars": ENCODES, "--overwrite": WRITES},
    "pipeline/vae.py": {"--image-size": ENCODES},
    "sample/evaluate/inputs.py": {"--samples": EVALUATES},
    "sample/evaluate/job.py": dict.fromkeys(("--samples", "--make-reference"), EVALUATES),
    "sample/evaluate/metrics.py": {"--reference-features": EVALUATES},
    "sample/evaluate/options.py": dict.fromkeys(
        ("--samples", "--metrics", "--make-reference", "--reference-features"), EVALUATES
    ),
    "sample/evaluate/reference.py": {"--make-reference": {"dit-evaluate"}},
    "sample/evaluate/remote.py": {"--make-reference": {"dit-evaluate"}},
    "sample/evaluate/scoring.py": {"--metrics": EVALUATES},
    "sample/tune/judge.py": {"--samples": EVALUATES},
    "sample/labels.py": {"--classes": ONLY_SAMPLES},
    "sample/options.py": {
        **dict.fromkeys(("--classes", "--samples-per-class", "--trajectory", "--vary", "--inpaint"), ONLY_SAMPLES),
        **dict.fromkeys(("--interpolate", "--interpolate-class"), ONLY_SAMPLES),
        "--timesteps": TAKES_LISTS,
    },
    "sample/resolve.py": dict.fromkeys(
        ("--trajectory", "--interpolate", "--interpolate-class", "--samples-per-class"), ONLY_SAMPLES
    ),
    "sample/edits.py": dict.fromkeys(("--vary", "--inpaint", "--interpolate-class"), ONLY_SAMPLES),
}


def flags_of(options):
    found = dict(_flags(options))
    return {f"--{name}" for name in found} | {f"--no-{name}" for name, flag in found.items() if flag.kind is bool}


FLAGS = {command: flags_of(options) for command, (_, options) in COMMANDS.items()}


@cache
def reached():
    """{command: the files it takes in}."""
    found = {}
    for command, (entry, _) in COMMANDS.items():
        seen, todo = {entry}, [entry]
        while todo:
            for module in set(taken_from(MODULES[todo.pop()])) - seen:
                seen.add(module)
                todo.append(module)
        found[command] = seen
    return found


def texts_in(path):
    """(line, text) of every string that is no docstring, an f-string as one, with {} for what is put in."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def said_by(text, place, speakers):
    """The commands that the flag at this place of a text is of: those it names, else whoever says it."""
    before, after = text[:place], text[place:]
    following = re.match(r"--[\w-]+ (?:of|to) (dit-\w+)", after)
    clause = before[max(before.rfind(";"), before.rfind(". ")) + 1 :]
    named = [following[1]] if following else re.findall(r"dit-\w+", clause)[-1:]
    return set(named) & COMMANDS.keys() or speakers


def test_every_flag_that_a_message_names_exists_in_the_command_that_says_it():
    wrong, looked_at = [], 0
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        if name.endswith("runtime/other_names.py"):
            continue
        speakers = {command for command, files in reached().items() if module_of(path) in files}
        if not name.startswith("view/"):  # the page shows such a sentence beside the command whose flags it names
            speakers -= {"dit-view"}
        for line, text in texts_in(path):
            for found in re.finditer(r"(?<![\w-])--[a-z][a-z0-9_-]+", text):
                flag = found[0].rstrip("-")
                if OTHERS.match(found[0]):
                    continue
                looked_at += 1
                commands = said_by(text, found.start(), speakers)
                commands = SAID_IN.get(name, {}).get(flag, commands) if commands == speakers else commands
                lacking = sorted(command for command in commands if flag not in FLAGS[command])
                if lacking:
                    wrong.append(f"{name}:{line} {flag} is no flag of {', '.join(lacking)}: {text[:90]!r}")
    assert looked_at > 150
    assert wrong == []


def test_what_only_some_commands_say_is_still_said():
    """An entry of SAID_IN whose message is gone goes, too."""
    for name, flags in SAID_IN.items():
        texts = " ".join(text for _, text in texts_in(ROOT / name))
        for flag in flags:
            assert flag in texts, f"{name} says nothing of {flag}"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_other_programs_lead_to_flags_that_exist(command):
    names = OTHER_NAMES[command]
    assert len(names) >= 4
    for name, ours in names.items():
        assert f"--{name}" not in FLAGS[command], f"--{name} exists in {command}"
        for found in re.finditer(r"(?<![\w-])--[a-z][a-z0-9_-]+", ours):
            if not OTHERS.match(found[0]):
                speakers = said_by(ours, found.start(), {command})
                lacking = [each for each in speakers if found[0] not in FLAGS[each]]
                assert lacking == [], f"{command} --{name}: {ours}"


def refused(command, *words, capsys):
    with mock.patch("sys.argv", [command, *words]):
        assert importlib.import_module(COMMANDS[command][0]).main() == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flag", "said"),
    [
        ("dit-train", "--learning-rate", "here it is --lr"),
        ("dit-train", "--learning_rate=1e-4", "here it is --lr"),
        ("dit-train", "--resume", "the same command goes on by itself"),
        ("dit-train", "--num-classes", "the number of classes is the store's"),
        ("dit-train", "--max_train_steps", "here it is --steps"),
        ("dit-train", "--num-workers", "here it is --prefetch"),
        ("dit-train", "--global-batch-size", "here it is --batch-size"),
        ("dit-train", "--data-path", "here it is --latents"),
        ("dit-sample", "--cfg-scale", "here it is --guidance"),
        ("dit-sample", "--num-sampling-steps", "here it is --steps"),
        ("dit-sample", "--ckpt", "here it is --checkpoint"),
        ("dit-evaluate", "--cfg-scale", "here it is --guidance"),
        ("dit-tune", "--ema-std", "here it is --sigma"),
        ("dit-extract", "--data-path", "here it is --data"),
        ("dit-extract", "--features-path", "here it is --out"),
        ("dit-convert", "--output", "here it is --to"),
        ("dit-inspect", "--checkpoint", "the path itself, without a flag"),
        ("dit-view", "--server-port", "here it is --port"),
        ("dit-view", "--share", "the page is shared with nobody"),
    ],
)
def test_the_usual_flags_of_other_programs_lead_to_ours(command, flag, said, capsys):
    assert f"; {said}" in refused(command, flag, "1", capsys=capsys)


def test_the_keys_of_a_file_lead_to_ours_too(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\n")
    said = refused("dit-train", "--config", str(tmp_path / "c.yaml"), capsys=capsys)
    assert "unknown key 'learning_rate'" in said
    assert "here it is --lr" in said


@pytest.mark.parametrize("flag", ["--foo", "--encoder-depth", "--height", "--network", "--proj-coeff", "--sample-dir"])
def test_nothing_is_meant_where_nothing_is_like_it(flag, capsys):
    for command in COMMANDS:
        if flag.removeprefix("--") not in OTHER_NAMES[command]:
            said = refused(command, flag, "1", capsys=capsys)
            assert "did you mean" not in said
            assert f"see {command} --help" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_slip_of_the_finger_is_still_understood(command):
    names = [flag.removeprefix("--") for flag in FLAGS[command]]
    for name in names:
        if len(name) > 5:
            assert nearest(name[:2] + name[3:], names, count=1) == [name], name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_states_one_default_in_plain_types(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.argv", [command, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(COMMANDS[command][0]).main()
    text = capsys.readouterr().out
    assert "{None}" not in text
    assert "default: None" not in text
    plain = re.sub(r"[│╭╮╰╯─]", "", text)
    entries = [" ".join(entry.split()) for entry in re.split(r"\n *(?=--[a-z])", plain)]
    assert len(entries) > 7
    for entry in entries:
        stated = re.findall(r"Default\b|the default\b|\(default:", entry)
        assert len(stated) <= 1, entry
