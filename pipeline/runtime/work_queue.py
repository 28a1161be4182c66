"""Who makes what and who goes first, among processes that share a disk: exclusive locks that end with their holder.

One kind of lock (filelock's, held by the system) serves shards, chunks, run folders and cached copies:

    with exclusive(path):               wait for it, then be alone
    lock = try_claim(path)              the right to make one thing, or None where another process has it
    with Presence(folder) as here:      be known to work in a folder
        with here.gate():               be the one who decides what happens to the folder
            if here.is_alone(): …

On a disk without locks, work that is shared out by them is refused; a lock that only keeps a second command away is
gone without, and said so once (`needed=False`).
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes, make_folder

_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_POLL_SECONDS = 0.05


def try_claim(path: Path) -> FileLock | None:
    """The lock of that file, held until `release` or the end of the process; None if another process holds it.

    Raises:
        UserError: the disk has no locks.
    """
    lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        _acquire(lock, path, needed=True)
    except Timeout:
        return None
    return lock


@contextlib.contextmanager
def exclusive(path: Path, *, needed: bool = True, refusal: str | None = None) -> Iterator[None]:
    """Be alone with what the file stands for.

    Args:
        needed: whether work cannot be shared out without the lock.
        refusal: what to say, instead of waiting, where another process is there.

    Raises:
        UserError: the disk has no locks, and one is needed; or the refusal.
    """
    timeout = -1 if refusal is None else 0
    lock = FileLock(path, timeout=timeout, poll_interval=_POLL_SECONDS, thread_local=False, fallback_to_soft=False)
    try:
        _acquire(lock, path, needed=needed)
    except Timeout as error:
        raise UserError(refusal or "") from error
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, path: Path, *, needed: bool) -> None:
    try:
        with explained_writes(path):
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout) or (isinstance(error, OSError) and error.errno not in _UNSUPPORTED):
            raise
        if needed:
            raise UserError(
                f"the file system of {path.parent} cannot lock files, which keeps processes from making the same "
                "twice; give --out a local folder or one on NFS 4, Lustre (mounted with flock) or the like"
            ) from error
        warn(f"the file system of {path.parent} cannot lock files: see to it that no second command works there")


class OccupiedError(UserError):
    """Another process is at work where this one wants to be alone."""


class Presence:
    """This process among those at work in a folder, known by a lock file of its own in `FOLDER/present/`."""

    def __init__(self, folder: Path, *, alone: bool = False) -> None:
        """Come in; waits while another process decides about the folder, and makes it anew if that one removed it.

        Args:
            alone: come in only where nobody else is.

        Raises:
            OccupiedError: somebody is.
            UserError: the disk has no locks, or the folder cannot be made.
        """
        self.folder = folder
        self._others = folder / "present"
        self._lock: FileLock | None = None
        name = f"{socket.gethostname()}-{os.getpid()}-{id(self):x}.lock"
        while self._lock is None:
            make_folder(self._others)
            with contextlib.suppress(FileNotFoundError), self.gate():
                if alone and not self.is_alone():
                    raise OccupiedError(f"another process is at work in {folder}; wait for it or stop it")
                self._lock = try_claim(self._others / name)
            if self._lock is None:
                time.sleep(_POLL_SECONDS)

    def __enter__(self) -> "Presence":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Be the one who decides about the folder: nobody comes in meanwhile. The folder may be removed inside."""
        with exclusive(self.folder / "gate.lock"):
            yield

    def is_alone(self) -> bool:
        """Whether no other process is at work here; ask inside `gate`. Marks of processes that died are removed."""
        own = None if self._lock is None else Path(self._lock.lock_file)
        alone = True
        for path in self._others.glob("*.lock"):
            if path == own:
                continue
            lock = try_claim(path)
            if lock is None:
                alone = False
                continue
            path.unlink(missing_ok=True)
            lock.release()
        return alone

    def leave(self) -> None:
        """Not be at work here any more."""
        if self._lock is not None:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None
