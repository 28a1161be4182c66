"""Whole studies of tiny networks: what is finished, what is bad, what is shared, what a kill leaves."""

import json
import re
import sys

import pytest
import yaml

from pipeline.vae import load_vae
from studies.__main__ import main
from tests import forked
from tests.train.runs import make_store, running, wait_for

CELLS = {"wide": {"hidden-size": 32}, "bad": {"patch-size": 3}, "narrow": {"hidden-size": 16}}
STUDY = {
    "question": "Is <wide> better?",
    "samples": 32,
    "measure": 2,
    "baseline": "narrow",
    "expected": ["wide", "bad", "narrow"],
    "draw": ["flops", "compute", "curves", "samples"],
    "train": {"model": "DiT-Ti/2", "depth": 1, "num-heads": 2, "objective": "flow", "batch-size": 8, "lr": 1e-3},
    "evaluate": {"features": "pixels", "num-samples": 12, "steps": 2, "guidance": 1, "batch-size": 12},
    "cells": CELLS,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Random latents of the demo VAE."""
    return make_store(tmp_path_factory.mktemp("store") / "latents", samples=40, vae=load_vae("demo").describe())


def written(folder, **changes):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return str(path)


def study(store, folder, *flags, **changes):
    """The words of a study's command."""
    return [written(folder, **changes), "--data", str(store), "--out", str(folder / "out"), *flags]


@pytest.fixture(scope="module")
def made(store, tmp_path_factory):
    """(folder, status, standard error) of a study with a bad cell; its processes are forks, which begin sooner."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        said = []
        context = forked.server()
        patch.setattr("studies.measure.multiprocessing.get_context", lambda _: context)
        patch.setattr("studies.work.warn", said.append)
        status = main(study(store, folder))
    return folder, status, "\n".join(said)


def result(folder, name):
    return json.loads((folder / "out" / "cells" / name / "RESULT.json").read_text())


def test_a_bad_cell_is_named_with_its_commands_words_and_the_rest_goes_on(made):
    folder, status, said = made
    assert status == 1
    assert "bad.seed-0 is left out: dit-train: error: " in said and "does not divide into patches of 3×3" in said
    assert [point["samples"] for point in result(folder, "wide.seed-0")["points"]] == [16, 32]
    assert result(folder, "narrow.seed-0")["macs"] < result(folder, "wide.seed-0")["macs"]


def test_a_cell_is_an_ordinary_run_folder_of_which_the_last_checkpoint_stays(made):
    run = made[0] / "out" / "cells" / "wide.seed-0" / "run"
    assert (run / "config.yaml").is_file() and (run / "metrics.jsonl").is_file()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000004"]


def test_the_report_is_one_page_that_needs_no_other_file_and_the_json_behind_it(made):
    report = made[0] / "out" / "report"
    page = (report / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4 and "Is &lt;wide&gt; better?" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    found = json.loads((report / "report.json").read_text())
    assert [row[0] for row in found["table"]] == ["cell", "wide", "narrow"]
    assert any("bad.seed-0 failed" in sentence for sentence in found["sentences"])
    assert any(sentence.startswith("Not finished") and "bad" in sentence for sentence in found["sentences"])
    wide, narrow = (found["runs"][f"{cell}.seed-0"]["points"][-1]["metrics"] for cell in ("wide", "narrow"))
    told = "found" if wide["FD-pixels-12"] < narrow["FD-pixels-12"] else "not found"
    assert f"The expected order, wide, narrow, is {told}; step by step:" in found["sentences"]
    assert {path.name for path in report.glob("*.png")} == {"flops.png", "compute.png", "curves.png", "samples.png"}


def test_a_finished_cell_is_never_run_again_and_one_of_other_settings_is_refused(made, store, capfd):
    folder, *_ = made
    path = folder / "out" / "cells" / "wide.seed-0" / "RESULT.json"
    log = path.with_name("log.txt")
    before = path.stat().st_mtime_ns, log.stat().st_size
    report = folder / "out" / "report" / "report.json"
    good = {"cells": {name: flags for name, flags in CELLS.items() if name != "bad"}, "expected": []}
    assert main(study(store, folder, **good)) == 0
    assert (path.stat().st_mtime_ns, log.stat().st_size) == before
    assert main(study(store, folder, **good, samples=64)) == 2
    assert len(json.loads(report.read_text())["runs"]) == 2
    assert "was made with other settings (train); choose another --out" in capfd.readouterr().err
    assert (path.stat().st_mtime_ns, log.stat().st_size) == before


@pytest.mark.slow
def test_a_judge_of_the_store_compares_the_same_images_as_pixels_do_and_is_made_once(
    made, store, tmp_path, monkeypatch, capfd
):
    pytest.importorskip("transformers")
    monkeypatch.setattr("studies.judge.BATCHES", 1)
    one = {"cells": {"narrow": CELLS["narrow"]}, "expected": [], "metric": "FD-judge", "draw": ["curves"]}
    one["evaluate"] = STUDY["evaluate"] | {"features": ["pixels", "judge"]}
    assert main(study(store, tmp_path, **one)) == 0
    points = result(tmp_path, "narrow.seed-0")["points"]
    by_judge = {f"{name}-judge-12" for name in ("FD", "Precision", "Recall", "Recognised")}
    by_pixels = [point["metrics"] for point in result(made[0], "narrow.seed-0")["points"]]
    assert [point["metrics"].keys() for point in points] == [by_judge | each.keys() for each in by_pixels]
    assert [{name: point["metrics"][name] for name in each} for point, each in zip(points, by_pixels, strict=True)] == (
        by_pixels
    )
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert report["table"][0][4:7] == ["FD-judge", "FD-pixels", "held-out loss"]
    assert not list((tmp_path / "out" / "cells" / "narrow.seed-0").glob("measured*"))
    assert main(study(store, tmp_path, **one)) == 0
    assert capfd.readouterr().err.count("training a judge") == 1


def test_a_dry_run_tells_cells_and_costs_writes_nothing_and_names_what_cannot_be(store, tmp_path, capfd):
    assert main(study(store, tmp_path, "--dry-run")) == 1
    shown = capfd.readouterr()
    assert "| wide | 1 | " in shown.out and "| all | 2 | " in shown.out
    assert "bad cannot be trained: this network cannot be built" in shown.err
    assert not (tmp_path / "out").exists()


def command(store, folder, **changes):
    return [sys.executable, "-m", "studies", *study(store, folder, **changes)]


@pytest.mark.slow
def test_a_study_that_is_killed_leaves_no_run_behind_and_goes_on_to_the_same_numbers(made, store, tmp_path):
    """The run under way dies with the study: its folder is free for the next command at once."""
    one = {"cells": {"wide": CELLS["wide"]}, "baseline": "wide", "expected": []}
    folder = tmp_path / "out" / "cells" / "wide.seed-0"
    with running(command(store, tmp_path, **one)) as process:
        wait_for((folder / "run" / "config.yaml").is_file)
        process.kill()
        process.communicate()
    assert not (folder / "RESULT.json").exists()
    assert main(study(store, tmp_path, **one)) == 0
    straight = [point["metrics"] for point in result(made[0], "wide.seed-0")["points"]]
    assert [point["metrics"] for point in result(tmp_path, "wide.seed-0")["points"]] == straight


@pytest.mark.slow
def test_processes_share_a_folder_and_each_run_is_made_once(store, tmp_path):
    few = {
        "cells": {f"w{width}": {"hidden-size": width} for width in (8, 16, 24, 32)},
        "baseline": "w8",
        "expected": [],
        "measure": 1,
    }
    with running(command(store, tmp_path, **few)) as first, running(command(store, tmp_path, **few)) as second:
        told = [process.communicate()[1] for process in (first, second)]
        assert first.returncode == second.returncode == 0
    assert all(text.count(": done in") >= 1 for text in told)
    for width in (8, 16, 24, 32):
        log = (tmp_path / "out" / "cells" / f"w{width}.seed-0" / "log.txt").read_text()
        assert log.count("from the beginning; until step") == 1
    rows = json.loads((tmp_path / "out" / "report" / "report.json").read_text())["table"]
    assert [row[0] for row in rows] == ["cell", "w8", "w16", "w24", "w32"]
