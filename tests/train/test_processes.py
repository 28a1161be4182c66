"""Two real processes on one machine (gloo), under the launchers that users have."""

import errno
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.train.runs import (
    ROOT,
    assert_close_histories,
    assert_same_run,
    checkpoints,
    command,
    environment,
    history,
    launch,
    launch_forked,
    lines,
    running,
    start,
    torchrun,
    train,
    wait_for,
)

STEPS = 8
SETTINGS = [
    "--save-every",
    "4",
    "--keep-last",
    "0",
    "--validation-share",
    "0.1",
    "--validate-every",
    "4",
    "--clip-norm",
    "1",
]


@pytest.fixture(scope="module")
def alone(poisoned, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(poisoned, run, *SETTINGS, steps=STEPS) == 0
    assert lines(run)[-1]["skipped_steps"] == 1
    return run


@pytest.fixture(scope="module")
def together(poisoned, tmp_path_factory):
    """The same run in two processes, each with half a batch in two parts."""
    run = tmp_path_factory.mktemp("together") / "run"
    statuses, said = launch_forked(poisoned, run, *SETTINGS, "--grad-accumulation", "2", steps=STEPS)
    assert statuses == [0, 0], said
    assert "2 per process × 2 accumulation × 2 processes = 8" in said[0] and not said[1]
    return run


def validation(run):
    return [line["validation_loss_ema"] for line in lines(run) if "validation_loss_ema" in line]


def test_two_processes_train_as_one_does_and_agree_on_skipping(alone, together):
    assert_close_histories(history(alone), history(together))
    assert validation(together) == pytest.approx(validation(alone), rel=1e-5)
    assert len(validation(together)) == 2


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(poisoned, together, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(together, run)
    shutil.rmtree(run / "checkpoints" / "step-0000008")
    assert launch(poisoned, run, *SETTINGS, "--grad-accumulation", "2", steps=STEPS).returncode == 0
    assert_same_run(together, run, STEPS)


def test_another_number_of_processes_goes_on_with_the_run(poisoned, alone, together, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(together, run)
    shutil.rmtree(run / "checkpoints" / "step-0000008")
    assert train(poisoned, run, *SETTINGS, steps=STEPS) == 0
    assert_close_histories(history(alone), history(run))


@pytest.mark.slow
def test_a_sharded_network_trains_as_one_does_and_its_checkpoint_loads_on_another_count(poisoned, alone, tmp_path):
    run = tmp_path / "run"
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words += [
        str(ROOT / "dit-train"),
        *command(poisoned, run, *SETTINGS, "--sharding", "fsdp", "--grad-accumulation", "2", steps=5)[2:],
    ]
    result = subprocess.run(
        words, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "2 processes, sharded (FSDP2)" in result.stderr
    assert train(poisoned, run, *SETTINGS, steps=STEPS) == 0
    assert_close_histories(history(alone), history(run))
    assert validation(run) == pytest.approx(validation(alone), rel=1e-5)


@pytest.mark.slow
def test_a_stop_of_two_processes_is_agreed_and_saved(store, tmp_path):
    with running(torchrun(store, tmp_path / "run", steps=100_000)) as process:
        wait_for(lambda: len(lines(tmp_path / "run")) > 1)
        process.send_signal(signal.SIGTERM)
        spoken = process.communicate(timeout=300)[1]
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", spoken)[1])
    assert checkpoints(tmp_path / "run") == [f"step-{step:07d}"] and lines(tmp_path / "run")[-1]["step"] == step


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stands_still_ends_the_run_within_the_stated_time_with_one_line(store, tmp_path, rank):
    minutes = 0.1
    words = torchrun(store, tmp_path / "run", "--save-every", "2", "--process-timeout", str(minutes), steps=100_000)
    with running(words) as process:
        wait_for(lambda: len(lines(tmp_path / "run")) > 3)
        ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}
        ranks[rank].suspend()
        stood_still = time.monotonic()
        psutil.wait_procs([ranks[1 - rank]], timeout=120)
        waited = time.monotonic() - stood_still
        assert not ranks[1 - rank].is_running() and 60 * minutes - 1 <= waited <= 60 * minutes + 10
        ranks[rank].kill()  # torchrun would wait for it 30 s
        spoken = process.communicate(timeout=120)[1]
    said = [line for line in spoken.splitlines() if "error:" in line and "dit-train" in line]
    assert len(said) == 1, spoken
    assert "waited 0.1 minutes in vain for one of them (--process-timeout)" in said[0]
    assert (
        launch(store, tmp_path / "run", "--save-every", "2", steps=lines(tmp_path / "run")[-1]["step"]).returncode == 0
    )


DISK_LOST = """
import os, sys

rank, call, number = int(sys.argv.pop(1)), sys.argv.pop(1), int(sys.argv.pop(1))
steady = getattr(os, call)

def lost(*given):
    if os.path.exists(os.environ["DISK_IS_LOST"]):
        raise OSError(number, os.strerror(number))
    return steady(*given)

if rank == int(os.environ["RANK"]):
    setattr(os, call, lost)
from train.__main__ import main
sys.exit(main())
"""
DISK_LOST_WITHIN_S = 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "call", "number", "reason"),
    [
        (0, "fsync", errno.ENOSPC, "the disk is full"),
        (0, "fsync", errno.EIO, "Input/output error"),
        (0, "preadv", errno.EIO, "Input/output error"),
        (1, "preadv", errno.EIO, "Input/output error"),
    ],
)
def test_a_process_that_loses_its_disk_ends_all_within_seconds_with_one_line_and_the_run_goes_on(
    store, tmp_path, monkeypatch, rank, call, number, reason
):
    (tmp_path / "lost.py").write_text(DISK_LOST)
    monkeypatch.setenv("DISK_IS_LOST", str(tmp_path / "now"))
    run = tmp_path / "run"
    words = torchrun(store, run, "--save-every", "2", "--keep-last", "2", steps=100_000)
    at = words.index("--module")
    words[at : at + 2] = [str(tmp_path / "lost.py"), str(rank), call, str(number)]
    with running(words) as process:
        wait_for(lambda: len(lines(run)) > 3)
        ranks = psutil.Process(process.pid).children()
        (tmp_path / "now").touch()
        _, alive = psutil.wait_procs(ranks, timeout=DISK_LOST_WITHIN_S)
        assert not alive
        spoken = process.communicate(timeout=120)[1]
    said = [line for line in spoken.splitlines() if line.startswith(f"dit-train (process {rank} of 2): error:")]
    assert len(said) == 1 and reason in said[0], spoken
    ends = ("another process of this run has ended", "stopped by SIGTERM")  # whichever it learns first
    others = [line for line in spoken.splitlines() if line.startswith("dit-train") and any(end in line for end in ends)]
    assert len(others) == 1, spoken
    assert launch(store, run, "--save-every", "2", steps=lines(run)[-1]["step"] + 2).returncode == 0


def test_a_run_is_one_commands_at_a_time_and_ends_on_sigusr1_with_its_status(store, tmp_path):
    with start(store, tmp_path / "run", steps=100_000) as process:
        wait_for(lambda: len(lines(tmp_path / "run")) > 1)
        assert train(store, tmp_path / "run", steps=4) == 2  # it is being trained in
        process.send_signal(signal.SIGUSR1)
        spoken = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1" in spoken and "run the same command again to go on" in spoken


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["accelerate launch -m train", "accelerate launch dit-train", "dit-train", "python dit-train"]
)
def test_every_way_to_launch_trains(store, tmp_path, launcher):
    alone = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    flags = command(store, tmp_path / "run", steps=2)[2:]
    words = {
        "accelerate launch -m train": ["-m", "accelerate.commands.launch", *alone, "-m", "train", *flags],
        "accelerate launch dit-train": ["-m", "accelerate.commands.launch", *alone, "dit-train", *flags],
        "dit-train": ["-c", "import sys; from train.__main__ import main; sys.exit(main())", *flags],
        "python dit-train": ["dit-train", *flags],
    }[launcher]
    installed = Path(sys.executable).with_name("dit-train")
    whole = [installed, *flags] if launcher == "dit-train" and installed.exists() else [sys.executable, *words]
    result = subprocess.run(whole, env=environment(), cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert checkpoints(tmp_path / "run") == ["step-0000002"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "network"),
    [("no", []), ("bf16", []), ("no", ["--blocks", "modern", "--middle-head", "--align-latent"])],
)
def test_four_processes_sharded_and_copied_train_as_one_does(store, tmp_path, precision, network):
    flags = ["--mixed-precision", precision, *network]
    assert train(store, tmp_path / "alone", *flags, steps=4) == 0
    tolerance = 1e-5 if precision == "no" else 2e-2
    for sharding in ("none", "fsdp", "hsdp --shard-processes 2"):
        run = tmp_path / sharding.replace(" ", "-")
        result = launch(store, run, *flags, "--sharding", *sharding.split(), processes=4, steps=4)
        assert result.returncode == 0, result.stderr
        assert_close_histories(history(tmp_path / "alone"), history(run), relative=tolerance)


COMPILED = """
import sys
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from pipeline.dit import compile_blocks
from train import run
from train.__main__ import main

begin = DistributedDataParallel.__init__  # buckets smaller than a block, as those of a large network are
DistributedDataParallel.__init__ = lambda *given, **named: begin(*given, **{**named, "bucket_cap_mb": 1})
counter = CompileCounterWithBackend("aot_eager")
run.compile_blocks = lambda network: compile_blocks(network, backend=counter)
status = main()
print("graphs:", counter.frame_count, file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.slow
def test_compiled_blocks_train_in_two_processes_as_plain_ones_do_and_none_is_cut_into_pieces(store, tmp_path):
    """DDP's optimizer would cut each block where a bucket ends; as it is, all blocks share one graph."""
    network = ["--hidden-size", "256", "--depth", "2", "--num-heads", "4"]
    (tmp_path / "compiled.py").write_text(COMPILED)
    assert train(store, tmp_path / "alone", *network, steps=3) == 0
    for sharding in ("none", "fsdp"):
        run = tmp_path / sharding
        words = torchrun(store, run, *network, "--compile", "--sharding", sharding, steps=3)
        at = words.index("--module")
        words[at : at + 2] = [str(tmp_path / "compiled.py")]
        result = subprocess.run(
            words, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("graphs: 1\n") == 2, (sharding, result.stderr)
        assert_close_histories(history(tmp_path / "alone"), history(run))


ACCUMULATED = """
import torch
from pipeline.dit import DiT, DiTConfig
from torch.distributed.tensor import DTensor
from train import distributed
from train.options import HardwareOptions
from train.parallel import parallelize

machine = distributed.start(HardwareOptions(device="cpu", mixed_precision="no"))
placement = parallelize(DiT(DiTConfig.from_preset("DiT-Ti/2", input_size=8, num_classes=4), seed=0), machine, machine.processes)
inputs = (torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
for part in range(2):
    with placement.accumulating(last=part == 1):
        placement.model(*inputs).square().mean().backward()
    for parameter, own in zip(placement.network.parameters(), placement.weights):
        assert isinstance(parameter.grad, DTensor) and parameter.grad.to_local().shape == own.shape, part
"""


@pytest.mark.slow
def test_a_sharded_networks_gradients_are_divided_after_every_part(tmp_path):
    """Kept whole until the last part, they would take four bytes per weight on every process."""
    (tmp_path / "accumulate.py").write_text(ACCUMULATED)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", "localhost:0", str(tmp_path / "accumulate.py")]
    result = subprocess.run(
        words, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
