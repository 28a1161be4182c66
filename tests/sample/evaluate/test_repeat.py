"""--repeat: a checkpoint judged over several sampling seeds; and what a result says of how its images were sampled."""

import json

import numpy as np
import pytest

from sample.__main__ import main as sample
from sample.evaluate.__main__ import main

COUNT = 12
SETTINGS = ("--steps", "2", "--batch-size", "4", "--device", "cpu")


@pytest.fixture
def evaluate(vae_folder, tmp_path, capsys, pictures):
    """`evaluate(*arguments, name=…)`: (status, result's content, stdout, stderr) on pixels, against 20 pictures."""
    np.savez(tmp_path / "reference.npz", arr_0=pictures(20, size=16))

    def go(*arguments, name="result"):
        out = tmp_path / f"{name}.json"
        given = ("--reference", tmp_path / "reference.npz", "--features", "pixels", "--out", out, *arguments)
        status = main([str(word) for word in (*given, "--vae", vae_folder, *SETTINGS)])
        said = capsys.readouterr()
        return status, json.loads(out.read_text()) if out.exists() else None, said.out, said.err

    return go


def test_repeat_gives_mean_and_spread_of_what_each_seed_gives_alone(evaluate, smallest):
    checkpoint = ("--samples", smallest, "--num-samples", COUNT)
    alone = [evaluate(*checkpoint, "--seed", seed, name=f"seed-{seed}")[1] for seed in (5, 6, 7)]
    status, result, shown, said = evaluate(*checkpoint, "--seed", 5, "--repeat", 3)
    assert status == 0, said
    assert list(result["metrics"]) == ["FD-pixels-12", "Precision-pixels-12", "Recall-pixels-12"]
    for name, mean in result["metrics"].items():
        values = [each["metrics"][name] for each in alone]
        assert result["details"][name]["seeds"] == [5, 6, 7]
        assert result["details"][name]["values"] == values
        assert mean == pytest.approx(np.mean(values))
        assert result["std"][name] == pytest.approx(np.std(values, ddof=1))
    assert len(set(result["details"]["FD-pixels-12"]["values"])) == 3
    digests = [result[name]["images"]["pixels_sha256"] for name in ("samples", "samples, seed 6", "samples, seed 7")]
    assert digests == [each["samples"]["images"]["pixels_sha256"] for each in alone]
    assert (result["protocol"]["seed"], result["protocol"]["seeds"]) == (5, 3)
    assert "seeds 3" in shown


def test_another_number_of_seeds_is_another_result_and_the_same_one_is_there(evaluate, smallest):
    checkpoint = ("--samples", smallest, "--num-samples", COUNT, "--metrics", "fd-pixels")
    shown = evaluate(*checkpoint, "--repeat", 2)[2]
    status, _, again, said = evaluate(*checkpoint, "--repeat", 2)
    assert (status, again) == (0, shown) and "nothing to do" in said
    status, _, _, said = evaluate(*checkpoint)
    assert status == 2 and "holds another result" in said


def test_repeat_needs_a_checkpoint(evaluate, tmp_path):
    status, result, _, said = evaluate("--samples", tmp_path / "reference.npz", "--repeat", 3)
    assert (status, result) == (2, None)
    assert "--repeat 3 samples with so many seeds, but --samples" in said and "is no run or checkpoint" in said


def test_a_result_says_sampler_steps_guidance_labels_and_weights(evaluate, smallest, vae_folder, tmp_path):
    flags = ("--sampler", "ddim", "--guidance", "1.5", "--seed", "3")
    _, sampled, shown, _ = evaluate("--samples", smallest, "--num-samples", COUNT, *flags)
    assert sampled["protocol"] == {
        "sampler": "ddim",
        "steps": 2,
        "eta": 0.0,
        "guidance": 1.5,
        "seed": 3,
        "labels": "random",
        "weights": "ema of step 10",
    }
    assert shown.splitlines()[-1] == (
        "sampler ddim, steps 2, eta 0.0, guidance 1.5, seed 3, labels random, weights ema of step 10"
    )
    npz = tmp_path / "made.npz"
    made = ["--checkpoint", smallest, "--out", npz, "--num-samples", COUNT, "--vae", vae_folder, *flags, *SETTINGS]
    assert sample([str(word) for word in made]) == 0
    _, of_file, _, _ = evaluate("--samples", npz, name="of-file")
    assert of_file["protocol"] == sampled["protocol"]
    assert of_file["metrics"] == pytest.approx(sampled["metrics"])
    _, unknown, shown, _ = evaluate("--samples", tmp_path / "reference.npz", name="unknown")
    assert unknown["protocol"] is None and shown.splitlines()[-1].startswith("Recall")


def test_balanced_labels_are_part_of_a_metrics_name(evaluate, smallest, vae_folder, tmp_path):
    _, result, _, _ = evaluate("--samples", smallest, "--num-samples", COUNT, "--labels", "balanced")
    assert next(iter(result["metrics"])) == "FD-pixels-12-balanced"
    npz = tmp_path / "made.npz"
    made = ["--checkpoint", smallest, "--out", npz, "--samples-per-class", 2, "--vae", vae_folder, *SETTINGS]
    assert sample([str(word) for word in made]) == 0
    _, result, _, _ = evaluate("--samples", npz, name="by-class")
    assert next(iter(result["metrics"])) == "FD-pixels-16-balanced"


def test_a_strangers_sidecar_moves_no_terminal(evaluate, tmp_path, pictures):
    np.savez(tmp_path / "odd.npz", arr_0=pictures(12, size=16))
    recipe = {"sampler": "a\x1b[31m" + "b" * 99, "labels": {"rule": "\x1b[2J"}, "checkpoint": {"weights": "\x1b"}}
    sidecar = {"format": "dit-samples", "version": 1, "recipe": recipe, "output": {}}
    (tmp_path / "odd.npz.json").write_text(json.dumps(sidecar))
    status, _, shown, said = evaluate("--samples", tmp_path / "odd.npz")
    assert status == 0, said
    assert "\x1b" not in shown and "b" * 60 not in shown
    sidecar["recipe"] |= {"steps": ["\x1b[2J"]}
    (tmp_path / "odd.npz.json").write_text(json.dumps(sidecar))
    status, _, shown, said = evaluate("--samples", tmp_path / "odd.npz")
    assert status == 2 and "recipe.steps is ['\\x1b[2J'], but must be a whole number" in said
    assert "\x1b" not in shown + said
