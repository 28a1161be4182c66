"""Real processes: any number of them, started any way, killed at any moment, give the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.runtime.publish import work_folder_of
from tests.families import kill_family

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
JOB = ("--num-samples", "22", "--steps", "30", "--batch-size", "4")
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--standalone",
    "--module",
    "sample",
)
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "sample")


@pytest.fixture
def start(tiny, vae_folder, tmp_path):
    """Starts dit-sample by a launcher; every process of it is killed at the end."""
    started = []

    def run(launcher, out, *more):
        process = subprocess.Popen(
            [*launcher, "--checkpoint", str(tiny), "--vae", str(vae_folder), "--out", str(out), *JOB, *more],
            env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        kill_family(process)


def finish(process):
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def wait_for_chunks(out, process, count=1):
    deadline = time.monotonic() + 120
    while len(list(work_folder_of(out).glob("chunk-*.safetensors"))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny, vae_folder):
    """The output of one uninterrupted process, run here with another number of threads."""
    import torch

    from sample.__main__ import main

    out = tmp_path_factory.mktemp("straight") / "a.npz"
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert main(["--checkpoint", str(tiny), "--vae", str(vae_folder), "--out", str(out), *JOB]) == 0
    finally:
        torch.set_num_threads(threads)
    return out.read_bytes()


@pytest.mark.slow
def test_a_killed_run_goes_on_under_two_processes_and_ends_with_the_same_bytes(start, straight, tmp_path):
    out = tmp_path / "a.npz"
    first = start((sys.executable, "-m", "sample"), out)
    wait_for_chunks(out, first)
    kill_family(first)
    assert not out.exists()
    said = finish(start(TORCHRUN, out))
    assert "of them there already" in said
    assert out.read_bytes() == straight
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.npz.json"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN, (str(BIN / "dit-sample"),)], ids=lambda words: words[-1])
def test_every_launcher_gives_the_same_bytes(start, straight, tmp_path, launcher):
    if not Path(launcher[0]).exists():
        pytest.skip("the command is not installed")
    finish(start(launcher, tmp_path / "a.npz"))
    assert (tmp_path / "a.npz").read_bytes() == straight


@pytest.mark.slow
def test_two_runs_started_apart_share_the_work(start, straight, tmp_path):
    out = tmp_path / "a.npz"
    both = [start((sys.executable, "-m", "sample"), out) for _ in range(2)]
    for process in both:
        finish(process)
    assert out.read_bytes() == straight


@pytest.mark.slow
def test_many_kills_change_nothing(start, straight, tmp_path):
    out = tmp_path / "a.npz"
    for count in range(1, 5):
        process = start(TORCHRUN if count % 2 else (sys.executable, "-m", "sample"), out)
        wait_for_chunks(out, process, count)
        kill_family(process)
    finish(start((sys.executable, "-m", "sample"), out))
    assert out.read_bytes() == straight


@pytest.mark.slow
def test_sigterm_keeps_what_is_finished_and_exits_with_128_plus_15(start, straight, tmp_path):
    out = tmp_path / "a.npz"
    process = start((sys.executable, "-m", "sample"), out)
    wait_for_chunks(out, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 143, said
    assert "samples are kept" in said
    finish(start((sys.executable, "-m", "sample"), out))
    assert out.read_bytes() == straight


def test_help_is_quick_because_it_loads_no_torch():
    code = "import sys; from sample.__main__ import main; main(['--help'])"
    watch = f"import sys\ntry:\n exec({code!r})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", watch], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--guidance-interval" in done.stdout


def test_a_mistake_exits_with_2_and_one_sentence(tmp_path):
    dit_sample = shutil.which("dit-sample", path=str(BIN)) or str(BIN / "dit-sample")
    command = [dit_sample] if Path(dit_sample).exists() else [sys.executable, "-m", "sample"]
    done = subprocess.run(
        [*command, "--checkpoint", str(tmp_path / "nothing"), "--out", "a.npz"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("dit-sample: error: there is no checkpoint at ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
