"""Who makes what and who goes first, among processes that share a disk: exclusive locks that end with their holder.

One kind of lock (filelock's, held by the system) serves shards, chunks, run folders and cached copies:

    with exclusive(path):               wait for it, then be alone
    lock = try_claim(path)              the right to make one thing, or None where another process has it
    with Presence(folder) as here:      be known to work in a folder
        with here.gate():               be the one who decides what happens to the folder
            if here.is_alone(): …
        with here.last() as alone:      go, and the last one out may take the folder away
            if alone: here.remove_folder()

On a disk without locks, work that is shared out by them is refused; a lock that only keeps a second command away is
gone without, and that is said once (`needed=False`).
"""

import contextlib
import errno
import functools
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes, make_folder, remove

_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_POLL_SECONDS, _PATIENCE = 0.05, 20
_GATE = "gate.lock"


def try_claim(path: Path, *, needed: bool = True) -> FileLock | None:
    """The lock of that file, held until `release` or the end of the process; None if another process holds it.

    Args:
        path: the file, which is made; its folder must be there.
        needed: whether work cannot be shared out without the lock.

    Raises:
        UserError: the disk has no locks, and one is needed.
    """
    lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        _acquire(lock, path, needed=needed)
    except Timeout:
        return None
    return lock


@contextlib.contextmanager
def exclusive(path: Path, *, needed: bool = True, refusal: str | None = None) -> Iterator[None]:
    """Be alone with what the file stands for.

    Args:
        path: the file, which is made; its folder must be there.
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
                "twice; choose a local folder or one on NFS 4, Lustre (mounted with flock) or the like"
            ) from error
        _say_without_locks(path.parent)


@functools.cache
def _say_without_locks(folder: Path) -> None:
    warn(f"the file system of {folder} cannot lock files: see to it that no second command works there")


class OccupiedError(UserError):
    """Another process is at work where this one wants to be alone."""


class Presence:
    """This process among those at work in a folder, known by a lock file of its own in `FOLDER/present/`."""

    def __init__(self, folder: Path, *, alone: bool = False) -> None:
        """Come in; waits while another process decides about the folder.

        Args:
            folder: where; it is made.
            alone: come in only where nobody else is. No work is shared then, so a disk without locks will do.

        Raises:
            OccupiedError: somebody is.
            UserError: the disk has no locks, or the folder cannot be made.
        """
        self.folder = folder
        self._mark = folder / "present" / f"{socket.gethostname()}-{os.getpid()}-{id(self):x}.lock"
        self._lock: FileLock | None = None
        self._needed = not alone
        with self.gate():
            if alone and not self.is_alone():
                self.leave()
                raise OccupiedError(f"another process is at work in {folder}; wait for it or stop it")

    def __enter__(self) -> "Presence":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Be the one who decides about the folder: nobody comes in or decides meanwhile.

        Comes in anew where the last one there, who did not see this process coming, has removed the folder.
        """
        with contextlib.ExitStack() as held:
            tries = 0
            while not self._come_in(held):
                tries += 1
                time.sleep(_POLL_SECONDS)
                if tries % _PATIENCE == 0:
                    make_folder(self._mark.parent)  # says why, if it cannot be made at all
            yield

    def _come_in(self, held: contextlib.ExitStack) -> bool:
        try:
            with explained_writes(self.folder):
                self._mark.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as gate:
                gate.enter_context(exclusive(self.folder / _GATE, needed=self._needed))
                if not self._mark.exists():
                    self.leave()
                    self._lock = try_claim(self._mark, needed=self._needed)
                held.push(gate.pop_all())
        except (FileNotFoundError, FileExistsError):  # the folder is being removed
            return False
        return True

    @contextlib.contextmanager
    def last(self) -> Iterator[bool]:
        """Go; whether nobody else is here. Who is not the last has left before another can ask.

        Were it to ask and leave in two steps, two that go at once would each see the other, and both leave everything.
        """
        with self.gate():
            alone = self.is_alone()
            if not alone:
                self.leave()
            yield alone

    def is_alone(self) -> bool:
        """Whether no other process is at work here; ask inside `gate`. Marks of processes that died are removed."""
        alone = True
        for path in self._mark.parent.glob("*.lock"):
            if path == self._mark:
                continue
            lock = try_claim(path, needed=self._needed)
            if lock is None:
                alone = False
                continue
            path.unlink(missing_ok=True)
            lock.release()
        return alone

    def clear(self, *, but: Callable[[Path], bool] = lambda _: False) -> None:
        """Remove everything in the folder except some, and what tells who is here; ask inside `gate`."""
        for entry in list(self.folder.iterdir()):
            if entry.name not in {_GATE, self._mark.parent.name} and not but(entry):
                remove(entry)

    def remove_folder(self) -> None:
        """Remove the folder; ask inside `gate`, which goes last: nobody comes in while the rest goes."""
        self.clear()
        remove(self._mark.parent)
        remove(self.folder / _GATE)
        with contextlib.suppress(OSError):  # somebody is coming in, into a folder that has nothing in it
            self.folder.rmdir()

    def leave(self) -> None:
        """Not be at work here any more."""
        if self._lock is not None:
            self._mark.unlink(missing_ok=True)
            self._lock.release()
            self._lock = None
