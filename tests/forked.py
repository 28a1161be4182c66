"""Commands as real processes, forked from one that has loaded what they import: seconds of a core are spent once.

What a launcher adds, and that a command starts in a fresh interpreter, stays with the tests that start one.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.families import kill_family

LOADED = ("extract.run", "train.run", "train.loop", "sample.run", "sample.evaluate.evaluation", "sample.tune.run")
LOADED += ("pipeline.vae", "diffusers.models.autoencoders.autoencoder_kl", "scipy.linalg", "matplotlib.figure")


def server():
    """Processes of this context are forks of a process that does nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    return context


def _become(folder, environment, where, before, words):
    """What `python -m MODULE WORDS` is, in this process, after some code."""
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        with Path(folder, name).open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(where)
    sys.argv = list(words)
    exec(before, {})
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


class Forked:
    """A command that runs; of `subprocess.Popen` it has what tests use."""

    def __init__(self, module, *words, environment, where, before=""):
        self._said = tempfile.TemporaryDirectory(prefix="forked-")
        for name in ("out", "err"):
            Path(self._said.name, name).touch()  # it may be killed before it writes
        given = (self._said.name, dict(environment), str(where), before, [module, *map(str, words)])
        self._process = server().Process(target=_become, args=given)
        self._process.start()
        self.pid = self._process.pid
        self.kill = self._process.kill

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=300):
        """(standard output, standard error), when it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.pid, timeout)
        return tuple(Path(self._said.name, name).read_text() for name in ("out", "err"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._said:
            kill_family(self)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ranks(processes):
    """What a launcher on this machine tells each of its processes."""
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
