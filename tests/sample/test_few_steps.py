"""Few steps, where the user wants them, and how good the digits of the demo are with them."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoint.folder import newest_checkpoint
from pipeline.diffusion import SAMPLERS, RectifiedFlow
from sample.__main__ import main
from sample.resolve import FAST

FEW = ("--num-samples", 3, "--batch-size", 3)
DEMO = Path(__file__).parent.parent.parent / "demo"


@pytest.fixture(scope="module")
def flow(make_checkpoint):
    return make_checkpoint("flow", process=RectifiedFlow(time_shift=2.0), learn_sigma=False)


def test_steps_begin_where_timesteps_says_and_the_sidecar_says_so(command, tmp_path, read_json):
    status, said = command("--out", tmp_path / "a.npz", *FEW, "--timesteps", "999,600,200,0", steps=None)
    assert status == 0, said
    assert "ddpm, 4 steps" in said
    recipe = read_json(tmp_path / "a.npz.json")["recipe"]
    assert (recipe["steps"], recipe["timesteps"]) == (4, [999, 600, 200, 0])
    assert command("--out", tmp_path / "b.npz", *FEW)[0] == 0
    assert "timesteps" not in read_json(tmp_path / "b.npz.json")["recipe"]
    status, said = command("--out", tmp_path / "a.npz", *FEW, "--timesteps", "999,600,100,0", steps=4)
    assert status == 2
    assert "made another way (timesteps [999.0, 600.0, 200.0, 0.0], not" in said


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++2m"])
def test_the_times_of_a_flow_are_meant_as_they_are_written_and_not_shifted(command, flow, tmp_path, sampler):
    shifted = [2 * t / (1 + t) for t in (1, 0.75, 0.5, 0.25)]
    made = []
    for name, asked in (("own", {"steps": 4}), ("listed", {"steps": None})):
        timesteps = () if asked["steps"] else ("--timesteps", ",".join(map(str, shifted)))
        path = tmp_path / f"{name}.safetensors"
        given = ("--out", path, *FEW, "--sampler", sampler, *timesteps)
        assert command(*given, checkpoint=flow, vae=None, **asked)[0] == 0
        made.append(load_file(path)["latents"])
    np.testing.assert_allclose(made[0], made[1], atol=1e-4)


def test_a_list_that_does_not_fit_is_refused_before_anything_is_made(command, flow, tmp_path):
    for arguments, checkpoint, message in (
        (("--timesteps", "1,0.5"), {}, "--timesteps 1,0.5 must be whole numbers that fall, each of 999 (noise) … 0"),
        (("--timesteps", "999,500"), {"checkpoint": flow}, "must be times that fall, from 1 (noise) at most"),
        (("--timesteps", "999,500", "--steps", 3), {}, "--steps 3 does not fit the 2 of --timesteps; leave it away"),
        (("--timesteps", "999,5", "--trajectory", 4), {}, "--trajectory 4 is more than the 2 steps and the result"),
    ):
        status, said = command("--out", tmp_path / "a.npz", *FEW, *arguments, steps=None, **checkpoint)
        assert (status, message in said) == (2, True), said
    assert not list(tmp_path.iterdir())


def recipe_of(command, read_json, path, *arguments, **asked):
    status, said = command("--out", path, *FEW, *arguments, **asked)
    assert status == 0, said
    recipe = read_json(path.with_name(f"{path.name}.json"))["recipe"]
    return {name: value for name, value in recipe.items() if name != "versions"}


@pytest.mark.parametrize(("kind", "sampler"), [("ddpm", "dpm++"), ("flow", "dpm++2m")])
def test_fast_is_the_measured_settings_by_name(command, flow, tmp_path, read_json, kind, sampler):
    chosen = {"checkpoint": flow} if kind == "flow" else {}
    spelled = [f"--{name.replace('_', '-')}={value}" for name, value in FAST[kind].items()]
    named = recipe_of(command, read_json, tmp_path / "named.npz", "--quality", "fast", steps=None, **chosen)
    assert named == recipe_of(command, read_json, tmp_path / "spelled.npz", *spelled, steps=None, **chosen)
    assert (named["sampler"], named["steps"], named["guidance_interval"]) == (sampler, 15, [0.2, 0.8])


def test_fast_is_known_for_every_kind_of_process():
    assert set(FAST) == {spec.objective for spec in SAMPLERS.values()}


def test_fast_fills_in_only_what_is_not_said(command, tmp_path, read_json):
    said = ("--quality", "fast", "--sampler", "ddim", "--guidance", "1.25", "--guidance-interval", "0:1")
    recipe = recipe_of(command, read_json, tmp_path / "a.npz", *said, steps=3)
    assert (recipe["sampler"], recipe["steps"], recipe["guidance"]) == ("ddim", 3, 1.25)
    assert recipe["guidance_interval"] == [0, 1]
    said = ("--quality", "fast", "--timesteps", "999,500")
    recipe = recipe_of(command, read_json, tmp_path / "b.npz", *said, steps=None)
    assert (recipe["sampler"], recipe["steps"]) == (FAST["ddpm"]["sampler"], 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(newest_checkpoint(DEMO / "run") is None, reason="needs the demo's run; make demo makes it")
def test_fast_is_within_two_points_of_25_steps_of_heun_on_the_demo(tmp_path):
    from examples.digits.measure import compare, read_generated, read_real

    names = sorted(folder.name for folder in (DEMO / "images").iterdir() if folder.is_dir())
    real = read_real(DEMO / "images", names)
    accuracy = {}
    for name, reverse in (("fast", "--quality fast"), ("heun", "--sampler heun --steps 25")):
        out = tmp_path / f"{name}.npz"
        asked = f"{reverse} --guidance 1.5 --samples-per-class 50 --seed 1".split()
        assert main(["--checkpoint", str(DEMO / "run"), "--out", str(out), *asked]) == 0
        accuracy[name] = compare(real, read_generated(out), names).accuracy
    assert accuracy["fast"] >= accuracy["heun"] - 0.02, accuracy
