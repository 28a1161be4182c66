"""Locks between processes that share an output folder: held by the kernel, so a killed process never leaves one."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes

_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that this process holds until `release`, or until it ends."""

    descriptor: int

    def release(self) -> None:
        os.close(self.descriptor)

    def is_at(self, path: Path) -> bool:
        """Whether the locked file still has that name; another process may have removed it."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), path.stat())
        except FileNotFoundError:
            return False

    def take_alone(self) -> bool:
        """Turn a shared lock into an exclusive one; False (and the lock may be lost) if others hold it too."""
        return _flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def share(self) -> None:
        """Turn an exclusive lock into a shared one."""
        _flock(self.descriptor, fcntl.LOCK_SH)


def try_lock(path: Path, *, shared: bool = False) -> Lock | None:
    """The lock of that file, or None if another process holds it in a way that excludes this one."""
    return _lock(path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of that file, exclusively, after waiting for it."""
    lock = _lock(path, fcntl.LOCK_EX)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


def _lock(path: Path, mode: int) -> Lock | None:
    with explained_writes(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    if _flock(descriptor, mode):
        return Lock(descriptor)
    os.close(descriptor)
    return None


def _flock(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise UserError(
                "the output folder is on a file system without locks; give --out a local folder or one on NFS 4, "
                "Lustre (mounted with flock) or the like"
            ) from error
        raise
    return True
