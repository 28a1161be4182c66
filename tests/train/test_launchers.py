"""What `accelerate launch` is asked for, through configuration files as `accelerate config` writes them."""

import logging
import os
import subprocess
import sys
from unittest import mock

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from pipeline.runtime.errors import UserError
from pipeline.runtime.launchers import say_unfollowed
from tests.train.runs import ROOT, command, make_store
from train.distributed import start
from train.options import DataOptions, HardwareOptions, RunOptions, TrainOptions
from train.run import follow_launcher


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """(settings of the file, further flags) → the environment in which accelerate starts the command."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name in {"RANK", "MASTER_ADDR"}]:
        monkeypatch.delenv(name)

    def environment(*flags, **settings):
        file = tmp_path / "accelerate.yaml"
        usual = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "mixed_precision": "no"}
        usual |= {"use_cpu": True, "debug": False, "num_processes": 1, "num_machines": 1}
        ClusterConfig(**{**usual, **settings}).to_yaml_file(str(file))
        assert yaml.safe_load(file.read_text())["num_machines"] == 1
        words = ["--config_file", str(file), *flags, "-m", "train"]
        given, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        return prepare_simple_launcher_cmd_env(given)[1]

    return environment


def options(**hardware):
    return TrainOptions(
        data=DataOptions(latents="s"), run=RunOptions(out="r"), hardware=HardwareOptions(device="cpu", **hardware)
    )


def test_nothing_asked_for_is_nothing_said(launched, caplog):
    environment = launched()
    assert follow_launcher(options(), environment) == options()
    assert start(HardwareOptions(device="cpu"), environment).reason == "CPU (--device cpu), precision no (default here)"
    assert caplog.messages == []


def test_a_wish_for_inductor_is_followed_block_by_block_and_said(launched, caplog):
    environment = launched(dynamo_config={"dynamo_backend": "INDUCTOR"})
    followed = follow_launcher(options(), environment)
    assert followed.model.compile
    assert "followed as --compile" in caplog.text


def test_what_else_is_asked_of_dynamo_is_said_to_be_left_out(launched, caplog):
    wish = {"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune", "dynamo_use_fullgraph": True}
    assert follow_launcher(options(), launched(dynamo_config=wish)).model.compile
    assert "its mode max-autotune and fullgraph is left out" in caplog.text
    caplog.clear()
    usual = {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default", "dynamo_use_dynamic": False}
    follow_launcher(options(), launched(dynamo_config=usual))
    assert "left out" not in caplog.text


@pytest.mark.parametrize("backend", ["EAGER", "AOT_EAGER"])
def test_a_wish_for_another_backend_is_left_out_and_said(backend, launched, caplog):
    followed = follow_launcher(options(), launched(dynamo_config={"dynamo_backend": backend}))
    assert not followed.model.compile
    assert f"dynamo backend {backend.lower()} is left out" in caplog.text


def test_accelerate_itself_compiles_nothing_whatever_was_asked_for(launched, monkeypatch):
    for name, value in launched(dynamo_config={"dynamo_backend": "EAGER"}).items():
        monkeypatch.setenv(name, value)
    machine = start(HardwareOptions(device="cpu"))
    assert machine.accelerator.state.dynamo_plugin.backend.value.lower() == "no"


def test_a_wish_for_accumulation_is_followed_unless_the_flag_says_another(launched, caplog):
    environment = launched() | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    assert follow_launcher(options(), environment).hardware.grad_accumulation == 4
    assert "followed as --grad-accumulation 4" in caplog.text
    assert follow_launcher(options(grad_accumulation=2), environment).hardware.grad_accumulation == 2
    assert "--grad-accumulation 2 goes before the launcher's 4" in caplog.text
    with pytest.raises(UserError, match="must be a whole number"):
        follow_launcher(options(), {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "many"})


@pytest.mark.parametrize(
    ("wish", "flag", "precision", "why"),
    [
        ("bf16", None, "bf16", "the launcher's configuration"),
        ("bf16", "no", "no", "--mixed-precision, over the launcher's bf16"),
        ("bf16", "bf16", "bf16", "--mixed-precision"),
        ("fp16", None, "no", "default here; the launcher's fp16 needs a GPU"),
    ],
)
def test_a_wish_for_a_precision_is_followed_or_said(wish, flag, precision, why, launched):
    machine = start(HardwareOptions(device="cpu", mixed_precision=flag), launched(mixed_precision=wish))
    assert machine.reason == f"CPU (--device cpu), precision {precision} ({why})"


def test_a_precision_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="asks for mixed precision fp8.*--mixed-precision no, bf16 or fp16"):
        start(HardwareOptions(device="cpu"), {"ACCELERATE_MIXED_PRECISION": "fp8"})


@pytest.mark.parametrize("how", ["flag", "file"])
def test_a_process_that_was_to_be_one_of_several_says_so(how, launched, caplog):
    several = launched("--num_processes", "2") if how == "flag" else launched(num_processes=2)
    start(HardwareOptions(device="cpu"), several)
    assert "asked for several processes and has started one" in caplog.text
    assert "--multi_gpu --num_processes N" in caplog.text
    caplog.clear()
    say_unfollowed({}, several)
    assert "has started one" in caplog.text


def test_parallelism_of_accelerates_own_is_refused():
    with pytest.raises(UserError, match="ACCELERATE_USE_PARALLELISM_CONFIG.*tensor or context parallelism"):
        start(HardwareOptions(device="cpu"), {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"})


def test_other_commands_say_which_of_their_flags_does_it(launched, caplog):
    caplog.set_level(logging.INFO, "dit")
    environment = launched(mixed_precision="bf16", dynamo_config={"dynamo_backend": "INDUCTOR"})
    say_unfollowed({"precision": "--mixed-precision", "dynamo": "--compile"}, environment)
    said = "the launcher's precision bf16 (--mixed-precision sets it) and dynamo inductor (--compile sets it)"
    assert said in caplog.text


@pytest.fixture(autouse=True)
def _heard(caplog):
    """The commands' own log, which otherwise passes nothing on."""
    log = logging.getLogger("dit")
    with mock.patch.object(log, "propagate", new=True):
        caplog.set_level(logging.INFO, "dit")
        yield


@pytest.mark.slow
def test_a_real_launch_with_wishes_trains_and_says_what_became_of_them(tmp_path):
    store = make_store(tmp_path / "store")
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: 'no'\nuse_cpu: true\n"
        "num_machines: 1\nnum_processes: 2\ndynamo_config:\n  dynamo_backend: EAGER\n"
    )
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    done = subprocess.run(
        [*words, *command(store, tmp_path / "run", steps=1)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dynamo backend eager is left out" in done.stderr
    assert "has started one" in done.stderr
    assert "compile: false" in (tmp_path / "run/config.yaml").read_text()
