import pytest
import yaml

from pipeline.runtime.cli import parse_options
from pipeline.runtime.errors import UserError
from studies.cells import SHIPPED, planned, read_study, train_flags
from studies.forecast import forecast
from tests.train.runs import make_store
from tests.train.test_alignment import add_features
from train.__main__ import PRESETS
from train.options import TrainOptions

PLAIN = {"question": "?", "samples": 640, "cells": {"a": {}, "b": {"lr": 0.5}}, "train": {"batch-size": 64}}


def written(folder, **changes):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(PLAIN | changes))
    return str(path)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_every_cell_of_a_shipped_study_is_flags_that_dit_train_takes_and_a_network(name, quick, tmp_path):
    store = make_store(tmp_path / "store", samples=10, classes=10)
    study = read_study(name, quick=quick)
    runs = planned(study, {run.name: 0.0 for run in planned(study, {}, ())}, ())
    assert {run.cell for run in runs} == set(study.cells)
    wanted = [train_flags(study, run, data=str(store), out=tmp_path / "run") for run in runs]
    for flags in {str(flags | {"seed": 0}): flags for flags in wanted}.values():  # each once, whatever its seed
        path = tmp_path / "flags.yaml"
        path.write_text(yaml.safe_dump(flags))
        options = parse_options(
            TrainOptions, ["--config", str(path)], prog="dit-train", description="", presets=PRESETS
        )
        assert options.optimizer.steps * options.optimizer.batch_size == study.samples
    rows, bad = forecast(study, str(store)) if quick else ([(cell,) for cell in (*study.cells, "all")], {})
    assert bad == {} and [row[0] for row in rows] == [*study.cells, "all"]


def test_the_scaling_study_is_of_nine_networks_of_three_widths_and_three_patches():
    cells = read_study("scaling").cells.values()
    assert len({(flags["hidden-size"], flags["patch-size"]) for flags in cells}) == 9
    assert len({flags["hidden-size"] for flags in cells}) == len({flags["patch-size"] for flags in cells}) == 3


def test_the_budget_is_cut_into_whole_steps_and_a_schedule_falls_over_it(tmp_path):
    study = read_study(written(tmp_path, measure=4, train={"batch-size": 64, "lr-schedule": "cosine"}))
    flags = train_flags(study, planned(study, {}, ())[0], data="store", out=tmp_path)
    assert (flags["save-every"], flags["steps"], flags["decay-steps"], flags["keep-last"]) == (2, 8, 8, 0)


def test_a_sweep_is_tried_on_a_seed_of_its_own_and_the_seeds_take_the_best(tmp_path):
    study = read_study(written(tmp_path, sweep={"lr": [0.1, 0.2]}, seeds=2))
    tries = planned(study, {}, ())
    assert [run.name for run in tries] == [f"{cell}.lr-{lr}.seed-0" for cell in "ab" for lr in (0.1, 0.2)]
    runs = planned(study, {"a.lr-0.1.seed-0": 3.0, "a.lr-0.2.seed-0": 2.0, "b.lr-0.1.seed-0": 1.0}, ())
    measured = [run for run in runs if not run.tried]
    assert [(run.name, run.flags) for run in measured] == [("a.seed-1", {"lr": 0.2}), ("a.seed-2", {"lr": 0.2})]
    failed = planned(study, {"b.lr-0.1.seed-0": 1.0}, {"b.lr-0.2.seed-0", "a.lr-0.1.seed-0", "a.lr-0.2.seed-0"})
    assert [run.name for run in failed if not run.tried] == ["b.seed-1", "b.seed-2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": 3}, "sample is unknown; did you mean samples?"),
        ({"samples": "many"}, "samples is 'many', but must be a whole number"),
        ({"cells": {}}, "cells, samples, measure and seeds must be at least 1"),
        ({"cells": {"../a": {}}}, "the cell name '../a' is no plain word"),
        ({"baseline": "c"}, "the baseline c is none of its cells"),
        ({"train": {"steps": 5, "seed": 1}}, "train sets seed, steps, which the study sets itself"),
        ({"draw": ["bars"]}, "draw"),
        (
            {"evaluate": {"features": ["pixels", "judge"], "metrics": "fd-pixels"}},
            "a compares by several features, which metrics cannot be set for",
        ),
    ],
)
def test_what_is_no_study_is_one_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match="own.yaml is no study") as refused:
        read_study(written(tmp_path, **changes))
    assert message in str(refused.value)


def test_a_name_that_is_neither_file_nor_shipped_leads_to_those_that_are():
    with pytest.raises(
        UserError, match="the study scalling is not a file; the names .* conditioning, recipes, scaling"
    ):
        read_study("scalling")


def test_a_network_that_cannot_be_is_named_before_anything_is_trained(tmp_path):
    study = read_study(written(tmp_path, train={"model": "DiT-Ti/2"}, cells={"good": {}, "bad": {"patch-size": 3}}))
    rows, bad = forecast(study, str(make_store(tmp_path / "store")))
    assert [row[0] for row in rows] == ["good", "all"]
    assert list(bad) == ["bad"] and "8×8 cells does not divide into patches of 3" in bad["bad"]


def test_a_network_with_an_encoders_features_is_as_wide_as_those_beside_the_store_and_else_cannot_be(tmp_path):
    cells = {"aligned": {"align-features": True}, "token": {"class-token": True}}
    study = read_study(written(tmp_path, train={"model": "DiT-Ti/2"}, cells=cells))
    rows, bad = forecast(study, str(add_features(make_store(tmp_path / "store"), cls=10)))
    assert [row[0] for row in rows] == ["aligned", "token", "all"] and not bad
    assert "--class-token needs" in forecast(study, str(make_store(tmp_path / "bare")))[1]["token"]
