"""The public weights of the FID network: found, fetched into a cache, checked and loaded."""

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch.hub
from torch import Tensor

from pipeline.checkpoint.weight_files import load_tensors
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, replacing, sha256_of
from pipeline.runtime.work_queue import exclusive
from sample.evaluate.inception import FIDInception

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.(?:pth|pt|safetensors)$")
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InceptionWeights:
    """A weight file that is there, and its fingerprint."""

    path: Path
    sha256: str

    def describe(self) -> dict[str, str]:
        return {"file": self.path.name, "sha256": self.sha256}


def cache_folder() -> Path:
    """Where downloads and unfinished work go: `dit-pipeline` in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-pipeline"


def find_inception(named: str | None) -> InceptionWeights:
    """The weight file that --inception names, or the one in the cache; a URL is downloaded once.

    A file whose name ends in eight hexadecimal digits, as the public one's does, must have a SHA-256 that
    begins with them.

    Raises:
        UserError: there is no such file, the download fails, or the hash is another one.
    """
    if named is not None and "://" in named:
        path = _download(named)
    elif named is not None:
        path = Path(named)
        if not path.is_file():
            raise UserError(f"--inception {path} is not a file; {_where_to_get_it()}")
    else:
        path = cache_folder() / FILE_NAME
        if not path.is_file():
            raise UserError(
                f"the weights of the FID network are missing: --inception FILE is not given and {path} "
                f"does not exist; {_where_to_get_it()}"
            )
    sha256 = sha256_of(path)
    _check_hash(path.name, sha256, str(path))
    return InceptionWeights(path=path, sha256=sha256)


def load_inception(weights: InceptionWeights) -> FIDInception:
    """The network in eval mode on the CPU.

    Raises:
        UserError: the file is damaged, or holds another network; every tensor that does not fit is named.
    """
    network = FIDInception()
    found = load_tensors(weights.path)
    expected = network.state_dict()
    wrong = _misfits(found, expected)
    if wrong:
        raise UserError(f"{weights.path} holds other weights than the FID network's: {wrong}; {_where_to_get_it()}")
    network.load_state_dict(found, strict=False)  # counters of training batches may be missing, nothing else
    return network.eval().requires_grad_(False)


def _misfits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    complaints = {
        "missing": [name for name in expected if name not in found and name not in counters],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(expected[name].shape)}"
            for name in expected
            if name in found and found[name].shape != expected[name].shape
        ],
    }
    return "; ".join(f"{len(names)} {what} ({', '.join(names)})" for what, names in complaints.items() if names)


def _where_to_get_it() -> str:
    return f"get {FILE_NAME} (95 MB) from {URL} and give --inception FILE, or give that URL as --inception"


def _check_hash(name: str, sha256: str, where: str) -> None:
    match = _HASH_IN_NAME.search(name)
    if match and not sha256.startswith(match.group(1)):
        raise UserError(
            f"{where} has the SHA-256 {sha256[:8]}…, but its name promises {match.group(1)}…: it is damaged or "
            f"another file; remove it and {_where_to_get_it()}"
        )


def _download(url: str) -> Path:
    """The cached copy of a URL, downloaded if it is not there yet."""
    parts = urlparse(url)
    name = Path(parts.path).name
    if parts.scheme not in {"http", "https"} or not _HASH_IN_NAME.search(name):
        raise UserError(
            f"--inception {url} is no http(s) address of a file whose name ends in its hash; {_where_to_get_it()}"
        )
    path = cache_folder() / name
    lock = path.with_name(f".{name}.lock")
    if path.is_file() and not lock.exists():  # else a command fetches, or was killed while it did
        return path
    make_folder(path.parent)
    with exclusive(lock, needed=False):
        try:
            for killed in path.parent.glob(f".{name}.*.partial*"):  # whoever wrote these held the lock
                killed.unlink(missing_ok=True)
            if not path.is_file():
                say(f"downloading {url} to {path}")
                _fetch(url, path)
        finally:
            lock.unlink(missing_ok=True)  # who waits for it notices, and makes it anew
    return path


def _fetch(url: str, path: Path) -> None:
    with replacing(path) as temporary:
        try:
            with time_limited():
                torch.hub.download_url_to_file(url, str(temporary), progress=sys.stderr.isatty())
        except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
            raise UserError(f"{url} cannot be downloaded ({error}); {_where_to_get_it()}") from error
        _check_hash(path.name, sha256_of(temporary), url)


@contextmanager
def time_limited() -> Iterator[None]:
    """Let no connection opened inside the block wait for its server longer than a minute; torch.hub sets no limit."""
    kept = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(kept)
