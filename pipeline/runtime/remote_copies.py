"""Whole copies of remote files, made once, for sources that need random access.

Not every server answers range requests, and a shuffled order makes a million of them; so disk is spent instead: as much
as the remote files have. Where that is too much, a copy can be thinned as soon as it is there. It is named after its
address and what identifies its bytes on the server (size, ETag, time, as far as it tells), so that one of a file that
was replaced is never taken. Why fsspec's own caches are not used is said in `pipeline.runtime.remote_files`.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import BinaryIO

from pipeline.runtime.console import progress, say, warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explain_write_error, explained_writes, make_folder, replacing
from pipeline.runtime.remote_files import DamagedError, is_url, open_files, pieces_of, trying
from pipeline.runtime.units import size

_THREADS = 4
_IDENTIFYING = ("size", "ETag", "etag", "Last-Modified", "LastModified", "updated", "md5Hash", "blob_id")
_LEFT_BEHIND_S = 3600.0


@cache
def local_place(address: str, folder: Path) -> Path:
    """Where the bytes behind an address are, or will be after `fetch`: the path itself, or a copy in `folder`.

    Raises:
        UserError: the server cannot be asked, and there is no copy or more than one.
    """
    if not is_url(address):
        return Path(address.removeprefix("file://")).expanduser()
    begin, end = _digest(address), f"-{address.partition('?')[0].rpartition('/')[2]}"
    try:
        told = _told(address)
    except Exception as error:  # every fsspec backend raises errors of its own
        copies = list(folder.glob(f"{begin}????????{end}"))
        if len(copies) != 1:
            raise _unfetched(address, error) from error
        warn(f"{address} cannot be asked whether it has changed ({_why(error, address)}); going on with its copy")
        return copies[0]
    return folder / f"{begin}{_digest(repr(told))}{end}"


def fetch(
    addresses: Sequence[str], folder: Path, thin: Callable[[Path], None] | None = None, advice: str = "free some space"
) -> None:
    """Copy what is remote and not in `folder` yet.

    Args:
        addresses: of which some may be paths.
        folder: where copies are.
        thin: takes from a copy, before it gets its name, what is not needed of it; so few are whole at a time.
        advice: what to do where the disk is too small.

    Raises:
        UserError: an address cannot be fetched, or the disk is full or too small.
    """
    remote = [address for address in addresses if is_url(address)]
    if not remote:
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        places = zip(remote, pool.map(lambda address: local_place(address, folder), remote), strict=True)
        missing = [(address, path) for address, path in places if not path.exists()]
        if not missing:
            return
        make_folder(folder)
        sizes = sorted(pool.map(_size_told, (address for address, _ in missing)), reverse=True)
        _check_disk(sizes, folder, at_once=None if thin is None else _THREADS, advice=advice)
        with progress(len(missing), unit="files", description="fetching") as bar:
            for _ in pool.map(lambda pair: _fetch(pair[0], pair[1], thin), missing):
                bar.update()


def _check_disk(sizes: Sequence[int], folder: Path, *, at_once: int | None, advice: str) -> None:
    """Say what copies of these sizes, the largest first, take; raise UserError where the disk has not that much."""
    needed, free = sum(sizes[:at_once]), shutil.disk_usage(folder).free
    whole = "" if at_once is None else f", of which at most {at_once} are whole here at a time ({size(needed)})"
    say(f"{len(sizes)} files to fetch, {size(sum(sizes))}{whole}")
    if needed > free:
        raise UserError(f"the copies take {size(needed)}, but {folder} has {size(free)} free; {advice}")


def check_unchanged(addresses: Sequence[str], folder: Path) -> None:
    """Raise UserError if a server has other bytes by now than those that were copied."""

    def check(address: str) -> None:
        try:
            is_same = _digest(repr(_told(address))) == local_place(address, folder).name[8:16]
        except Exception as error:  # as above
            raise _unfetched(address, error) from error
        if not is_same:
            raise UserError(f"{address} was replaced on the server meanwhile; run the command again")

    with ThreadPoolExecutor(4 * _THREADS) as pool:
        for _ in pool.map(check, filter(is_url, addresses)):
            pass


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _told(address: str) -> dict[str, str]:
    """What the server says that tells these bytes from later ones under the same address."""
    files, place = open_files(address)
    told = trying(lambda: files.info(place))
    return {name: str(told[name]) for name in _IDENTIFYING if told.get(name) is not None}


def _size_told(address: str) -> int:
    """Bytes of a file; 0 where its server does not tell."""
    try:
        return int(_told(address).get("size", 0))
    except Exception as error:  # as above
        raise _unfetched(address, error) from error


def _fetch(address: str, path: Path, thin: Callable[[Path], None] | None) -> None:
    for left in path.parent.glob(f".{path.name}.*.partial"):
        if time.time() - left.stat().st_mtime > _LEFT_BEHIND_S:  # by a process that was killed
            left.unlink(missing_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as target:
        try:
            told = _told(address)
            promised = int(told["size"]) if "size" in told else None
            trying(lambda: _pour(address, promised, target, path))
            is_same = _told(address) == told and _digest(repr(told)) == path.name[8:16]
        except Exception as error:  # as above
            explained = explain_write_error(path, error) if isinstance(error, OSError) else error
            if isinstance(explained, UserError):
                raise explained from error
            raise _unfetched(address, error) from error
        if not is_same:
            raise UserError(f"{address} was replaced on the server meanwhile; run the command again")
        if thin is not None:
            target.flush()
            thin(temporary)


def _pour(address: str, promised: int | None, target: BinaryIO, path: Path) -> None:
    """Write what is behind an address into a file, from its beginning; raises DamagedError if it is not all there."""
    target.seek(0)
    target.truncate()
    files, place = open_files(address)
    for piece in pieces_of(files, place, size=promised):
        with explained_writes(path):
            target.write(piece)
    found = target.tell()
    if promised is not None and found != promised:
        what = "cut off" if found < promised else "too long"
        raise DamagedError(f"{address} came {what}: {found:,} of {promised:,} bytes; run the command again")


def _unfetched(address: str, error: Exception) -> UserError:
    if isinstance(error, ImportError):
        return UserError(f"{address} needs a package that is not installed ({error}); pip install it")
    return UserError(f"{address} cannot be fetched ({_why(error, address)}); check the address, then run again")


def _why(error: BaseException, address: str) -> str:
    """What went wrong, of an error or of what it came from: some name nothing but the address."""
    told: BaseException | None = error
    while told is not None:
        text = " ".join(str(told).split())
        if text and text != address:
            return text
        told = told.__cause__ or told.__context__
    return "it is not there" if isinstance(error, FileNotFoundError) else type(error).__name__
