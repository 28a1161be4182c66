"""What would happen on a GPU, seen without one: nothing waits, nothing is uploaded in a step, memory stays in bounds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch registers hooks of its own"),
    pytest.mark.skipif(
        COMPILER is None and os.environ.get("FAKE_CUDA") != "required",
        reason="needs g++ to build the guard of the fake card",
    ),
    pytest.mark.xdist_group("fake cuda"),
]
GIB = 2**30


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """The library that gives a CPU build of torch a card."""
    assert COMPILER is not None, (
        "FAKE_CUDA=required, but there is no g++: the traces of the CUDA path are not to be skipped here"
    )
    library = tmp_path_factory.mktemp("guard") / "libguard.so"
    place = Path(torch.__file__).parent
    words = [COMPILER, "-O1", "-std=c++20", "-shared", "-fPIC", "-w", str(HERE / "guard.cpp"), "-o", str(library)]
    words += [f"-I{place}/include", f"-I{place}/include/torch/csrc/api/include", f"-L{place}/lib"]
    words += ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{place}/lib"]
    subprocess.run(words, check=True)
    return library


def trace(guard, *spoiled):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HERE / "traces.py"), str(guard), *spoiled]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def traced(guard):
    done = trace(guard)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_training_step_reads_nothing_and_uploads_nothing_that_waits(traced):
    assert len(traced["steps"]) == 11
    for name, step in traced["steps"].items():
        assert (step["reads"], step["uploads"]) == ({}, {}), name
        assert step["kernels"] > 500, name


def test_a_logged_step_reads_and_uploads_nothing_either_before_its_numbers_are_asked_for(traced):
    assert (traced["logged"]["reads"], traced["logged"]["uploads"]) == ({}, {})
    assert traced["logged"]["kernels"] - traced["steps"]["as it is"]["kernels"] < 30


def test_a_training_step_launches_a_stated_number_of_kernels(traced):
    """S/2 with 12 blocks, bf16, clipped; a step more or less is a change to look at."""
    assert traced["steps"]["as it is"]["kernels"] <= 1600
    assert traced["steps"]["not clipped"]["kernels"] < traced["steps"]["as it is"]["kernels"]
    assert traced["steps"]["float32"]["kernels"] < traced["steps"]["as it is"]["kernels"]


def test_what_a_step_holds_is_weights_averages_moments_and_activations(traced):
    """16 bytes a weight stand there; checkpointing keeps a fraction of the activations of a batch of eight."""
    whole, kept = traced["steps"]["as it is"], traced["steps"]["checkpointing"]
    assert whole["fixed"] == pytest.approx(16 * 33e6, rel=0.02)
    assert whole["peak"] - whole["fixed"] < 0.9 * GIB
    assert kept["peak"] - kept["fixed"] < 0.6 * (whole["peak"] - whole["fixed"])


def test_the_formula_of_a_steps_memory_is_what_is_traced_to_5_percent(traced):
    compared = traced["steps"] | traced["fits"]
    assert len(compared) == 20
    off = {name: step["formula"] / step["peak"] for name, step in compared.items()}
    assert {name: ratio for name, ratio in off.items() if not 0.95 < ratio < 1.05} == {}


def test_no_sampler_waits_in_a_step(traced):
    assert {"ddpm", "ddim", "dpm++", "unipc", "euler", "heun"} <= traced["samplers"].keys()
    for name, (four, five) in traced["samplers"].items():
        assert five["kernels"] > four["kernels"], name
        assert sum(five["reads"].values()) == sum(four["reads"].values()), name
        assert sum(five["uploads"].values()) == sum(four["uploads"].values()), name


@pytest.mark.parametrize(("spoiled", "sign"), [("item", "DataDependent"), ("cpu", "device")])
def test_a_value_read_and_a_tensor_left_on_the_cpu_are_found(guard, spoiled, sign):
    done = trace(guard, spoiled)
    assert done.returncode != 0
    assert sign in done.stderr


def test_storage_kept_from_step_to_step_is_found(guard, traced):
    done = trace(guard, "double")
    assert done.returncode == 0, done.stderr
    step, whole = json.loads(done.stdout.splitlines()[-1]), traced["steps"]["as it is"]
    assert step["peak"] - step["fixed"] > 0.9 * GIB > whole["peak"] - whole["fixed"]
