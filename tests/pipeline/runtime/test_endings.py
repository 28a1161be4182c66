"""How a command ends, with real processes, signals, closed pipes and terminals."""

import errno
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.runtime.errors import WRITE_REASONS, UserError
from pipeline.runtime.files import explained_writes
from pipeline.runtime.processes import bound_spinning

ROOT = Path(__file__).parents[3]
COMMAND = """
import os, signal, socket, sys, threading, time
from dataclasses import dataclass
from pathlib import Path
from pipeline.runtime.console import progress, run_command, say, warn
from pipeline.runtime.processes import StopRequest

@dataclass(frozen=True, kw_only=True)
class Options:
    "None."

def run(_):
{body}

sys.exit(run_command(Options, run, prog="dit-x", description="", argv=[]))
"""
NOTED = """
with StopRequest() as stop:
    say("ready")
    while not stop.signal:
        time.sleep(0.01)
    say("saved")
return stop.exit_status
"""
# A wait that no Python code can leave: a lock taken in C, as an exchange with a process that is gone.
STUCK = """
import ctypes
library = ctypes.CDLL(None)
with StopRequest():
    say("ready")
    while True:
        mutex = ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
"""


STARTED = []


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


def start(body, *, preexec=None, **streams):
    code = COMMAND.format(body=textwrap.indent(body, "    "))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, preexec_fn=preexec, text=True, **streams)  # noqa: PLW1509 - no thread runs here
    STARTED.append(process)
    return process


def read_until(process, word):
    while word not in (line := process.stderr.readline()):
        assert line, "the command has ended"


def hang_up_by(handling):
    return lambda: signal.signal(signal.SIGHUP, handling)


def test_a_hang_up_saves_and_ends_as_a_termination_does():
    process = start(NOTED, preexec=hang_up_by(signal.SIG_DFL))
    read_until(process, "ready")
    process.send_signal(signal.SIGHUP)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGHUP and "saved" in said


def test_a_hang_up_interrupts_what_watches_for_nothing():
    process = start('say("ready")\ntime.sleep(60)', preexec=hang_up_by(signal.SIG_DFL))
    read_until(process, "ready")
    process.send_signal(signal.SIGHUP)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGHUP and "stopped by SIGHUP; run the same command again" in said


def test_under_nohup_a_hang_up_means_nothing():
    process = start(NOTED, preexec=hang_up_by(signal.SIG_IGN))
    read_until(process, "ready")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_second_signal_ends_a_wait_in_a_library_within_5_seconds(number):
    process = start(STUCK)
    read_until(process, "ready")
    process.send_signal(number)
    time.sleep(2.2)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and time.monotonic() - began < 5
    assert f"ended by a second {signal.Signals(number).name} while it waited" in said


def test_a_second_termination_ends_what_saves_for_long():
    process = start('with StopRequest() as stop:\n    say("ready")\n    time.sleep(60)')
    read_until(process, "ready")
    process.send_signal(signal.SIGTERM)
    time.sleep(2.2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=10)[1]
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in said


def test_a_second_signal_ends_a_process_whose_threads_wait_for_a_server_after_the_command_has_ended():
    waiting = "from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor(1).submit(time.sleep, 60)\n"
    process = start(f'{waiting}with StopRequest() as stop:\n    say("ready")\n    time.sleep(60)')
    read_until(process, "ready")
    process.send_signal(signal.SIGTERM)
    time.sleep(2.2)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=40)
    assert process.returncode == 128 + signal.SIGTERM and time.monotonic() - began < 8


def test_a_signal_that_a_launcher_passes_on_at_once_is_the_same_one():
    process = start(NOTED.replace('say("saved")', 'time.sleep(0.5); say("saved")'))
    read_until(process, "ready")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM and "saved" in said


TALKATIVE = """
bar = progress(20000, unit="things", description="doing")
Path(sys.stdin.readline().strip()).touch()
sys.stdin.readline()
for _ in range(20000):
    bar.update()
say("said"), warn("warned"), bar.write("written"), bar.close()
print("printed")
Path(sys.stdin.readline().strip()).touch()
"""


def goes_on_without(body, tmp_path, gone, **streams):
    process = start(body, stdin=subprocess.PIPE, **streams)
    process.stdin.write(f"{tmp_path / 'began'}\n")
    process.stdin.flush()
    while not (tmp_path / "began").exists():
        time.sleep(0.01)
    gone(process)
    process.stdin.write(f"\n{tmp_path / 'done'}\n")
    process.stdin.close()
    process.wait(timeout=60)
    assert (tmp_path / "done").exists()
    return process.returncode


def test_an_error_stream_that_nobody_reads_stops_nothing(tmp_path):
    assert goes_on_without(TALKATIVE, tmp_path, lambda p: p.stderr.close(), stdout=subprocess.DEVNULL) == 0


def test_a_lost_output_stops_nothing_and_is_status_1(tmp_path):
    assert goes_on_without(TALKATIVE, tmp_path, lambda p: p.stdout.close(), stderr=subprocess.DEVNULL) == 1


def test_a_terminal_that_is_closed_stops_nothing(tmp_path):
    ours, theirs = pty.openpty()

    def close(_):
        os.close(ours)
        os.close(theirs)

    assert goes_on_without(TALKATIVE, tmp_path, close, stdout=subprocess.DEVNULL, stderr=theirs) == 0


def test_streams_closed_from_the_start_stop_nothing_and_no_file_takes_their_place(tmp_path):
    target = tmp_path / "target"
    body = TALKATIVE + f"\nwith open({str(target)!r}, 'w') as file:\n    os.write(2, b'a warning'); os.write(1, b'x')\n"

    def close_both():
        os.close(1)
        os.close(2)

    begins = {"stdin": subprocess.PIPE, "stdout": None, "stderr": None}
    process = start(body, preexec=close_both, **begins)
    process.stdin.write(f"{tmp_path / 'began'}\n\n{tmp_path / 'done'}\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "done").exists() and target.read_bytes() == b""


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_result_on_a_full_disk_is_one_sentence(monkeypatch, unbuffered):
    """What lies in a buffer still must not fail once more when Python ends, which would give another status."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with Path("/dev/full").open("w") as full:
        process = start('print("result")', stdout=full)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "Traceback" not in said
    assert "dit-x: error: cannot write standard output: the disk is full; free some space" in said


TOGETHER = """
import datetime
import torch
import torch.distributed as dist
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=os.environ["MEET"], rank=rank, world_size=2)
pending = dist.all_reduce(torch.zeros(1), async_op=True) if rank else None
if rank:
    raise RuntimeError("a fault of the program's")
sys.stdin.read()
"""


def test_an_error_in_a_group_is_said_and_ends_the_process_while_the_others_do_not_come(tmp_path):
    """A process that leaves the group in order would wait for the exchange that it has begun."""
    both = []
    for rank in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MEET": f"file://{tmp_path / 'meet'}"}.items():
                patch.setenv(name, str(value))
            both.append(start(TOGETHER, stdin=subprocess.PIPE))
    other, failing = both
    said = failing.communicate(timeout=120)[1]
    assert failing.returncode == 1 and "RuntimeError: a fault of the program's" in said
    assert other.poll() is None
    other.communicate(timeout=60)


def said_of(number, capsys):
    from dataclasses import dataclass

    from pipeline.runtime.console import run_command

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """None."""

    def fail(_):
        raise OSError(number, os.strerror(number), "/disk/file")

    status = run_command(Options, fail, prog="dit-x", description="", argv=[])
    return status, capsys.readouterr().err


MISTAKES = [
    *(errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ELOOP, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EFBIG),
]
FAULTS = [
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ETIMEDOUT,
    errno.ENODEV,
    errno.EPROTO,
]


@pytest.mark.parametrize(
    ("number", "status"), [*((number, 2) for number in MISTAKES), *((number, 1) for number in FAULTS)]
)
def test_every_error_of_a_path_is_one_sentence_that_names_it_and_what_to_do(number, status, capsys):
    found, said = said_of(number, capsys)
    assert found == status
    assert said.startswith("dit-x: error: ") and said.count("\n") == 1 and "/disk/file" in said and "; " in said


@pytest.mark.parametrize("number", [*WRITE_REASONS, errno.EIO, errno.ESTALE])
def test_a_write_that_fails_without_naming_its_file_gets_the_name(number, tmp_path):
    with pytest.raises((UserError, OSError)) as found, explained_writes(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    if isinstance(found.value, OSError):
        assert found.value.filename == str(tmp_path / "file")
    else:
        assert str(tmp_path / "file") in str(found.value)


def test_how_threads_wait_is_set_unless_the_user_has():
    environment = {}
    bound_spinning(environment)
    assert environment == {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        environment = {name: "as I say"}
        bound_spinning(environment)
        assert environment == {name: "as I say"}


def test_how_threads_wait_is_set_before_torch_is_loaded():
    process = start('assert "torch" not in sys.modules\nprint(os.environ["GOMP_SPINCOUNT"])')
    assert process.communicate(timeout=60)[0].strip() in {"10000", os.environ.get("GOMP_SPINCOUNT")}
