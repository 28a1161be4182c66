"""Runs command lines one after the other, as a shell would, but ours in forks of one process that has torch loaded.

Each takes a fraction of a second to start so, where a process of its own takes several. Ends with the status of the
first that fails, and names it. A page that is served is opened once and then asked to end.
"""

import contextlib
import importlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import traceback
import urllib.request

import dit_pipeline
from pipeline.runtime.processes import bound_spinning

BEFOREHAND = (
    "torch",
    "accelerate",
    "diffusers",
    "extract.run",
    "train.run",
    "sample.run",
    "sample.evaluate.evaluation",
)


def call(words):
    """A command of ours, a module or a script in this process; its status."""
    if words[0] == "python":
        runs = runpy.run_module if words[1] == "-m" else runpy.run_path
        sys.argv = words[2:] if words[1] == "-m" else words[1:]
        runs(sys.argv[0], run_name="__main__", **({"alter_sys": True} if words[1] == "-m" else {}))
        return 0
    sys.argv = words
    return getattr(dit_pipeline, words[0].removeprefix("dit-"))()


def forked(words):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        status = call(words)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001 -- the fork must not go on as its parent
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def served(words):
    """A page that answers, and ends when it is interrupted."""
    with subprocess.Popen([sys.executable, "-m", "view", *words[1:]], stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", said)
        if found is None:
            sys.stderr.write(said + process.stderr.read())
            return process.wait()
        with urllib.request.urlopen(found[0]) as answer:
            assert b"<html" in answer.read()
        process.send_signal(signal.SIGINT)
        sys.stderr.write(process.stderr.read())
        return 0 if process.wait() == 128 + signal.SIGINT else 1


def main():
    bound_spinning()
    for module in BEFOREHAND:
        importlib.import_module(module)
    for line in sys.stdin.read().splitlines():
        sys.stderr.write(f"$ {line}\n")
        sys.stderr.flush()
        words = shlex.split(line)
        if words[0] == "dit-view":
            status = served(words)
        elif words[0].startswith("dit-") or words[0] == "python":
            status = forked(words)
        else:
            status = subprocess.run(["bash", "-euc", line], check=False).returncode
        if status:
            return f"status {status}: {line}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
