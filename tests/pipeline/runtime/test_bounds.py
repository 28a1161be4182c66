"""Every number of every command has bounds, stated in its type, and both sides of each are as it says."""

import dataclasses
import math
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from extract.options import ExtractOptions
from pipeline.convert.options import ConvertOptions
from pipeline.inspect.options import InspectOptions
from pipeline.runtime.bounds import bounds_in, check_bounds
from pipeline.runtime.cli import parse_options
from pipeline.runtime.described import type_and_extras
from pipeline.runtime.errors import UserError
from sample.evaluate.options import EvaluateOptions
from sample.options import SampleOptions
from sample.tune.options import TuneOptions
from studies.__main__ import StudyOptions
from train.options import TrainOptions
from train.plot.__main__ import PlotOptions
from view.options import ViewOptions

COMMANDS = (
    ExtractOptions,
    TrainOptions,
    SampleOptions,
    EvaluateOptions,
    TuneOptions,
    ConvertOptions,
    InspectOptions,
    ViewOptions,
    PlotOptions,
    StudyOptions,
)
BY_WORDS = {"guidance_channels"}
"""Numbers to the program, but a choice of words on the command line."""


def _numbers(options_class: type) -> Iterator[tuple[str, Any, bool]]:
    """(field, its type, whether it is a whole number) of every number, groups of options included."""
    for name, hint in typing.get_type_hints(options_class, include_extras=True).items():
        kinds = set(_plain(hint))
        if dataclasses.is_dataclass(hint):
            yield from _numbers(typing.cast("type", hint))
        elif kinds & {int, float} and name not in BY_WORDS:
            yield name, hint, float not in kinds


def _plain(hint: Any) -> Iterator[Any]:
    kind, _ = type_and_extras(hint)
    yield kind
    for inner in typing.get_args(kind):
        yield from _plain(inner)


NUMBERS = [(command, *number) for command in COMMANDS for number in _numbers(command)]


def _alone(name: str, hint: Any, value: Any) -> Any:
    """A dataclass of that field alone."""
    return dataclasses.make_dataclass("Alone", [(name, hint)], frozen=True)(value)


@pytest.mark.parametrize(
    ("name", "hint", "is_whole"), [row[1:] for row in NUMBERS], ids=[f"{row[0].__name__}-{row[1]}" for row in NUMBERS]
)
def test_each_number_is_accepted_at_its_bounds_and_refused_beyond(name, hint, is_whole):
    bounds = bounds_in(hint)
    assert bounds is not None, f"{name} states no bounds; take a type of pipeline/runtime/bounds.py"
    low = bounds.ge if bounds.ge is not None else bounds.gt
    high = bounds.le if bounds.le is not None else bounds.lt
    step = 1 if is_whole else (high - low) * 1e-9

    good = [low if bounds.ge is not None else low + step, high if bounds.le is not None else high - step]
    bad = [low - step if bounds.ge is not None else low, high + step if bounds.le is not None else high, 10**30]
    bad += [] if is_whole else [math.nan, math.inf, -math.inf, 1e38, -1e38] + ([-0.0] if low == 0 else [])
    for value in good:
        check_bounds(_alone(name, hint, value))
    for value in bad:
        with pytest.raises(UserError, match=rf"^--{name.rstrip('_').replace('_', '-')} .* must be (at least|above) "):
            check_bounds(_alone(name, hint, value))


def test_there_are_the_numbers_that_we_think_of():
    assert {"num_samples", "batch_size", "samples_per_class", "lr", "betas", "time_shift"} <= {
        row[1] for row in NUMBERS
    }


FEW = {
    TrainOptions: ["--latents", "x", "--out", "y"],
    SampleOptions: ["--checkpoint", "x", "--out", "y.npz"],
    EvaluateOptions: ["--samples", "x", "--reference", "y"],
    TuneOptions: ["--checkpoint", "x", "--reference", "y", "--out", "z"],
    ExtractOptions: ["--data", "x", "--out", "y"],
}
IN_TEXTS = [
    (SampleOptions, "--timesteps", "1,{}", "0.5"),
    (SampleOptions, "--guidance-interval", "{}:0.5", "0.25"),
    (SampleOptions, "--guidance-interval", "0.5:{}", "0.75"),
    (SampleOptions, "--vary", "x.safetensors@{}", "0.5"),
    (EvaluateOptions, "--timesteps", "{},0", "0.5"),
    (EvaluateOptions, "--guidance-interval", "{}:0.5", "0.25"),
    (TuneOptions, "--guidance", "1,{}", "2"),
    (TuneOptions, "--guidance", "{}:4", "1"),
    (TuneOptions, "--guidance", "1:{}", "2"),
    (TuneOptions, "--guidance-interval", "always,{}:0.5", "0.25"),
    (TuneOptions, "--sigma", "0.05,{}", "0.1"),
    (TuneOptions, "--sigma", "{}:0.2", "0.1"),
    (TuneOptions, "--sigma", "0.05:{}", "0.1"),
    (TuneOptions, "--steps", "20,{}", "40"),
    (TrainOptions, "--ema-sigma", "0.05,{}", "0.1"),
    (TrainOptions, "--extra-ema", "slow={}", "0.5"),
    (TrainOptions, "--time-shift", "{}", "2"),
    (ExtractOptions, "--shard-range", "0:{}", "4"),
]
"""Texts with numbers in them: each flag of that kind, a place in it, and a number that is good there."""


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e38", "-1e38", "-0.0", "-1", "9" * 400, "x"])
@pytest.mark.parametrize(
    ("command", "flag", "text", "good"), IN_TEXTS, ids=[f"{row[1][2:]}-{row[2]}" for row in IN_TEXTS]
)
def test_a_number_within_a_text_is_refused_where_the_text_is_parsed(command, flag, text, good, bad):
    def parse(number):
        also = ["--objective", "flow"] if flag == "--time-shift" else []
        return parse_options(
            command, [*FEW[command], *also, f"{flag}={text.format(number)}"], prog="x", description="x"
        )

    parse(good)
    with pytest.raises(UserError) as refusal:
        parse(bad)
    assert flag in str(refusal.value) and str(refusal.value).isprintable() and len(str(refusal.value)) < 1000


@pytest.mark.parametrize("value", ["0", "-1", str(10**12), "9" * 400])
@pytest.mark.parametrize("flag", ["--num-samples", "--samples-per-class", "--batch-size"])
def test_a_number_out_of_bounds_is_refused_by_parsing_alone(flag, value):
    with pytest.raises(UserError, match=rf"^{flag} .* must be at least 1 and at most \d+$") as refusal:
        parse_options(SampleOptions, ["--checkpoint", "x", "--out", "y", flag, value], prog="x", description="x")
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("flag", ["--batch-size", "--num-samples", "--guidance"])
@pytest.mark.parametrize("odd", ["", " ", "½", "²", "1e400", "0x10", "1,5", "true", "NaN", "--", "5\x1b[31m", "٣x"])
def test_what_is_no_number_is_one_sentence_by_parsing_alone(flag, odd):
    with pytest.raises(UserError) as refusal:
        parse_options(SampleOptions, [*FEW[SampleOptions], f"{flag}={odd}"], prog="x", description="x")
    assert flag in str(refusal.value) and len(str(refusal.value)) < 300


@pytest.mark.parametrize(("written", "number"), [(" 5", 5), ("5 ", 5), ("+5", 5), ("٣", 3), ("1_000", 1000)])
def test_a_number_is_what_python_reads(written, number):
    words = [*FEW[SampleOptions], f"--batch-size={written}", f"--guidance={written}"]
    options = parse_options(SampleOptions, words, prog="x", description="x")
    assert (options.compute.batch_size, options.reverse.guidance) == (number, number)


def test_a_command_refuses_with_status_2_and_creates_nothing(tmp_path):
    words = ["-m", "train", "--latents", "x", "--out", str(tmp_path / "run"), "--batch-size", "1000000"]
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "--batch-size 1000000 must be at least 1 and at most 131072" in ended.stderr
    assert not list(tmp_path.iterdir())
