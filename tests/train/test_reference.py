"""Reference curves: what a band is, whom it lets through, and the command that makes and uses one."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipeline.runtime.errors import UserError
from tests.train.runs import lines, train
from train.plot.__main__ import main as plot
from train.plot.reference import FOLDER, band_of, drawn_bands, part_means, read_reference, verdict


def test_the_band_of_one_point_is_students_prediction_interval_of_the_logarithms():
    values = [1.0, 1.1, 1.3]
    logs = np.log(values)
    half = stats.t.ppf(0.975, 2) * logs.std(ddof=1) * math.sqrt(1 + 1 / 3)
    low, high = band_of([[(7, value)] for value in values])[7]
    assert (low, high) == pytest.approx((math.exp(logs.mean() - half), math.exp(logs.mean() + half)))


def test_the_spread_is_pooled_over_neighbours_and_only_common_steps_count():
    curves = [[(step, 1.0 + step / 100 * seed) for step in range(1, 9)] for seed in range(3)]
    assert list(band_of([*curves, [(3, 1.0), (4, 1.0)]])) == [3, 4]
    variances = np.log([[value for _, value in curve] for curve in curves]).var(axis=0, ddof=1)
    half = stats.t.ppf(0.975, 10) * math.sqrt(variances[1:6].mean() * (1 + 1 / 3))
    low, high = band_of(curves)[4]
    assert math.log(high / low) / 2 == pytest.approx(half)


def test_values_that_have_no_logarithm_are_taken_as_they_are():
    low, high = band_of([[(1, -1.0)], [(1, 1.0)]])[1]
    assert high == pytest.approx(-low) and high > 1


def test_a_reference_of_one_run_is_damaged(tmp_path):
    about = {"format": "dit-reference", "version": 1, "command": "", "data": "", "settings": {}, "made_with": {}}
    run = {"seed": 0, "curves": {"loss": [[1, 1.0]]}, "scores": {}}
    for runs in ([], [run]):
        (tmp_path / "few.json").write_text(json.dumps({**about, "steps": 1, "runs": runs}))
        with pytest.raises(UserError, match="it has no curves of two runs"):
            read_reference(str(tmp_path / "few.json"))
    (tmp_path / "few.json").write_text(json.dumps({**about, "steps": 1, "runs": [run, run]}))
    assert len(read_reference(str(tmp_path / "few.json")).runs) == 2


def test_a_part_is_the_mean_of_what_was_logged_in_it_and_one_that_is_not_over_is_left_out():
    points = [(5, 1.0), (10, 3.0), (15, 5.0), (20, 7.0), (25, 9.0)]
    assert part_means(points, [10, 20, 30]) == [(10, 2.0), (20, 6.0)]
    assert part_means(points, [2, 10]) == [(10, 2.0)]


def simulated(draws, *, higher=1.0, noise=0.03):
    """A falling loss with the noise of steps and of seeds."""
    steps = np.arange(5, 405, 5)
    curve = (0.2 + 0.8 * np.exp(-steps / 60)) * np.exp(noise * draws.normal(size=len(steps)) + 0.003 * draws.normal())
    return [(int(step), float(value * higher)) for step, value in zip(steps, curve, strict=True)]


def written(folder, points, *, seed, **settings):
    """A run folder with these losses."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in points))
    config = {"latents": "x", "out": str(folder), "seed": seed, "lr": 1e-3, "batch-size": 64, "log-every": 5} | settings
    text = "# data_identity: 123\n" + "".join(f"{name}: {value}\n" for name, value in config.items())
    (folder / "config.yaml").write_text(text)
    return folder


@pytest.fixture
def reference(tmp_path):
    runs = [written(tmp_path / f"r{seed}", simulated(np.random.default_rng(seed)), seed=seed) for seed in range(3)]
    assert plot([*map(str, runs), "--save-reference", str(tmp_path / "small.json")]) == 0
    return tmp_path / "small.json"


def test_runs_of_the_recipe_lie_within_and_others_do_not(reference, tmp_path):
    found = read_reference(str(reference))
    (tmp_path / "config.yaml").write_text("seed: 9\nlr: 0.001\nbatch-size: 64\n")

    def told(seed, **other):
        series = {"loss": simulated(np.random.default_rng(seed), **other)}
        return verdict("mine", series, tmp_path, found)[0]

    same = [told(seed) for seed in range(100, 160)]
    assert sum("lies within the band of 3 seeds of small" in words for words in same) >= 55
    higher = [told(seed, higher=1.06) for seed in range(200, 220)]
    assert sum("leaves the band" in words for words in higher) >= 18
    assert "expected" in higher[0] and "first not at step" in higher[0]


def test_a_run_that_goes_astray_at_the_end_alone_does_not_lie_within(reference, tmp_path):
    points = [(step, value * (1.5 if step > 360 else 1)) for step, value in simulated(np.random.default_rng(7))]
    (tmp_path / "config.yaml").write_text("seed: 9\n")
    (words, *_) = verdict("mine", {"loss": points}, tmp_path, read_reference(str(reference)))
    assert words.startswith("mine leaves the band") and "first not at step" in words


def test_the_command_says_in_a_sentence_and_names_what_makes_it_another_recipe(reference, tmp_path, capsys):
    mine = written(tmp_path / "mine", simulated(np.random.default_rng(50))[:40], seed=50, lr=2e-3)
    assert plot([str(mine), "--reference", str(reference)]) == 0
    said = capsys.readouterr().err
    assert "mine lies within the band of 3 seeds of small: loss in 18 of 20 points until step 200\n" in said
    assert "mine is not that recipe: --lr 0.002 (not 0.001)" in said
    assert (mine / "curves.png").is_file()


def test_bands_are_drawn_at_the_middle_of_the_parts_that_were_averaged(reference):
    drawn = drawn_bands(read_reference(str(reference)))
    assert [row[0] for row in drawn["loss"][:2]] == [5, 15] and len(drawn["loss"]) == 40


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--save-reference", "{}.json", "--reference", "small"],
            "--reference and --save-reference exclude each other",
        ),
        (["--scores", "a.json"], "--scores stand in a reference; give --save-reference"),
        (["--save-reference", "{}.json", "--scores", "a.json"], "--scores names 1 results for 2 runs"),
        (["--save-reference", "{}.txt"], "must end in .json"),
        (["--reference", "smal"], "--reference smal is not a file"),
        (["--save-reference", "{}.json"], "needs two or more runs with seeds of their own, not seeds [1, 1]"),
        (["--reference", "{run}/metrics.jsonl"], "metrics.jsonl"),
        (["--reference", "{run}/other.json"], "is no dit-reference of version 1"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, capsys, flags, sentence):
    runs = [written(tmp_path / name, [(1, 1.0), (2, 0.5)], seed=1) for name in "ab"]
    (runs[0] / "other.json").write_text("{}")
    words = [flag.format(tmp_path / "new", run=runs[0]) if "{" in flag else flag for flag in flags]
    assert plot([*map(str, runs), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_runs_that_differ_in_more_than_the_seed_make_no_reference(tmp_path, capsys):
    runs = [written(tmp_path / f"{seed}", [(1, 1.0)], seed=seed, lr=0.1 + seed) for seed in range(2)]
    assert plot([*map(str, runs), "--save-reference", str(tmp_path / "r.json")]) == 2
    assert "in more than the seed: --lr 1.1 (not 0.1)" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_a_reference_of_real_runs_has_their_command_scores_and_validation_losses(store, tmp_path, capsys):
    for seed in range(3):
        flags = ["--seed", str(seed), "--validation-share", "0.2", "--validate-every", "2", "--objective", "flow"]
        assert train(store, tmp_path / f"run-{seed}", *flags, steps=6) == 0
        (tmp_path / f"score-{seed}.json").write_text(json.dumps({"metrics": {"FD-pixels-1k": 10.0 + seed}}))
    runs, scores = ([str(tmp_path / f"{name}") for name in names] for names in
                    (["run-0", "run-1"], ["score-0.json", "score-1.json"]))  # fmt: skip
    assert plot([*runs, "--save-reference", str(tmp_path / "r.json"), "--scores", *scores]) == 0
    made = json.loads((tmp_path / "r.json").read_text())
    assert [run["seed"] for run in made["runs"]] == [0, 1] and made["runs"][1]["scores"] == {"FD-pixels-1k": 11.0}
    logged = [
        (line["step"], line["validation_loss_ema"]) for line in lines(tmp_path / "run-0") if line["step"] % 2 == 0
    ]
    assert made["runs"][0]["curves"]["validation_loss_ema"] == [[s, pytest.approx(v, rel=1e-5)] for s, v in logged]
    assert "--objective flow" in made["command"] and "--validation-share 0.2" in made["command"]
    assert str(tmp_path) not in json.dumps(made)
    capsys.readouterr()
    assert plot([str(tmp_path / "run-2"), "--reference", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().err
    assert "of 2 seeds of r: loss in " in said and "r has FD-pixels-1k 10, 11" in said
    assert "is not that recipe" not in said


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_committed_reference_is_small_whole_and_its_own_runs_lie_within(path, tmp_path):
    assert path.stat().st_size < 50_000
    found = read_reference(path.stem)
    assert len(found.runs) >= 3 and all(run.scores for run in found.runs)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    for run in found.runs:
        series = {name: [(int(step), value) for step, value in points] for name, points in run.curves.items()}
        assert "lies within" in verdict("own", series, Path(tmp_path), found)[0]
