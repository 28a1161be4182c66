"""Where commands run: forks of one warm process in a folder of their own, what they left, and whether it is whole."""

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.runtime import console
from tests.crash_points import shim

MODULES = {
    "extract": "extract.__main__",
    "train": "train.__main__",
    "plot": "train.plot.__main__",
    "sample": "sample.__main__",
    "evaluate": "sample.evaluate.__main__",
    "tune": "sample.tune.__main__",
    "convert": "pipeline.convert.__main__",
    "inspect": "pipeline.inspect.__main__",
}
LATE = ("diffusers.models.autoencoders.autoencoder_kl", "diffusers", "extract.run", "train.run", "sample.run")
LATE += (
    "sample.evaluate.evaluation",
    "sample.tune.run",
    "pipeline.convert.run",
    "pipeline.inspect.store",
    "pipeline.inspect.checkpoint",
)
WIDTHS = {"features_2048": 2048, "spatial": 2023, "logits_unbiased": 1008, "pixels": 12}
PATIENCE_S, GRACE_S = 60.0, 3.0
HUGE, MADV_COLLAPSE = 2 << 20, 25


class _PreparedError(BaseException):
    """The options are parsed; the command is not to go on."""


def warm_up():
    """Import all that the commands would, and start no thread: a fork of a process with threads has none of them."""
    for name in (*MODULES.values(), *LATE):
        importlib.import_module(name)


def settle():
    """Make forks cheap: what is here is no garbage, and lies in huge pages, so that a fork copies few table entries."""
    gc.freeze()
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, inode, *name = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        first, last = -(-first // HUGE) * HUGE, last // HUGE * HUGE
        if rights.startswith("rw") and inode == "0" and name != ["[stack]"] and first < last:
            advise(first, last - first, MADV_COLLAPSE)  # an older kernel refuses, and forks cost more


def prepare(words):
    """Parse a command's options here, once for all forks: it takes longer than what they ask for at this size."""
    parse = console.parse_options

    def remember(options_class, arguments, **about):
        key, options = (options_class, tuple(arguments)), parse(options_class, arguments, **about)
        console.parse_options = lambda *given, **more: (
            options if (given[0], tuple(given[1])) == key else parse(*given, **more)
        )
        raise _PreparedError

    console.parse_options = remember
    with contextlib.suppress(_PreparedError):
        call(words)


def remember(folder):
    """Do here, once for all forks, what costs most and touches no watched file; for the FID network and the drawing of
    curves something smaller stands in."""
    from matplotlib.figure import Figure

    from pipeline import vae
    from pipeline.dit import macs
    from sample.evaluate import features, inception_weights

    network = torch.nn.Identity()
    _everywhere(macs.count_macs, lambda config: 1)
    _everywhere(inception_weights.load_inception, lambda weights: network)
    _everywhere(features._features_of_batch, _stand_in)
    for function in (vae.fingerprint, vae.load_model):
        _everywhere(function, functools.cache(function))
    Figure.draw = _draw
    inception_weights.sha256_of = functools.cache(inception_weights.sha256_of)
    with contextlib.chdir(folder):
        vae.load_vae("in/vae")
        inception_weights.find_inception("in/inception.safetensors")


def _stand_in(images, network, wanted, device):
    """Features of any images: their mean bytes, along one direction."""
    means = images.reshape(len(images), -1).mean(1)
    return {name: np.outer(means, np.linspace(0, 0.1, WIDTHS[name])).astype(np.float32) for name in wanted}


def _draw(figure, renderer):
    """A picture of a figure's curves that another one's differs from, without the seconds that its text takes."""
    curves = [line.get_xydata().tobytes() for axes in figure.axes for line in axes.lines]
    np.asarray(renderer.buffer_rgba())[0, :8] = np.frombuffer(
        hashlib.sha256(b"".join(curves)).digest(), np.uint8
    ).reshape(8, 4)


def _everywhere(function, instead):
    for module in list(sys.modules.values()):
        if vars(module).get(function.__name__) is function:
            setattr(module, function.__name__, instead)


def call(words):
    """A command in this process; its exit status."""
    sys.argv = list(words)
    return sys.modules[MODULES[words[0]]].main()


@dataclass(frozen=True)
class Ended:
    """What became of a command: its exit status (minus the signal), None while it is stopped, and what it said."""

    pid: int
    status: int | None
    said: str

    @property
    def is_refusal(self):
        return self.status == 2 and "Traceback" not in self.said


class Place:
    """A folder with `in` (read), `o` (written, watched) and what is needed to put `o` back."""

    def __init__(self, folder, server=""):
        self.folder, self.server = Path(folder).resolve(), server
        self.out, self.log = self.folder / "o", self.folder / "log"
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self, words, point=None, mode="", *, listing=False, patience=PATIENCE_S, processes=1):
        """A command to its end, or to where it is stopped; with a point, disturbed there."""
        self.log.unlink(missing_ok=True)
        if processes == 1:
            return self.wait(self.start(words, point, mode, listing=listing), patience)
        together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        ranks = [
            self.start(words, point, mode, listing=listing, RANK=str(rank), LOCAL_RANK=str(rank), **together)
            for rank in range(processes)
        ]
        return self._wait_for_all(ranks)

    def start(self, words, point=None, mode="", *, listing=False, **environment):
        """The process of a command."""
        pid = os.fork()
        if pid == 0:
            os.environ |= environment
            self._become(words, point, mode, listing=listing)
        return pid

    def _become(self, words, point, mode, *, listing):
        status = 1
        try:
            os.chdir(self.folder)
            said = os.open(f"said-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.environ["XDG_CACHE_HOME"] = str(self.out / "cache")
            sys.modules["extract.__main__"]._BEGAN = time.time()
            if listing or mode:
                shim.arm(self.out, self.log, point, mode)
            status = call(self.words(words)) or 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # noqa: BLE001 - a fork never returns
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if listing:
                (self.folder / "modules").write_text("\n".join(sys.modules))
            os._exit(status)

    def words(self, words):
        """The command line with the server's address in it, and the name of the network that it serves."""
        network = next((path.name for path in (self.folder / "in" / "web").glob("inception-*")), "")
        return [word.replace("{server}", self.server).replace("{network}", network) for word in words]

    def prepare(self, row):
        """Do here, once, what every fork of a row's commands would do: parse options, import the last modules."""
        for words in (row.command, row.other, *row.before, *([[*row.other, "--overwrite"]] if row.forces else [])):
            prepare(self.words(words))
        settle()

    def import_the_rest(self):
        """Import what the last listed command has imported late."""
        for name in (self.folder / "modules").read_text().split():
            if name not in sys.modules:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
        assert threading.active_count() == 1, threading.enumerate()
        settle()

    def watched(self, words):
        """(points, tree) pairs of an undisturbed run: what stands in `o` before each call, all threads standing still."""
        self.log.unlink(missing_ok=True)
        pid, met = self.start(words, mode="watch"), 0
        while self.wait(pid).status is None:
            points = shim.points_of(self.log)  # more than one where two threads meet calls at once
            yield points[met:], self.tree()
            met = len(points)
            os.kill(pid, signal.SIGCONT)

    def wait(self, pid, patience=PATIENCE_S, *, kill=True):
        """Until the command has ended, or has stopped at its point; one that takes too long is killed, or is None."""
        deadline = time.monotonic() + patience
        while True:
            found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if found:
                break
            if time.monotonic() > deadline and not kill:
                return None
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return Ended(pid, 124, f"no end within {patience:g} s; {self._said(pid)}")
            time.sleep(0.002)
        if os.WIFSTOPPED(status):
            return Ended(pid, None, "")
        return Ended(pid, os.waitstatus_to_exitcode(status), self._said(pid))

    def _wait_for_all(self, ranks):
        """Until all have ended, as torchrun sees to: once one has failed the others are asked to end, and then killed."""
        ended, failed = {}, None
        while len(ended) < len(ranks):
            found, status = os.waitpid(-1, os.WNOHANG)
            if found in ranks:
                ended[found] = Ended(found, os.waitstatus_to_exitcode(status), self._said(found))
                if ended[found].status and failed is None:
                    failed, asked = ended[found], time.monotonic()
            if failed is not None:
                late = time.monotonic() - asked
                for pid in set(ranks) - set(ended):
                    if late > GRACE_S:
                        os.kill(pid, signal.SIGKILL if late > 2 * GRACE_S else signal.SIGTERM)
            time.sleep(0.01)
        return failed or ended[ranks[0]]

    def _said(self, pid):
        path = self.folder / f"said-{pid}"
        text = path.read_text(errors="replace") if path.exists() else ""
        path.unlink(missing_ok=True)
        return text

    def clear(self):
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(exist_ok=True)

    def keep(self, name):
        """Remember what stands in `o`."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.copytree(self.out, self.folder / name, symlinks=True)

    def put_back(self, name):
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.folder / name, self.out, symlinks=True)

    def tree(self, *, visible=False):
        """{path: SHA-256} of all that stands in `o`, empty and hidden folders too; what a clock determines left out."""
        found = {}
        for path in self.out.rglob("*"):
            name = path.relative_to(self.out).as_posix()
            if name.startswith("cache/.") and name.endswith(".partial"):
                continue  # shared with other commands: it goes when it is old
            if visible and any(part.startswith(".") for part in name.split("/")):
                continue
            if not path.is_dir() or path.is_symlink():
                found[name] = hashlib.sha256(timeless(path)).hexdigest()
            elif path.name.startswith(".") or not any(path.iterdir()):
                found[f"{name}/"] = ""
        return found


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def timeless(path):
    """A file's bytes without the seconds that a run took, inodes, process ids, and whether --overwrite was given."""
    data = path.read_bytes()
    try:
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            return json.dumps([[line["step"], line.get("loss"), line.get("grad_norm")] for line in lines]).encode()
        if path.name == "result.json":
            result = json.loads(data)
            result["options"].pop("overwrite", None)
            return json.dumps(result).encode()
        if path.name == "trainer.json":
            return json.dumps({**json.loads(data), "seconds": 0}).encode()
        if "publish.json" in path.name:
            return re.sub(rb'"inode": \d+|\.\d+\.', b"", data)
        if path.name == "files.json":
            listing = json.loads(data)
            listing["files"].pop("state/trainer.json", None)
            return json.dumps(listing).encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return data


def anonymous(tree):
    """The tree as a value, with process ids left out of names: what happens next depends on this alone."""
    return tuple(sorted((anonymous_name(name), sha) for name, sha in tree.items()))


def anonymous_name(name):
    return re.sub(r"[0-9a-f]{8,}|(?<=[.-])\d{2,5}(?=[.-])|(?<=\.tmp)[^/.]{6}", "#", name)


def below(tree, name):
    """The part of a tree that is one output: a file or all of a folder, hidden things left out."""
    inside = {path: sha for path, sha in tree.items() if path == name or path.startswith(f"{name}/")}
    return {path: sha for path, sha in inside.items() if not any(part.startswith(".") for part in path.split("/"))}
