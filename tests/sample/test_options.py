"""What the command line refuses before any work, and what it makes of the rest."""

from pathlib import Path

import pytest
import yaml

from pipeline.runtime.cli import parse_options
from pipeline.runtime.errors import UserError
from sample.__main__ import PRESETS
from sample.options import SampleOptions


def parse(*arguments, out="a.png"):
    given = ["--checkpoint", "run", "--out", out, *arguments]
    return parse_options(SampleOptions, given, prog="dit-sample", description="", presets=PRESETS)


@pytest.mark.parametrize(
    ("out", "kind"),
    [("a.png", "grid"), ("a.npz", "npz"), ("a.safetensors", "latents"), ("a/", "folder"), ("a", "folder"),
     ("v1.5", "folder"), ("a.png/", "folder")],
)  # fmt: skip
def test_the_output_is_told_by_its_name(out, kind):
    assert parse(out=out).kind == kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples-per-class", "2", "--num-samples", "4"], "--samples-per-class excludes --num-samples"),
        (["--labels", "random"], "--labels random needs --num-samples"),
        (["--labels", "l.txt", "--classes", "1"], "excludes --classes"),
        (["--num-samples", "0"], "--num-samples 0 must be at least 1"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--eta", "2"], "--eta 2.0 must be at least 0 and at most 1"),
        (["--guidance", "-1"], "--guidance -1.0 must be at least 0 and at most 1000"),
        (["--guidance", "nan"], "--guidance nan"),
        (["--guidance-interval", "0.8:0.2"], "--guidance-interval 0.8:0.2 must be A:B"),
        (["--guidance-interval", "half"], "--guidance-interval half must be A:B"),
        (["--timesteps", "999,five"], "--timesteps 999,five must be numbers from 0 on with commas between them"),
        (["--timesteps", "999,nan"], "--timesteps 999,nan must be numbers"),
        (["--timesteps", ""], "--timesteps  must be numbers"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--trajectory", "1"], "--trajectory 1 must be at least 2"),
        (["--stepz", "3"], "did you mean --steps"),
    ],
)
def test_what_cannot_be_is_refused_with_the_flag_that_mends_it(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(*arguments)


@pytest.mark.parametrize(
    ("arguments", "group", "field", "value"),
    [
        (["--samples-per-class", "1"], "images", "samples_per_class", 1),
        (["--num-samples", "1"], "images", "num_samples", 1),
        (["--num-samples", "1", "--labels", "balanced"], "images", "labels", "balanced"),
        (["--num-samples", "1", "--labels", "random", "--classes", "0"], "images", "classes", "0"),
        (["--steps", "1"], "reverse", "steps", 1),
        (["--eta", "0"], "reverse", "eta", 0.0),
        (["--eta", "1"], "reverse", "eta", 1.0),
        (["--guidance", "0"], "reverse", "guidance", 0.0),
        (["--guidance-channels", "all"], "reverse", "guidance_channels", None),
        (["--guidance-channels", "3"], "reverse", "guidance_channels", 3),
        (["--guidance-interval", "0:1"], "reverse", "interval", (0.0, 1.0)),
        (["--seed", "-1"], "reverse", "seed", -1),
        (["--batch-size", "1"], "compute", "batch_size", 1),
        (["--mixed-precision", "fp16"], "compute", "mixed_precision", "fp16"),
        (["--decode-dtype", "float16"], "compute", "decode_dtype", "float16"),
    ],
)
def test_what_is_just_possible_is_taken(arguments, group, field, value):
    assert getattr(getattr(parse(*arguments), group), field) == value


def test_a_list_of_steps_is_numbers_in_a_file_too(tmp_path):
    assert parse("--timesteps", "999, 0").reverse.times == (999, 0)
    (tmp_path / "few.yaml").write_text("timesteps: [1, 0.7, 0.25]")
    assert parse("--config", str(tmp_path / "few.yaml")).reverse.times == (1, 0.7, 0.25)
    assert parse().reverse.times is None


def test_two_moments_are_a_trajectory():
    assert parse("--trajectory", "2").trajectory == 2


def test_an_output_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"--out a.jpg ends in .jpg; use .png, .npz, .safetensors, or FOLDER/"):
        parse(out="a.jpg")
    with pytest.raises(UserError, match="--trajectory draws pictures"):
        parse("--trajectory", "4", out="a.safetensors")


def test_an_interval_is_two_shares_of_time():
    assert parse("--guidance-interval", "0.2:0.8").reverse.interval == (0.2, 0.8)
    assert parse("--guidance-channels", "3").reverse.guidance_channels == 3
    assert parse().reverse.guidance_channels is None


@pytest.mark.parametrize("preset", sorted(path.stem for path in Path(PRESETS).glob("*.yaml")))
def test_every_preset_is_a_command_line(preset):
    options, written = parse("--config", preset), yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    assert options.images.num_samples == written.get("num-samples", parse().images.num_samples)
    assert (options.reverse.guidance, options.reverse.steps) == (written["guidance"], written["steps"])


def test_the_papers_preset_guides_three_channels_at_one_and_a_half():
    options = parse("--config", "paper-256")
    assert (options.reverse.guidance, options.reverse.guidance_channels, options.reverse.steps) == (1.5, 3, 250)
    assert (options.images.labels, options.images.num_samples) == ("random", 50_000)
