"""Where a store's files are: in a local folder, or behind a URL with copies of its shards in a local cache.

Copies are named by their SHA-256, so they are checked once, when they arrive, and never out of date; stores and
processes share them. A copy arrives under another name and is renamed, so half a copy is never read. fsspec's own
caches are not used: they write under the final name, hold no lock between processes, and take a file of HTTP for one
that never changes (2026.9), so that half a copy and an old one are read as if they were whole and new.
"""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pipeline.latents.manifest import ShardEntry, read_manifest_bytes
from pipeline.latents.names import MANIFEST_FILE
from pipeline.latents.shards import size_fault
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, replacing, sha256_of
from pipeline.runtime.work_queue import exclusive

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
else:
    AbstractFileSystem = object

CACHE_VARIABLE = "DIT_LATENTS_CACHE"
SILENCE_S = 60.0
"""How long a server may say nothing before a read from it fails."""
_ATTEMPTS = 3
_PIECE = 1 << 20
_LARGEST_LIST = 1 << 28  # manifests, records and lists of what was skipped; that of 100 million samples has 4 MB
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
    if "://" not in text or text.startswith("file://"):
        return LocalFolder(Path(text.removeprefix("file://")).expanduser())
    return RemoteFolder(text.rstrip("/"), cache_folder(cache))


def cache_folder(given: str | Path | None) -> Path:
    """Where copies go: what is given, else DIT_LATENTS_CACHE, else `dit-pipeline/latents` in the user's cache."""
    if given is None:
        given = os.environ.get(CACHE_VARIABLE) or None
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dit-pipeline" / "latents"


def open_files(url: str) -> tuple[AbstractFileSystem, str]:
    """(the file system of a URL, the place in it); over HTTP a server that falls silent is an error, a slow one not.

    Raises:
        ImportError: a library is missing for such URLs.
        ValueError: fsspec does not know such URLs.
    """
    import fsspec

    limits: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        silence = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
        limits = {"client_kwargs": {"timeout": silence}}
    files, place = fsspec.core.url_to_fs(url, **limits)
    return files, place


def pieces_of(files: AbstractFileSystem, place: str, *, size: int | None, limit: int | None = None) -> Iterator[bytes]:
    """What is there from beginning to end; never more than a piece beyond what was promised.

    Args:
        files: the file system.
        place: the file in it.
        size: the bytes that it should have, if that is known.
        limit: the bytes that it may have at most; `size`, if not said.
    """
    is_http = bool({"http", "https"} & set(files.protocol if isinstance(files.protocol, tuple) else [files.protocol]))
    # Not every server can give a part of a file; a size, whichever, keeps fsspec from asking for it first.
    streaming = {"block_size": 0, "size": size or 1} if is_http else {}
    limit = size if limit is None else limit
    total = 0
    with files.open(place, "rb", **streaming) as remote:
        while piece := remote.read(_PIECE):
            yield piece
            total += len(piece)
            if limit is not None and total > limit:
                return


class LocalFolder:
    """A store on a disk of this machine, or one that looks like it."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def describe(self, name: str) -> str:
        return str(self.path / name)

    def manifest_bytes(self) -> bytes:
        return read_manifest_bytes(self.path)

    def small_file(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

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
        try:
            self._files, self._root = open_files(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url} cannot be opened: {error}") from error

    def describe(self, name: str) -> str:
        return f"{self.url}/{name}"

    def manifest_bytes(self) -> bytes:
        data = self.small_file(MANIFEST_FILE)
        if data is None:
            raise UserError(
                f"there is no finished latent store at {self.url}: it has no {MANIFEST_FILE}; "
                "check the URL, or wait until the extraction is done"
            )
        return data

    def small_file(self, name: str) -> bytes | None:
        try:
            data: bytes = self._retry(lambda: self._small_file(name), name)
        except FileNotFoundError:
            return None
        return data

    def _small_file(self, name: str) -> bytes:
        data = b"".join(pieces_of(self._files, f"{self._root}/{name}", size=None, limit=_LARGEST_LIST))
        if len(data) > _LARGEST_LIST:
            raise UserError(f"{self.describe(name)} goes on beyond {_LARGEST_LIST:,} bytes; check the URL")
        return data

    def fetch(self, shard: ShardEntry) -> Path:
        copy = self.cache / f"{shard.sha256}{Path(shard.file).suffix}"
        if _has_size(copy, shard.bytes):
            return copy
        make_folder(self.cache)
        with exclusive(copy.with_name(f".{copy.name}.lock"), needed=False):
            if not _has_size(copy, shard.bytes):
                for left in self.cache.glob(f".{copy.name}.*.partial"):  # of a process that was killed
                    left.unlink(missing_ok=True)
                self._retry(lambda: self._download(shard, copy), shard.file)
        return copy

    def size_faults(self, _shards: Sequence[ShardEntry]) -> list[str]:
        return []  # a shard is checked when it arrives

    def _download(self, shard: ShardEntry, copy: Path) -> None:
        with replacing(copy) as temporary, temporary.open("wb") as file:
            try:
                for piece in pieces_of(self._files, f"{self._root}/{shard.file}", size=shard.bytes):
                    file.write(piece)
            except FileNotFoundError as error:
                raise UserError(
                    f"{self.describe(shard.file)} is missing, but the manifest lists it; copy the store there anew"
                ) from error
            file.flush()
            size = file.tell()
            if size != shard.bytes:
                raise _DamagedCopyError(size_fault(self.describe(shard.file), size, shard.bytes))
            if sha256_of(temporary) != shard.sha256:
                raise _DamagedCopyError(
                    f"{self.describe(shard.file)} has not the SHA-256 that the manifest gives; it is damaged there "
                    "or on the way: copy the store anew"
                )

    def _retry(self, action: Any, name: str) -> Any:
        """What the action gives; tried again after failures that may pass."""
        for attempt in range(_ATTEMPTS):
            try:
                return action()
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:  # every file system of fsspec has errors of its own
                if attempt + 1 < _ATTEMPTS:
                    time.sleep(0.2 * 4**attempt)
                    continue
                if isinstance(error, _DamagedCopyError):
                    raise UserError(str(error)) from error
                raise UserError(f"{self.describe(name)} cannot be read ({type(error).__name__}: {error})") from error
        raise AssertionError


class _DamagedCopyError(Exception):
    """What arrived is not what the manifest promises."""


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
