"""Building the guard of the fake card, and running what is traced on it in a process of its own."""

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
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch registers hooks of its own"),
    pytest.mark.skipif(
        COMPILER is None and os.environ.get("FAKE_CUDA") != "required",
        reason="needs g++ to build the guard of the fake card",
    ),
    pytest.mark.xdist_group("fake cuda"),
    pytest.mark.timeout(1800),  # all traces of a file are made for its first test
]
GIB = 2**30


def build_guard(library):
    """The library that gives a CPU build of torch a card."""
    assert COMPILER is not None, (
        "FAKE_CUDA=required, but there is no g++: the traces of the CUDA path are not to be skipped here"
    )
    place = Path(torch.__file__).parent
    words = [COMPILER, "-O1", "-std=c++20", "-shared", "-fPIC", "-w", str(HERE / "guard.cpp"), "-o", str(library)]
    words += [f"-I{place}/include", f"-I{place}/include/torch/csrc/api/include", f"-L{place}/lib"]
    words += ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{place}/lib"]
    subprocess.run(words, check=True)
    return library


def trace(script, guard, *spoiled):
    """The finished process of traces.py or inference.py."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HERE / script), str(guard), *spoiled]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def findings(script, guard, *spoiled):
    """What it found."""
    done = trace(script, guard, *spoiled)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
