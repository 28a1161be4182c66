"""`dit-tune` on a tiny checkpoint: the same points however often it is killed and however many processes share it."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.diffusion import RectifiedFlow
from pipeline.runtime.processes import Launch
from pipeline.runtime.work_queue import Presence
from sample.__main__ import main as sample
from sample.evaluate.__main__ import main as evaluate
from sample.options import ReverseOptions, SampleOptions
from sample.resolve import resolve
from sample.tune.__main__ import main
from sample.tune.points import passes_per_image
from tests.families import kill_family
from tests.forked import Forked

ROOT = Path(__file__).parent.parent.parent.parent
FEW = ("--num-samples", "12", "--batch-size", "4", "--device", "cpu")
SEARCH = ("--guidance", "1:3", "--points", "4", "--steps", "2,3", "--sampler", "ddim")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, vae_folder):
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8))
    return path


@pytest.fixture
def words(smallest, vae_folder, reference):
    """The words of a dit-tune for a folder."""

    def build(out, *more):
        given = ("--checkpoint", smallest, "--vae", vae_folder, "--reference", reference, "--features", "pixels")
        return [str(word) for word in (*given, "--out", out, *FEW, *more)]

    return build


@pytest.fixture
def tune(words, capsys):
    """`tune(folder, *flags)`: (status, stdout, stderr) of dit-tune in this process."""

    def go(out, *more):
        status = main(words(out, *more))
        said = capsys.readouterr()
        return status, said.out, said.err

    return go


def result_of(out):
    return json.loads((out / "tune.json").read_text())


def contents(out):
    """{name: bytes} of everything below a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_point_is_what_dit_evaluate_gives_and_the_best_ones_command_line_makes_its_images(
    tune, smallest, vae_folder, reference, tmp_path
):
    status, shown, said = tune(tmp_path / "out", "--steps", "2,4", "--guidance", "1,2.5", "--seed", "7")
    assert status == 0, said
    result = result_of(tmp_path / "out")
    assert result["metric"] == "FD-pixels-12"
    assert [row["value"] for row in result["rows"]] == sorted(row["value"] for row in result["rows"])
    assert {(row["steps"], row["guidance"]) for row in result["rows"]} == {(2, 1), (2, 2.5), (4, 1), (4, 2.5)}
    for row in result["rows"][:2]:
        out = tmp_path / f"{row['steps']}-{row['guidance']}.json"
        given = ("--samples", smallest, "--reference", reference, "--features", "pixels", "--metrics", "fd-pixels")
        given += (
            "--vae",
            vae_folder,
            "--out",
            out,
            "--seed",
            7,
            "--steps",
            row["steps"],
            "--guidance",
            row["guidance"],
        )
        assert evaluate([str(word) for word in (*given, *FEW)]) == 0
        assert json.loads(out.read_text())["metrics"]["FD-pixels-12"] == row["value"]
    assert shown.splitlines()[-1] == f"best: {result['best']}"
    command, *flags = shlex.split(result["best"])
    assert command == "dit-sample"
    flags[flags.index("samples.npz")] = str(tmp_path / "best.npz")
    assert sample([*flags, "--seed", "7", "--batch-size", "4", "--device", "cpu"]) == 0
    recipe = json.loads((tmp_path / "best.npz.json").read_text())["recipe"]
    assert (recipe["steps"], recipe["guidance"]) == (result["rows"][0]["steps"], result["rows"][0]["guidance"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["points", "tune.json", "tune.png"]
    assert len(list((tmp_path / "out" / "points").iterdir())) == 4


def test_finished_points_are_never_made_again_also_by_another_search(tune, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert tune(out, *SEARCH)[0] == 0
    before = contents(out)

    def never(*_, **__):
        pytest.fail("a finished point is made again")

    with monkeypatch.context() as patched:
        patched.setattr("sample.generate.Generator.latents", never)
        status, _, said = tune(out, *SEARCH)
        assert status == 0 and "nothing to do" in said
        assert contents(out) == before
        scale = result_of(out)["rows"][0]["guidance"]
        other = ("--guidance", str(scale), "--steps", "2,3", "--sampler", "ddim")
        status, _, said = tune(out, *other)
        assert status == 2 and "is there already, of another search; pass --overwrite" in said
        assert contents(out) == before
    status, _, said = tune(out, *other, "--overwrite")
    assert status == 0, said
    assert len(result_of(out)["rows"]) == 2
    assert len(contents(out)) == len(before) + sum(
        row["value"] not in [was["value"] for was in json.loads(before["tune.json"])["rows"]]
        for row in result_of(out)["rows"]
    )


def test_repeat_gives_spread_and_names_the_cheapest_setting_within_it(tune, tmp_path):
    out = tmp_path / "out"
    status, shown, said = tune(out, "--steps", "2,3,4", "--guidance", "1", "--repeat", "3")
    assert status == 0, said
    result = result_of(out)
    best = result["rows"][0]
    assert best["value"] == pytest.approx(np.mean(best["values"])) and best["std"] == pytest.approx(
        np.std(best["values"], ddof=1)
    )
    near = [row for row in result["rows"] if row["value"] <= best["value"] + best["std"]]
    cheapest = min(near, key=lambda row: row["passes"])
    assert f"--steps {cheapest['steps']} " in result["cheapest"]
    assert result["seeds"] == [0, 1, 2]
    assert ("cheapest within" in shown) == (cheapest != best)


def test_a_mistake_is_one_sentence_and_leaves_no_table(tune, tmp_path, reference, smallest):
    for flags, message in (
        (("--sampler", "heun"), "--sampler heun does not fit this checkpoint's process"),
        (("--sigma", "0.1"), "keeps no power-function averages to make one of"),
        (("--num-samples", "1"), "--num-samples 1 are too few: FD-pixels needs 2 images at least"),
        (("--checkpoint", reference), f"--checkpoint {reference} is no run or checkpoint"),
        (("--checkpoint", "/nowhere"), "--checkpoint /nowhere does not exist"),
        (("--reference", smallest), f"--reference {smallest} is a checkpoint; give real images"),
    ):
        status, _, said = tune(tmp_path / "out", *flags)
        assert status == 2 and message in said, said
    assert not (tmp_path / "out" / "tune.json").exists()


def test_statistics_that_are_damaged_are_told_before_an_image_is_made(tune, tmp_path, monkeypatch):
    mean, covariance = np.zeros(2048), np.eye(2048)
    covariance[0, 0] = np.nan
    np.savez(tmp_path / "reference.npz", mu=mean, sigma=covariance)
    (tmp_path / "weights.safetensors").write_bytes(b"never read")
    monkeypatch.setattr("sample.tune.judge.network_of", lambda job: None)
    monkeypatch.setattr("sample.generate.Generator.latents", lambda *_: pytest.fail("an image is made"))
    flags = ("--features", "inception", "--inception", tmp_path / "weights.safetensors", "--steps", "2")
    flags += ("--num-samples", "2048")
    status, _, said = tune(tmp_path / "out", "--reference", tmp_path / "reference.npz", *flags)
    assert status == 2 and f"sigma of {tmp_path / 'reference.npz'}" in said, said


def test_a_damaged_point_is_named(tune, tmp_path):
    out = tmp_path / "out"
    assert tune(out, "--steps", "2")[0] == 0
    point = next((out / "points").iterdir())
    point.write_text(point.read_text().replace('"value": ', '"value": "x", "was": '))
    status, _, said = tune(out, "--steps", "2")
    assert status == 2 and f"{point} is damaged" in said and "remove it, and it is made again" in said


@pytest.mark.parametrize("kind", ["gaussian", "flow", "guided by another"])
@pytest.mark.parametrize(("guidance", "interval"), [(1.0, None), (2.0, None), (2.0, "0.3:0.8"), (2.0, "0:0.1")])
def test_passes_are_as_often_as_a_network_sees_each_image(smallest, make_checkpoint, kind, guidance, interval):
    checkpoint = smallest if kind != "flow" else make_checkpoint("tuned", process=RectifiedFlow(), learn_sigma=False)
    reverse = ReverseOptions(
        steps=9, guidance=guidance, guidance_interval=interval, guide=str(smallest) if "guided" in kind else None
    )
    asked = SampleOptions(checkpoint=str(checkpoint), out="a.safetensors", reverse=reverse)
    generator = resolve(asked).generator
    rows = []
    for network in filter(None, (generator.model, generator.guide)):
        network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    generator.latents(0, np.zeros(generator.plan.batch_size, dtype=np.int64))
    assert sum(rows) == passes_per_image(generator) * generator.plan.batch_size


# ---- real processes


def start(words, *, launcher=(sys.executable, "-m", "sample.tune")):
    return subprocess.Popen(
        [*launcher, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, smallest, vae_folder, reference):
    """What an uninterrupted process of this session leaves."""
    out = tmp_path_factory.mktemp("straight") / "out"
    given = ("--checkpoint", smallest, "--vae", vae_folder, "--reference", reference, "--features", "pixels")
    assert main([str(word) for word in (*given, "--out", out, *FEW, *SEARCH)]) == 0
    return contents(out)


def test_a_killed_search_goes_on_and_ends_with_the_same_bytes(words, tune, straight, tmp_path):
    out = tmp_path / "out"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with Forked("sample.tune", *words(out, *SEARCH), environment=environment, where=ROOT) as process:
        wait_for(process, lambda: len(list(out.glob("points/*.json"))) >= 2)
        kill_family(process)
    assert len(list(out.glob("points/*.json"))) >= 2 and not (out / "tune.json").exists()
    assert tune(out, *SEARCH)[0] == 0
    assert contents(out) == straight
    assert not (out / ".work").exists()


def test_work_that_the_main_process_leaves_to_others_goes_with_the_last_of_them(tune, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with Presence(out / ".work" / "features"):  # another process of this launch, which ends later
        assert tune(out, "--steps", "2")[0] == 0
        assert (out / ".work").exists()
    monkeypatch.setattr("sample.tune.run.launch", lambda: Launch(rank=1, world_size=2, local_rank=1))
    assert tune(out, "--steps", "2")[0] == 0
    assert not (out / ".work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True], ids=["apart", "torchrun"])
def test_two_processes_give_the_same_table(words, straight, tmp_path, launched):
    out = tmp_path / "out"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--module")
    if launched:
        processes = [start(words(out, *SEARCH), launcher=(*torchrun, "sample.tune"))]
    else:
        processes = [start(words(out, *SEARCH)) for _ in range(2)]
    for process in processes:
        shown, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert "best: dit-sample" in shown
    assert contents(out) == straight
