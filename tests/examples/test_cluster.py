"""The recipes for schedulers: every file's commands run, with the variables set that the scheduler would set."""

import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from pipeline.latents import LatentStore
from tests.families import kill_family
from tests.train.runs import ROOT, environment, lines, make_store, wait_for

CLUSTER = ROOT / "examples" / "cluster"
COMMANDS = Path(sys.executable).parent
TINY = ["--model", "DiT-Ti/2", "--batch-size", "8", "--log-every", "1", "--sample-every", "0", "--no-tensorboard"]
SRUN = """#!/bin/bash
# Starts the tasks of a step, and ends with the largest of their statuses.
while [[ $1 == --* ]]; do shift; done
tasks=() worst=0
for ((k = 0; k < ${SLURM_NTASKS:-1}; k++)); do SLURM_PROCID=$k SLURM_LOCALID=$k "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task"; status=$?; ((status > worst)) && worst=$status; done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$2" >> "$REQUEUED"; fi
"""

pytestmark = pytest.mark.skipif(not (COMMANDS / "dit-train").exists(), reason="the commands are not installed")


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for Slurm's own commands; (file, arguments, variables) → the job's process."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    jobs = []

    def submit(file, *arguments, **variables):
        usual = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "1"}
        usual |= {"PATH": f"{stand_ins}:{COMMANDS}:/usr/bin:/bin", "REQUEUED": str(tmp_path / "requeued")}
        words = ["bash", str(CLUSTER / "slurm" / file), *map(str, arguments)]
        given = environment(**usual | {name: str(value) for name, value in variables.items()})
        jobs.append(subprocess.Popen(words, env=given, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
        return jobs[-1]

    yield submit
    for job in jobs:
        kill_family(job)


def requeued(tmp_path):
    file = tmp_path / "requeued"
    return file.read_text().split() if file.exists() else []


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    draws = np.random.default_rng(0)
    for number in range(12):
        place = folder / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return folder


@pytest.mark.parametrize("file", sorted((CLUSTER / "slurm").iterdir()), ids=lambda file: file.name)
def test_a_slurm_file_is_a_script_that_bash_can_read_and_asks_to_be_told_before_its_time_is_up(file):
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    asked = re.findall(r"^#SBATCH --(\S+?)(?:=(\S+))?$", file.read_text(), re.MULTILINE)
    assert len(asked) == file.read_text().count("#SBATCH") and ("requeue", "") in asked
    assert dict(asked)["signal"].startswith("USR1@") and dict(asked)["open-mode"] == "append"
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", file], check=False).returncode == 0


@pytest.mark.parametrize("file", sorted((CLUSTER / "kubernetes").iterdir()), ids=lambda file: file.name)
def test_a_kubernetes_file_fits_the_published_schema(file):
    documents = list(yaml.safe_load_all(file.read_text()))
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)
    documents[-1]["spec"]["completons"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="completons"):
        kubernetes_validate.validate(documents[-1], "1.31", strict=True)


@pytest.mark.slow
def test_an_array_of_slurm_tasks_fills_one_store_and_a_wrong_command_is_not_queued_again(slurm, images, tmp_path):
    flags = ["--vae", "demo", "--image-size", 32, "--samples-per-shard", 2]
    tasks = [
        slurm("extract.sbatch", *flags, DATA=images, STORE=tmp_path / "store", SLURM_ARRAY_TASK_ID=k) for k in range(2)
    ]
    for task in tasks:
        said = task.communicate(timeout=300)[1]
        assert task.returncode == 0, said
    assert len(LatentStore(tmp_path / "store")) == 12
    wrong = slurm("extract.sbatch", *flags, DATA=tmp_path / "no", STORE=tmp_path / "other")
    assert "error:" in wrong.communicate(timeout=300)[1] and wrong.returncode == 2
    missing = slurm("extract.sbatch", *flags, DATA=images)
    assert "STORE: the store to make" in missing.communicate(timeout=60)[1] and missing.returncode != 0
    assert requeued(tmp_path) == []


@pytest.mark.slow
def test_training_under_slurm_saves_at_its_signal_queues_again_and_goes_on_and_its_samples_are_shared_out(
    slurm, tmp_path
):
    places = {"STORE": make_store(tmp_path / "store"), "RUN": tmp_path / "run", "SLURM_NTASKS": 2}
    job = slurm("train.sbatch", *TINY, "--steps", 100_000, **places)
    wait_for(lambda: len(lines(tmp_path / "run")) > 2 or job.poll() is not None)
    assert job.poll() is None, job.communicate()[1]
    for task in psutil.Process(job.pid).children(recursive=True):
        if any("dit-train" in word for word in task.cmdline()) and task.name() != "bash":
            task.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=300)[1]
    assert job.returncode == 0 and requeued(tmp_path) == ["4711"], said
    step = int(re.search(r"stopped by SIGUSR1 after step (\d+)", said)[1])
    again = slurm("train.sbatch", *TINY, "--steps", step + 2, **places)
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0 and f"going on after step {step}" in said, said
    assert requeued(tmp_path) == ["4711"] and lines(tmp_path / "run")[-1]["step"] == step + 2

    # Two tasks of an array make its samples, and whoever is last puts them together
    flags = ["--num-samples", 12, "--batch-size", 2, "--steps", 2, "--guidance", 1]
    about = {"RUN": tmp_path / "run", "SAMPLES": tmp_path / "latents.safetensors"}
    tasks = [slurm("sample.sbatch", *flags, **about, SLURM_ARRAY_TASK_ID=k) for k in range(2)]
    for task in tasks:
        said = task.communicate(timeout=300)[1]
        assert task.returncode == 0, said
    assert (tmp_path / "latents.safetensors").exists()


def container(file):
    """(command, variables) of a Job's container."""
    job = list(yaml.safe_load_all((CLUSTER / "kubernetes" / file).read_text()))[-1]
    found = job["spec"]["template"]["spec"]["containers"][0]
    return found["command"], {entry["name"]: entry["value"] for entry in found["env"]}


def started(file, cwd, **variables):
    """A pod's command, with its variables put in as Kubernetes does."""
    command, known = container(file)
    values = known | {name: str(value) for name, value in variables.items()}
    words = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word) for word in command]
    cwd.mkdir()
    given = environment(**values, PATH=f"{COMMANDS}:/usr/bin:/bin")
    return subprocess.Popen(words, env=given, cwd=cwd, stderr=subprocess.PIPE, text=True)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def tiny(tmp_path):
    """A configuration file of a run of a few steps."""
    settings = {"model": "DiT-Ti/2", "batch-size": 8, "steps": 4, "log-every": 1, "sample-every": 0}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "tiny.yaml"


@pytest.mark.slow
def test_two_pods_of_the_kubernetes_job_find_each_other_and_train_one_run(tiny, tmp_path):
    about = {"STORE": make_store(tmp_path / "store"), "RUN": tmp_path / "run", "CONFIG": tiny, "PROCESSES": 1}
    about["MEETING_POINT"] = f"localhost:{free_port()}"
    pods = [started("train.yaml", tmp_path / f"pod-{k}", **about, JOB_COMPLETION_INDEX=k) for k in range(2)]
    try:
        for pod in pods:
            said = pod.communicate(timeout=300)[1]
            assert pod.returncode == 0, said
    finally:
        for pod in pods:
            kill_family(pod)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_pod_of_the_kubernetes_extraction_makes_the_store(images, tmp_path, monkeypatch):
    command, _ = container("extract.yaml")
    assert command[0] == "dit-extract" and "--vae" not in command
    monkeypatch.setitem(globals(), "container", lambda file: ([*command, "--vae", "demo"], {}))
    pod = started("extract.yaml", tmp_path / "pod", DATA=images, STORE=tmp_path / "store")
    said = pod.communicate(timeout=300)[1]
    assert pod.returncode == 0 and len(LatentStore(tmp_path / "store")) == 12, said


@pytest.mark.slow
def test_the_skypilot_recipe_trains_with_the_variables_of_its_nodes(tiny, tmp_path):
    recipe = yaml.safe_load((CLUSTER / "skypilot" / "train.yaml").read_text())
    assert set(recipe) <= {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert set(re.findall(r"\$\{?([A-Z_]+)", recipe["run"])) <= set(recipe["envs"]) | {
        "SKYPILOT_NODE_IPS",
        "SKYPILOT_NUM_NODES",
        "SKYPILOT_NODE_RANK",
        "SKYPILOT_NUM_GPUS_PER_NODE",
    }
    nodes = {"SKYPILOT_NODE_IPS": "127.0.0.1", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}
    nodes |= {"SKYPILOT_NUM_GPUS_PER_NODE": "2", "STORE": str(make_store(tmp_path / "store")), "CONFIG": str(tiny)}
    given = environment(**nodes, RUN=str(tmp_path / "run"), PATH=f"{COMMANDS}:/usr/bin:/bin")
    script = recipe["run"].replace("29500", str(free_port()))
    ended = subprocess.run(
        ["bash", "-euc", script], env=given, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert lines(tmp_path / "run")[-1]["step"] == 4
