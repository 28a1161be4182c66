"""Two machines, as far as one can be two: folders, homes and caches apart, a shared disk, and a network on loopback."""

import re
import socket
import subprocess
import sys
import time

import pytest

from tests.families import kill_family
from tests.train.runs import assert_close_histories, command, environment, history, lines, train, wait_for

SAVING = ["--save-every", "3", "--keep-last", "2"]


@pytest.fixture
def machine(tmp_path):
    """(name, words) → a launcher's process on the machine of that name; all it starts is killed at the end."""
    started = []

    def run(name, words, log="said"):
        home = tmp_path / name
        places = {"HOME": "home", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp", "HF_HOME": "hub"}
        for folder in places.values():
            (home / folder).mkdir(parents=True, exist_ok=True)
        given = environment(**{key: str(home / folder) for key, folder in places.items()})
        given |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see examples/cluster/README.md
        with (home / log).open("a") as said:
            started.append(subprocess.Popen([sys.executable, "-m", *words], env=given, cwd=home, stderr=said))
        return started[-1]

    yield run
    for process in started:
        kill_family(process)


def said(tmp_path, name):
    return (tmp_path / name / "said").read_text()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_listened_to(port):
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_when_one_of_two_machines_dies_the_other_ends_at_once_with_one_line_and_the_run_goes_on(
    machine, store, tmp_path
):
    def launched(name, rank, port, steps):
        words = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 2]
        words += ["--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        words += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        return machine(name, [*map(str, words), *command(store, tmp_path / "run", *SAVING, steps=steps)])

    port = free_port()
    first, second = (launched(name, rank, port, 100_000) for rank, name in enumerate(("first", "second")))
    wait_for(lambda: len(lines(tmp_path / "run")) > 4 or first.poll() is not None)
    assert first.poll() is None, said(tmp_path, "first")
    kill_family(second)
    died = time.monotonic()
    first.wait(120)
    assert time.monotonic() - died < 20
    told = [line for line in said(tmp_path, "first").splitlines() if "dit-train" in line and "error:" in line]
    assert len(told) == 1 and "another process of this run has ended" in told[0]

    # The same command on both goes on, with the batches of a run that was never disturbed
    steps, port = lines(tmp_path / "run")[-1]["step"] + 3, free_port()
    both = [launched(name, rank, port, steps) for rank, name in enumerate(("first", "second"))]
    for process in both:
        assert process.wait(300) == 0, said(tmp_path, "first")
    assert train(store, tmp_path / "alone", steps=steps) == 0
    assert_close_histories(history(tmp_path / "alone"), history(tmp_path / "run"))


@pytest.mark.slow
def test_machines_come_and_go_under_an_elastic_launcher_and_the_batches_stay_those_of_one(machine, store, tmp_path):
    port = free_port()

    def launched(name):
        words = ["torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 5]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run"]
        words += ["--rdzv-conf", "last_call_timeout=3,join_timeout=120", "--monitor-interval", 0.2, "--module"]
        flags = command(store, tmp_path / "run", *SAVING, steps=100_000)[1:]
        return machine(name, [*map(str, words), *flags], log="../said")

    def processes():
        """Of how many the newest start says to be, on whichever machine its main process was."""
        told = re.findall(r"accumulation × (\d+) processes", said(tmp_path, "."))
        return int(told[-1]) if told else 0

    def goes_on(after, count):
        wait_for(lambda: first.poll() is not None or (processes() == count and newest() > after))
        assert first.poll() is None, said(tmp_path, ".")

    def newest():
        return max([line["step"] for line in lines(tmp_path / "run")], default=0)

    first = launched("first")
    wait_for(lambda: is_listened_to(port))  # else the second one may be the host of the meeting
    second = launched("second")
    goes_on(4, 2)
    kill_family(second)
    goes_on(newest() + 4, 1)
    launched("second")
    goes_on(newest() + 4, 2)
    kill_family(first)
    logged = history(tmp_path / "run")
    assert [line["step"] for line in logged] == list(range(1, len(logged) + 1))
    assert train(store, tmp_path / "alone", steps=len(logged)) == 0
    assert_close_histories(history(tmp_path / "alone"), logged)
