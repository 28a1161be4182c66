"""Files behind a URL, by fsspec: read, put whole, listed, removed; tried again after failures that may pass.

A name appears when its file is complete. Object stores see to that themselves: an object is there at the end of its
upload, in one piece or many. Elsewhere (a disk by file://, sftp) a file arrives under another name and is moved.
fsspec's caches are not used: they write under the final name, hold no lock between processes, and take a file of HTTP
for one that never changes (2026.9), so that half a copy and an old one are read as if they were whole and new; its
memory of listings is dropped before each look.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import replacing, sha256_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
else:
    AbstractFileSystem = object

Value = TypeVar("Value")

SILENCE_S = 60.0
"""How long a server may say nothing before a read from it fails."""
LARGEST_LIST = 1 << 28
"""The most bytes of a file that is read at once: manifests, records, lists; that of 100 million samples has 4 MB."""
_ATTEMPTS, _FIRST_WAIT_S = 4, 0.25
_PIECE = 1 << 20
_WHOLE_AT_ONCE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "obs", "tos", "hf", "memory"}
_HTTP = {"http", "https"}
_REFUSES_TAKEN = {"s3", "s3a"}
"""Where an upload can ask the server itself to refuse a name that is taken."""


class DamagedError(UserError):
    """What arrived is not what was promised."""


def is_url(address: str | Path) -> bool:
    """Whether an address needs fsspec, as `https://…` or `s3://…` do and a path does not."""
    return "://" in str(address) and not str(address).startswith("file://")


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
    # Not every server can give a part of a file; a size, whichever, keeps fsspec from asking for it first.
    streaming = {"block_size": 0, "size": size or 1} if _protocols(files) & _HTTP else {}
    limit = size if limit is None else limit
    total = 0
    with files.open(place, "rb", **streaming) as remote:
        while piece := remote.read(_PIECE):
            yield piece
            total += len(piece)
            if limit is not None and total > limit:
                return


def _protocols(files: AbstractFileSystem) -> set[str]:
    return set(files.protocol if isinstance(files.protocol, tuple) else [files.protocol])


class UrlFolder:
    """What lies below a URL.

    Every method tries again after a failure that may pass, and raises UserError for what stays wrong: credentials,
    a bucket that is not there, a server that cannot be reached.
    """

    def __init__(self, url: str) -> None:
        """Raise UserError if fsspec does not know such a URL, or misses a library for it."""
        self.url = url.rstrip("/")
        if "://" not in url:
            raise UserError(f"{url} is no URL; give one, as s3://bucket/folder or file:///mnt/disk/folder")
        try:
            self._files, root = open_files(self.url)
        except (ImportError, ValueError) as error:
            extra = (
                "; pip install 'dit-pipeline[s3]'" if url.startswith("s3") and isinstance(error, ImportError) else ""
            )
            raise UserError(f"{url} cannot be opened: {error}{extra}") from error
        self._root = root.rstrip("/")

    def describe(self, name: str) -> str:
        """The address of a file, for people."""
        return f"{self.url}/{name}" if name else self.url

    def read(self, name: str) -> bytes | None:
        """The contents of a small file, or None if there is none."""
        try:
            return self._retry(lambda: self._read(name), name, "read")
        except FileNotFoundError:
            return None

    def _read(self, name: str) -> bytes:
        self._files.invalidate_cache()
        data = b"".join(pieces_of(self._files, self._place(name), size=None, limit=LARGEST_LIST))
        if len(data) > LARGEST_LIST:
            raise UserError(f"{self.describe(name)} goes on beyond {LARGEST_LIST:,} bytes; check the URL")
        return data

    def read_part(self, name: str, start: int, size: int) -> bytes:
        """So many bytes of a file from a place on.

        Raises:
            UserError: the file is gone or shorter, or the server gives no parts.
        """

        def look() -> bytes:
            data: bytes = self._files.cat_file(self._place(name), start=start, end=start + size)
            return data

        try:
            data = self._retry(look, name, "read")
        except FileNotFoundError as error:
            raise UserError(f"{self.describe(name)} is gone; bring it back and run the same command again") from error
        if len(data) != size:
            raise UserError(
                f"{self.describe(name)} gave {len(data):,} bytes where {size:,} were asked for: it was replaced, or "
                "the server gives no parts of files; then leave --remote-tars stream away"
            )
        return data

    def fetch(self, name: str, path: Path, *, size: int, sha256: str) -> None:
        """Copy a file to a path, whole or not at all.

        Raises:
            DamagedError: it is missing, or has not the size and SHA-256 that were promised.
        """
        try:
            self._retry(lambda: self._fetch(name, path, size, sha256), name, "read")
        except FileNotFoundError as error:
            raise DamagedError(f"{self.describe(name)} is missing, but is listed; copy it there anew") from error

    def _fetch(self, name: str, path: Path, size: int, sha256: str) -> None:
        with replacing(path) as temporary, temporary.open("wb") as file:
            for piece in pieces_of(self._files, self._place(name), size=size):
                file.write(piece)
            file.flush()
            found = file.tell()
            if found != size:
                what = "cut off" if found < size else "too long"
                raise DamagedError(f"{self.describe(name)} is {what}: {found:,} bytes instead of {size:,}; restore it")
            if sha256_of(temporary) != sha256:
                raise DamagedError(
                    f"{self.describe(name)} has not the SHA-256 that was recorded; it is damaged there or on the way: "
                    "copy it there anew"
                )

    def check_writable(self, name: str = "") -> None:
        """Raise UserError where files cannot be put at all, whoever asks."""
        if _protocols(self._files) & _HTTP:
            raise UserError(
                f"{self.describe(name)} cannot be written: HTTP has no way to; give s3://, gs:// or another"
            )

    def put_all(self, files: Mapping[str, Path | bytes], *, replaces: bool = True, at_once: int = 1) -> None:
        """Put what belongs together, in this order: the last one, put when all others are there, is what they count by.

        Who replaces other contents removes the last one first.

        Args:
            files: what to put, by name.
            replaces: whether what has these names gives way; else a name that is taken is refused, unless its bytes
                are the same, as of an upload that was interrupted.
            at_once: how many to put at a time, of all but the last.
        """
        *names, last = files
        with ThreadPoolExecutor(at_once) as threads:
            for _ in threads.map(lambda name: self.put(name, files[name], replaces=replaces), names):
                pass
        self.put(last, files[last], replaces=replaces)

    def put(self, name: str, content: Path | bytes, *, replaces: bool = True) -> None:
        """Put a file there whole, from a path or from memory; what had the name is replaced at once, or never."""
        self.check_writable(name)
        try:
            if replaces or not self._is_taken(name, content):
                self._retry(lambda: self._put(name, content, replaces=replaces), name, "written")
        except FileExistsError:  # it appeared meanwhile; or it is ours, of an attempt whose answer was lost
            self._is_taken(name, content)
        except FileNotFoundError as error:
            if isinstance(content, Path) and not content.exists():
                raise
            raise UserError(
                f"{self.describe(name)} cannot be written: there is no such bucket or container ({error}); check the "
                "URL, or make it first"
            ) from error

    def _is_taken(self, name: str, content: Path | bytes) -> bool:
        """Whether these very bytes have the name; raises UserError if others have it."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        there = self.size(name)
        if there is None:
            return False
        wanted = sha256_of(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        if there != size or self.sha256(name) != wanted:
            raise UserError(f"{self.describe(name)} is there already; pass --overwrite, or choose another name")
        return True

    def sha256(self, name: str) -> str | None:
        """The SHA-256 of a file in hexadecimal, read in pieces; None if there is none."""

        def look() -> str:
            digest = hashlib.sha256()
            for piece in pieces_of(self._files, self._place(name), size=None):
                digest.update(piece)
            return digest.hexdigest()

        try:
            return self._retry(look, name, "read")
        except FileNotFoundError:
            return None

    def _put(self, name: str, content: Path | bytes, *, replaces: bool) -> None:
        place = self._place(name)
        if _protocols(self._files) & _WHOLE_AT_ONCE:
            refuses = not replaces and _protocols(self._files) & _REFUSES_TAKEN
            self._send(content, place, **({"mode": "create"} if refuses else {}))
            return
        folder, _, last = place.rpartition("/")
        self._files.makedirs(folder, exist_ok=True)
        self._send(content, f"{folder}/.{last}.partial")
        self._files.mv(f"{folder}/.{last}.partial", place)

    def _send(self, content: Path | bytes, place: str, **how: str) -> None:
        if isinstance(content, bytes):
            self._files.pipe_file(place, content, **how)
        else:
            self._files.put_file(str(content), place, **how)

    def names(self, below: str = "") -> dict[str, int]:
        """{name: bytes} of all files below a folder in here, as the server lists them now; none where none is there."""
        place = self._place(below)

        def look() -> dict[str, int]:
            self._files.invalidate_cache()
            found = self._files.find(place, detail=True)
            return {path.removeprefix(self._root).lstrip("/"): int(about["size"]) for path, about in found.items()}

        try:
            return self._retry(look, below, "listed")
        except FileNotFoundError:
            return {}

    def size(self, name: str) -> int | None:
        """The bytes of a file, asked for by its name, so that it counts before it is listed; None if there is none."""

        def look() -> int:
            self._files.invalidate_cache()
            return int(self._files.info(self._place(name))["size"])

        try:
            return self._retry(look, name, "read")
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file; one that is already gone is no error."""
        try:
            self._retry(lambda: self._files.rm_file(self._place(name)), name, "removed")
        except FileNotFoundError:
            return

    def remove_folder(self, name: str) -> None:
        """Remove all files below a folder in here, as far as they are listed, and what of it is left."""
        for below in self.names(name):
            self.remove(below)
        if not _protocols(self._files) & _WHOLE_AT_ONCE:  # elsewhere a folder is more than a part of names
            with contextlib.suppress(OSError):
                self._files.rm(self._place(name), recursive=True)

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _retry(self, action: Callable[[], Value], name: str, what: str) -> Value:
        try:
            return trying(action)
        except (FileNotFoundError, FileExistsError, UserError):
            raise
        except Exception as error:  # every file system of fsspec has errors of its own
            if _is_about_rights(error):
                raise UserError(
                    f"{self.describe(name)} cannot be {what}: access is refused ({error}); check the credentials "
                    f"(of s3:// AWS_ACCESS_KEY_ID and its kin, or a profile), renew them if they have expired, and "
                    "run the same command again"
                ) from error
            raise UserError(f"{self.describe(name)} cannot be {what} ({type(error).__name__}: {error})") from error


def trying(action: Callable[[], Value]) -> Value:
    """What the action gives; tried again after failures that may pass, waiting longer each time; or its last error."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return action()
        except Exception as error:
            if not _may_pass(error):
                raise
            time.sleep(_FIRST_WAIT_S * 4**attempt)
    return action()


def _may_pass(error: Exception) -> bool:
    is_final = isinstance(error, UserError) and not isinstance(error, DamagedError)
    return not (is_final or isinstance(error, FileNotFoundError | FileExistsError) or _is_about_rights(error))


def _is_about_rights(error: Exception) -> bool:
    """Whether a server refuses who asks: no credentials, wrong ones, or ones that have expired.

    S3 gives no reason where it is asked for a header alone, only the number 400 or 403.
    """
    is_bare = str(error).endswith(("Bad Request", "Forbidden"))
    return isinstance(error, PermissionError) or "Credential" in type(error).__name__ or is_bare
