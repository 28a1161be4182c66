"""Two real processes on one machine (gloo), under the launchers that users have."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

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
    lines,
    make_store,
    poison,
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
def poisoned(tmp_path_factory):
    """A store with one sample that makes its batch's loss NaN, and a single shard for all processes."""
    folder = make_store(tmp_path_factory.mktemp("poisoned") / "latents", shards=1)
    poison(folder, [3])
    return folder


@pytest.fixture(scope="module")
def alone(poisoned, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(poisoned, run, *SETTINGS, steps=STEPS) == 0
    assert lines(run)[-1]["skipped_steps"] == 1
    return run


@pytest.fixture(scope="module")
def together(poisoned, tmp_path_factory):
    """The same run in two processes under torchrun, each with half a batch in two parts."""
    run = tmp_path_factory.mktemp("together") / "run"
    result = launch(poisoned, run, *SETTINGS, "--grad-accumulation", "2", steps=STEPS)
    assert result.returncode == 0, result.stderr
    assert "2 per process × 2 accumulation × 2 processes = 8" in result.stderr
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
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_four_processes_sharded_and_copied_train_as_one_does(store, tmp_path, precision):
    flags = ["--mixed-precision", precision]
    assert train(store, tmp_path / "alone", *flags, steps=4) == 0
    tolerance = 1e-5 if precision == "no" else 2e-2
    for sharding in ("none", "fsdp"):
        run = tmp_path / sharding
        result = launch(store, run, *flags, "--sharding", sharding, processes=4, steps=4)
        assert result.returncode == 0, result.stderr
        assert_close_histories(history(tmp_path / "alone"), history(run), relative=tolerance)


ACCUMULATED = """
import torch
from pipeline.dit import DiT, DiTConfig
from torch.distributed.tensor import DTensor
from train import distributed
from train.options import HardwareOptions
from train.parallel import parallelize

machine = distributed.start(HardwareOptions(device="cpu", mixed_precision="no"))
placement = parallelize(DiT(DiTConfig.from_preset("DiT-Ti/2", input_size=8, num_classes=4), seed=0), machine, "fsdp")
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
