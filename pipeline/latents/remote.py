"""Where a store's files are: in a local folder, or behind a URL with copies of its shards in a local cache.

Copies are named by their SHA-256, so they are checked once, when they arrive, and never out of date; stores and
processes share them. A copy arrives under another name and is renamed, so half a copy is never read.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from pipeline.latents.manifest import ShardEntry, read_manifest_bytes
from pipeline.latents.names import MANIFEST_FILE
from pipeline.latents.shards import size_fault
from pipeline.latents.store_files import complete_replacement
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder
from pipeline.runtime.gate import read_regular
from pipeline.runtime.remote_files import UrlFolder, is_url
from pipeline.runtime.work_queue import exclusive

CACHE_VARIABLE = "DIT_LATENTS_CACHE"
_STAT_THREADS = 16


@runtime_checkable
class Folder(Protocol):
    """The files of a store."""

    is_remote: bool

    def describe(self, name: str) -> str:
        """The place of a file, for people."""

    def manifest_bytes(self) -> bytes:
        """The manifest as it is now."""

    def small_file(self, name: str) -> bytes | None:
        """The contents of a record or list, or None if there is none."""

    def fetch(self, shard: ShardEntry) -> Path:
        """A local file with the shard's bytes."""

    def size_faults(self, shards: Sequence[ShardEntry]) -> list[str]:
        """A sentence for every shard that is missing or not of its size, as far as that is known at once."""


def open_folder(path: str | Path, cache: str | Path | None = None) -> Folder:
    """The folder or URL of a store.

    Raises:
        UserError: fsspec does not know such a URL, or misses a library for it.
    """
    text = str(path)
    if not is_url(text):
        return LocalFolder(Path(text.removeprefix("file://")).expanduser())
    return RemoteFolder(text.rstrip("/"), cache_folder(cache))


def cache_folder(given: str | Path | None) -> Path:
    """Where copies go: what is given, else DIT_LATENTS_CACHE, else `dit-pipeline/latents` in the user's cache."""
    if given is None:
        given = os.environ.get(CACHE_VARIABLE) or None
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dit-pipeline" / "latents"


class LocalFolder:
    """A store on a disk of this machine, or one that looks like it."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def describe(self, name: str) -> str:
        return str(self.path / name)

    def manifest_bytes(self) -> bytes:
        if not (self.path / MANIFEST_FILE).exists():  # a kill may have interrupted the change to another store
            with suppress(UserError):
                complete_replacement(self.path)
        return read_manifest_bytes(self.path)

    def small_file(self, name: str) -> bytes | None:
        path = self.path / name
        return read_regular(path) if path.is_file() else None

    def fetch(self, shard: ShardEntry) -> Path:
        return self.path / shard.file

    def size_faults(self, shards: Sequence[ShardEntry]) -> list[str]:
        if len(shards) < 2 * _STAT_THREADS:
            return [fault for fault in map(self._size_fault, shards) if fault]
        with ThreadPoolExecutor(_STAT_THREADS) as threads:  # a network file system takes a while for each
            return [fault for fault in threads.map(self._size_fault, shards) if fault]

    def _size_fault(self, shard: ShardEntry) -> str | None:
        path = self.path / shard.file
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            return f"{path} is missing, but the manifest lists it; restore it, or extract again"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror}); check its rights"
        return None if found == shard.bytes else size_fault(path, found, shard.bytes)


class RemoteFolder:
    """A store behind a URL. Whole shards are copied, because not every server can give a part of a file."""

    is_remote = True

    def __init__(self, url: str, cache: Path) -> None:
        self.url, self.cache = url, cache
        self._folder = UrlFolder(url)

    def describe(self, name: str) -> str:
        return self._folder.describe(name)

    def manifest_bytes(self) -> bytes:
        data = self.small_file(MANIFEST_FILE)
        if data is None:
            raise UserError(
                f"there is no finished latent store at {self.url}: it has no {MANIFEST_FILE}; "
                "check the URL, or wait until the extraction is done"
            )
        return data

    def small_file(self, name: str) -> bytes | None:
        return self._folder.read(name)

    def fetch(self, shard: ShardEntry) -> Path:
        copy = self.cache / f"{shard.sha256}{Path(shard.file).suffix}"
        fetch_copy(self._folder, shard.file, copy, size=shard.bytes, sha256=shard.sha256)
        return copy

    def size_faults(self, _shards: Sequence[ShardEntry]) -> list[str]:
        return []  # a shard is checked when it arrives


def fetch_copy(folder: UrlFolder, name: str, copy: Path, *, size: int, sha256: str) -> None:
    """Have a copy of a file, made once: of several processes one fetches it, and the others wait.

    Raises:
        UserError: it is missing or damaged there, or the server cannot be reached.
    """
    if _has_size(copy, size):
        return
    make_folder(copy.parent)
    with exclusive(copy.with_name(f".{copy.name}.lock"), needed=False):
        if not _has_size(copy, size):
            for left in copy.parent.glob(f".{copy.name}.*.partial"):  # of a process that was killed
                left.unlink(missing_ok=True)
            folder.fetch(name, copy, size=size, sha256=sha256)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
