"""`dit-evaluate` from the command line to its numbers, on tiny sets and with weights filled by rule."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sample.evaluate import features
from sample.evaluate.__main__ import main
from sample.evaluate.folder import FolderImages
from sample.evaluate.job import EvaluationJob
from sample.evaluate.metrics import Gaussian
from sample.evaluate.npz import NpzImages
from sample.evaluate.reference import write_statistics
from tests.families import kill_family

WITHOUT_FID = "is,precision,recall,kid"


@pytest.fixture(scope="module")
def sets(tmp_path_factory, pictures, save_pictures):
    """The same 6 images as a folder and as an .npz, and 5 others."""
    place = tmp_path_factory.mktemp("sets")
    save_pictures(place / "folder", pictures(6))
    np.savez_compressed(place / "same.npz", arr_0=pictures(6), arr_1=np.arange(6))
    np.savez(place / "others.npz", arr_0=pictures(5, first=50))
    return place


@pytest.fixture
def run(weights_file, kept_network, capsys):
    """`run(*arguments)`: (status, stdout, stderr) of dit-evaluate in this process."""

    def go(*arguments, inception=True):
        named = ["--inception", str(weights_file)] if inception else []
        status = main([*(str(argument) for argument in arguments), *named, "--batch-size", "3"])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return go


MOVING = 9


def statistics(path, *, shift=0.0, scale=1.0, count=50_000, sigma_s=True, **provenance):
    """Gaussians of which only the first few features vary: quick to compare."""
    gaussians = {}
    for feature, width in {"features_2048": 2048, "spatial": 2023}.items():
        spread = np.where(np.arange(width) < MOVING, scale, 0.0)
        gaussians[feature] = Gaussian(mean=np.full(width, shift), covariance=np.diag(spread))
    if not sigma_s:
        del gaussians["spatial"]
    write_statistics(path, gaussians, count=count, features=None, provenance=provenance)
    return path


def test_a_folder_against_the_same_images_in_an_npz(run, sets, tmp_path):
    out = tmp_path / "made" / "result.json"
    arguments = ("--samples", sets / "folder", "--reference", sets / "same.npz", "--metrics", WITHOUT_FID, "--out", out)
    status, table, _ = run(*arguments)
    assert status == 0
    result = json.loads(out.read_text())
    assert list(result["metrics"]) == ["IS-6", "Precision-6", "Recall-6", "KID-6"]
    assert result["metrics"]["Precision-6"] == result["metrics"]["Recall-6"] == 1.0
    assert result["samples"]["images"]["pixels_sha256"] == result["reference"]["images"]["pixels_sha256"]
    assert result["samples"]["images"]["count"] == 6
    assert len(result["inception"]["sha256"]) == 64
    assert result["options"]["seed"] == 0
    assert "torch" in result["versions"]
    for name, value in result["metrics"].items():
        assert any(line.split()[:2] == [name, f"{value:.6f}"] for line in table.splitlines())
    assert list(out.parent.iterdir()) == [out], "unfinished work is cleared away"
    assert run(*arguments) == (0, table, f"{out}: there already, made from these very inputs; nothing to do\n")


def test_another_result_is_not_overwritten_without_being_told_to(run, sets, tmp_path):
    out = tmp_path / "result.json"
    compare = ("--reference", sets / "others.npz", "--metrics", "kid", "--kid-subsets", 2, "--out", out)
    assert run("--samples", sets / "same.npz", *compare)[0] == 0
    before = out.read_text()
    status, _, message = run("--samples", sets / "folder", *compare, "--seed", 1)
    assert (status, out.read_text()) == (2, before)
    assert "holds another result; choose another name or --overwrite" in message
    assert run("--samples", sets / "folder", *compare, "--seed", 1, "--overwrite")[0] == 0
    assert out.read_text() != before


@pytest.mark.slow
def test_a_reference_made_of_images_serves_in_their_place_byte_for_byte_the_same(run, sets, tmp_path):
    make = ("--reference", sets / "folder", "--reference-features", "--make-reference")
    for name in ("a", "b"):
        status, table, notes = run(*make, tmp_path / f"{name}.npz")
        assert (status, table) == (0, "")
        assert "will hold statistics of 6 images; FID needs at least 2048" in notes
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert "nothing to do" in run(*make, tmp_path / "a.npz")[2]
    assert run("--reference", sets / "others.npz", "--make-reference", tmp_path / "a.npz")[0] == 2
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive["mu"].shape == (2048,)
        assert archive["sigma_s"].shape == (2023, 2023)
        assert archive["count"] == 6
    numbers = {}
    for reference in (sets / "folder", tmp_path / "a.npz"):
        out = tmp_path / f"against-{reference.stem}.json"
        compare = ("--metrics", "precision,recall,kid", "--kid-subsets", 3, "--out", out)
        assert run("--samples", sets / "others.npz", "--reference", reference, *compare)[0] == 0
        numbers[reference] = json.loads(out.read_text())["metrics"]
    assert numbers[sets / "folder"] == numbers[tmp_path / "a.npz"]


def test_statistics_alone_need_no_network_and_give_the_closed_form(run, tmp_path):
    first = statistics(tmp_path / "a.npz", shift=0.0, scale=1.0, count=2500)
    second = statistics(tmp_path / "b.npz", shift=0.1, scale=4.0)
    status, _, notes = run(
        "--samples",
        first,
        "--reference",
        second,
        "--out",
        tmp_path / "r.json",
        "--metrics",
        "fid,sfid",
        inception=False,
    )
    assert status == 0
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert metrics == pytest.approx({"FID-2500": 20.48 + MOVING, "sFID-2500": 20.23 + MOVING}, rel=1e-9)
    assert "fewer than 10000" in notes
    assert str(second) not in notes


def test_fid_carries_its_count(run, tmp_path):
    first, second = statistics(tmp_path / "a.npz"), statistics(tmp_path / "b.npz", shift=0.1)
    _, table, notes = run("--samples", first, "--reference", second, "--metrics", "fid", inception=False)
    assert table.split()[3:5] == ["FID-50k", "20.480000"]
    assert "warning" not in notes


@pytest.mark.slow
def test_a_reference_in_adms_form_gives_its_own_statistics_and_its_images(run, sets, tmp_path, pictures):
    """FID from mu and sigma as they stand, precision and recall from the images beside them."""
    eye = np.diag(np.arange(2048) < MOVING).astype(np.float64)
    np.savez(tmp_path / "adm.npz", arr_0=pictures(6), mu=np.full(2048, 0.5), sigma=eye)
    np.savez(tmp_path / "ours.npz", arr_0=pictures(6), mu=np.zeros(2048), sigma=eye)
    both = ("--samples", tmp_path / "ours.npz", "--reference", tmp_path / "adm.npz")
    status, _, _ = run(*both, "--metrics", "fid,precision", "--out", tmp_path / "r.json")
    assert status == 0
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert metrics == pytest.approx({"FID": 512.0, "Precision-6": 1.0}, rel=1e-9)


def test_by_default_what_a_reference_of_statistics_cannot_give_is_left_out_and_told(run, tmp_path):
    first = statistics(tmp_path / "a.npz", sigma_s=False)
    second = statistics(tmp_path / "b.npz")
    status, table, notes = run("--samples", first, "--reference", second, inception=False)
    assert status == 0
    assert [line.split()[0] for line in table.splitlines()] == ["metric", "FID-50k"]
    for metric in ("sfid", "is", "precision", "recall"):
        assert f"note: {metric} is left out: it needs" in notes


def test_statistics_of_other_weights_are_refused(run, tmp_path):
    first = statistics(tmp_path / "a.npz", inception={"sha256": "aa"})
    second = statistics(tmp_path / "b.npz", inception={"sha256": "bb"})
    status, _, message = run("--samples", first, "--reference", second, "--metrics", "fid", inception=False)
    assert status == 2
    assert "different Inception weights" in message


def test_few_images_are_refused_for_fid_with_one_sentence(run, sets):
    status, table, message = run("--samples", sets / "folder", "--reference", sets / "others.npz")
    assert (status, table) == (2, "")
    assert message.count("\n") == 1
    assert "fid and sfid: at least 2048 images are needed, but --samples" in message
    assert "use --metrics kid" in message


def test_a_folder_takes_the_size_of_the_other_side(run, sets, tmp_path, pictures, save_pictures):
    save_pictures(tmp_path / "large", pictures(4, size=64))
    out = tmp_path / "r.json"
    compare = ("--reference", sets / "others.npz", "--metrics", "kid", "--kid-subsets", 1, "--out", out)
    status, _, notes = run("--samples", tmp_path / "large", *compare)
    assert (status, "pixels:" in notes) == (0, False)
    described = json.loads(out.read_text())["samples"]["images"]
    assert (described["width"], described["height"], described["crop"]) == (24, 24, "adm-center")
    np.savez(tmp_path / "large.npz", pictures(4, size=64))
    status, _, notes = run("--samples", tmp_path / "large.npz", *compare, "--overwrite")
    assert status == 0
    assert "64×64 pixels" in notes


def test_the_same_input_on_both_sides_is_looked_at_once(run, sets, monkeypatch):
    looked_at = []
    original = NpzImages.batches
    monkeypatch.setattr(NpzImages, "batches", lambda self, *a: looked_at.append(a) or original(self, *a))
    same = sets / "same.npz"
    assert run("--samples", same, "--reference", same, "--metrics", "precision,is")[0] == 0
    assert looked_at == [(0, 6, 3)]


def test_features_that_are_not_finite_name_their_image(run, sets, rule_weights, tmp_path, weights_file):
    import torch
    from safetensors.torch import save_file

    broken = {**rule_weights, "fc.weight": torch.full((1008, 2048), torch.inf)}
    save_file(broken, tmp_path / "w.safetensors")
    arguments = ["--samples", str(sets / "folder"), "--metrics", "is", "--inception", str(tmp_path / "w.safetensors")]
    status, _, message = run(*arguments, inception=False)
    assert status == 2
    assert "features are not finite (NaN or infinity) for" in message
    assert "folder/a/0000.png" in message


def test_finished_parts_survive_an_interruption(run, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(FolderImages, "part_size", 2)
    made = []
    original = features._features_of_part

    def until_the_third(images, start, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(start)
        return original(images, start, *rest)

    arguments = ("--samples", sets / "folder", "--metrics", "is", "--out", tmp_path / "r.json")
    monkeypatch.setattr(features, "_features_of_part", until_the_third)
    assert run(*arguments)[0] == 130
    assert not (tmp_path / "r.json").exists()
    monkeypatch.setattr(
        features, "_features_of_part", lambda images, start, *rest: made.append(start) or original(images, start, *rest)
    )
    assert run(*arguments)[0] == 0
    assert made == [0, 2, 4]
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["r.json"]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run, sets, tmp_path, weights_file, monkeypatch):
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import sys\n"
        "from sample.evaluate.folder import FolderImages\n"
        "from sample.evaluate.npz import NpzImages\n"
        "FolderImages.part_size = NpzImages.part_size = 2\n"
        "from sample.evaluate.__main__ import main\n"
        "sys.exit(main())\n"
    )
    compare = ["--samples", sets / "folder", "--reference", sets / "others.npz", "--metrics", WITHOUT_FID]
    compare += ["--kid-subsets", 5, "--inception", weights_file, "--batch-size", 3]
    monkeypatch.setattr(FolderImages, "part_size", 2)
    monkeypatch.setattr(NpzImages, "part_size", 2)
    assert run(*compare, "--out", tmp_path / "one.json", inception=False)[0] == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        *compare,
        "--out",
        tmp_path / "two.json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "ACCELERATE_USE_CPU": "true"}
    launched = subprocess.Popen(
        [str(word) for word in command], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = launched.communicate(timeout=500)
    finally:
        if launched.poll() is None:
            os.killpg(launched.pid, signal.SIGKILL)
    assert launched.returncode == 0, said
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["metrics"] == two["metrics"]
    assert one["std"] == two["std"]
    assert one["samples"] == two["samples"]


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_the_number_of_cores(run, sets, tmp_path):
    import torch

    compare = ("--samples", sets / "folder", "--reference", sets / "others.npz", "--metrics", WITHOUT_FID)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            assert run(*compare, "--kid-subsets", 5, "--out", tmp_path / f"{threads}.json")[0] == 0
        finally:
            torch.set_num_threads(before)
        results.append(json.loads((tmp_path / f"{threads}.json").read_text())["metrics"])
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_mistake_is_one_sentence_under_several_processes_too(sets, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--module"]
    words += ["sample.evaluate", "--samples", sets / "folder", "--metrics", "is", "--inception", tmp_path / "none.pth"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        [str(word) for word in words], env=environment, stderr=subprocess.PIPE, text=True
    ) as launched:
        try:
            _, said = launched.communicate(timeout=300)
        finally:
            kill_family(launched)
    assert "dit-evaluate (process 0 of 2): error: --inception" in said
    assert "sample/evaluate/" not in said and "distributed_c10d" not in said, "the launcher's own lines only"


def test_a_reference_that_makes_no_sense_is_one_sentence(run, sets, tmp_path):
    good = dict(np.load(statistics(tmp_path / "good.npz")))
    for change, message in (
        ({"count": np.array([5, 6])}, "count of .* is no number of images"),
        ({"sigma": -good["sigma"]}, "sigma of .* is no covariance"),
        ({"sigma": np.triu(np.ones((2048, 2048)))}, "sigma of .* is no covariance"),
    ):
        np.savez(tmp_path / "bad.npz", **{**good, **change})
        status, _, said = run(
            "--samples", tmp_path / "bad.npz", "--reference", tmp_path / "good.npz", "--metrics", "fid"
        )
        assert status == 2 and re.search(message, said), said


def test_weights_of_another_kind_leave_no_unfinished_work(run, sets, tmp_path, cache):
    (tmp_path / "w.txt").write_text("no weights")
    status, _, message = run(
        "--samples", sets / "folder", "--metrics", "is", "--inception", tmp_path / "w.txt", inception=False
    )
    assert status == 2
    assert "is no weight file that is known here" in message
    assert not cache.exists()


@pytest.mark.parametrize("work", [None, "shared"])
def test_overwrite_drops_other_features_only_from_a_work_folder_of_its_own(tmp_path, work):
    """Where --work names one, other commands may need what is in it; where none is there, nothing is to drop."""
    options = SimpleNamespace(overwrite=True, work=work, out="scores.json", make_reference=None)
    job = SimpleNamespace(
        options=options, metrics=("fid",), extractions={}, work_base=tmp_path / "work", _extractions=lambda *_: {}
    )
    assert EvaluationJob.superseded(job) == set()
    (job.work_base / "other").mkdir(parents=True)
    assert EvaluationJob.superseded(job) == ({job.work_base / "other"} if work is None else set())
