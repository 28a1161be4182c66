"""How an output gets its name: made out of sight, flushed, and put in place whole, whatever ends the command when.

    with making(out, overwrite=overwrite) as stage:          one file, one folder, or several names together
        write(stage.place(out))                              a path to make it under
        write_json(stage.place(sidecar_of(out)), …)
                                                             here all of them appear; on an error none does

`making` claims the name for this process (another one that wants it is refused), removes what a killed one left, and
checks that the names are free. What is made lies in `.NAME.work/ready/` until a record of all names is flushed there;
from then on the next start, and every reader that calls `finish`, completes what a kill interrupted. Without
`overwrite` nothing that is there is ever replaced, also if it appeared meanwhile; with it the old one is whole under
its name until the new one is: a file is replaced by one rename, a folder by one exchange of names (Linux's renameat2;
where a system lacks it, by two renames under the record).
"""

import contextlib
import ctypes
import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import (
    explained_writes,
    flush_file,
    flush_folder,
    flush_tree,
    make_folder,
    read_json,
    remove_folder,
    write_json,
)
from pipeline.runtime.gate import typed
from pipeline.runtime.work_queue import OccupiedError, Presence, exclusive

READY = "ready"
RECORD = "publish.json"
_POLL_SECONDS = 0.2
_AT_FDCWD, NOREPLACE, EXCHANGE = -100, 1, 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def work_folder_of(out: Path) -> Path:
    """Where what belongs to `out` is made: hidden beside it, so that renames stay on one disk."""
    return out.with_name(f".{out.name}.work")


class Stage:
    """Where the parts of one output are made before they appear together under their names."""

    def __init__(self, work: Path) -> None:
        self.ready = work / READY
        self.finals: dict[Path, Path] = {}
        """{where it is made: its name}"""

    def place(self, final: Path) -> Path:
        """The path under which to make what `final` shall be: a file or a folder of its name."""
        folder = self.ready / f"{len(self.finals)}"
        make_folder(folder)
        made = folder / final.name
        self.finals[made] = final
        return made


@contextlib.contextmanager
def making(
    out: Path, *, overwrite: bool, beside: tuple[Path, ...] = (), flag: str = "--overwrite", wait: bool = False
) -> Iterator[Stage]:
    """Make an output and publish it when the block ends without an error.

    Args:
        out: its name, which the claim and the work folder are named after.
        overwrite: whether to replace what is there.
        beside: further names that must be free, too.
        flag: how a user says so.
        wait: for another command that is making it, instead of being refused.

    Raises:
        UserError: something of these names is there, another command is making it, or the disk is full.
    """
    work = work_folder_of(out)
    make_folder(out.parent)
    with claimed(work, wait=wait):
        finish(out)
        if not overwrite:
            refuse_taken((out, *beside), flag)
        stage = Stage(work)
        remove_folder(stage.ready)
        yield stage
        publish(work, stage, overwrite=overwrite, flag=flag)


@contextlib.contextmanager
def claimed(work: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that makes what the work folder is of; the folder goes when this one leaves it.

    Raises:
        UserError: another process is at it, and it is not waited for.
    """
    with _alone_in(work, wait=wait) as here:
        try:
            yield
        finally:
            if not (work / READY / RECORD).exists():
                with here.gate():
                    here.remove_folder()


def _alone_in(work: Path, *, wait: bool) -> Presence:
    while True:
        try:
            return Presence(work, alone=True)
        except OccupiedError as error:
            if not wait:
                out = work.with_name(work.name.removeprefix(".").removesuffix(".work"))
                raise UserError(f"another command is making {out}; wait for it or stop it") from error
            time.sleep(_POLL_SECONDS)


def refuse_taken(names: tuple[Path, ...], flag: str = "--overwrite") -> None:
    """Raise UserError unless nothing of these names is there; an empty folder counts as nothing."""
    for name in names:
        if os.path.lexists(name) and not (name.is_dir() and not any(name.iterdir())):
            raise UserError(f"{name} is there already; pass {flag} to replace it, or choose another name")


def publish(work: Path, stage: Stage, *, overwrite: bool, flag: str = "--overwrite") -> None:
    """Flush everything that was made and let it appear under its names, all or nothing.

    Raises:
        UserError: a name is taken and not to be replaced, or the disk is full; nothing has changed then.
    """
    pairs = list(stage.finals.items())
    if not overwrite:
        refuse_taken(tuple(final for _, final in pairs), flag)
    with explained_writes(pairs[0][1]):
        for made, _ in pairs:
            _flush(made)
    names = [
        {"made": str(made.relative_to(work)), "final": os.path.relpath(final, work), "inode": made.stat().st_ino}
        for made, final in pairs
    ]
    with _one_at_a_time(work):
        write_json(stage.ready / RECORD, {"overwrite": overwrite, "names": names})
        flush_folder(work)  # so that no name outlives a power cut without the record
        flush_folder(work.parent)
        taken = _put_all(work)
    if taken is not None:
        raise UserError(f"{taken} appeared meanwhile; pass {flag} to replace it, or choose another name")


def sweep(out: Path) -> None:
    """Complete what a killed command had begun to publish under this name, and remove what else it left."""
    finish(out)
    if work_folder_of(out).exists():
        with contextlib.suppress(UserError), claimed(work_folder_of(out)):  # a live one keeps its own
            pass


def finish(out: Path) -> None:
    """Complete what a killed command had begun to publish under this name; readers call it before they look.

    Raises:
        UserError: there is something to complete, and no permission to do so.
    """
    work = work_folder_of(out)
    if (work / READY / RECORD).exists():
        with contextlib.suppress(FileNotFoundError), _one_at_a_time(work):  # all is done, and the folder gone
            if (work / READY / RECORD).exists():
                _put_all(work)


def _one_at_a_time(work: Path) -> contextlib.AbstractContextManager[None]:
    return exclusive(work / "publish.lock", needed=False)


class _Name(msgspec.Struct, frozen=True):
    """Where a part of an output is made, and its name beside the work folder: never one elsewhere."""

    made: Annotated[str, msgspec.Meta(pattern=r"^ready/[0-9]+/(?!\.{1,2}\Z)[^/\0]+\Z")]
    final: Annotated[str, msgspec.Meta(pattern=r"^\.\./(?!\.{1,2}\Z)[^/\0]+\Z")]
    inode: int


class _Record(msgspec.Struct, frozen=True):
    overwrite: bool
    names: tuple[_Name, ...]


def _put_all(work: Path) -> Path | None:
    """Give everything in the record its name, as far as it has none yet, and forget the record.

    Returns a name that is taken though nothing is to be replaced: then all that was put is taken back.
    """
    ready = work / READY
    record = typed(read_json(ready / RECORD), _Record, f"{ready / RECORD} is damaged", advice="remove its folder")
    done: list[tuple[Path, Path]] = []
    taken: Path | None = None
    for name in record.names:
        made, final = work / name.made, Path(os.path.normpath(work / name.final))
        if _inode(final) != name.inode and os.path.lexists(made):  # else its user has removed it since
            try:
                _put(made, final, overwrite=record.overwrite)
            except FileExistsError:
                taken = final
                break
        done.append((made, final))
    if taken is not None:
        for made, final in done:
            final.rename(made)
    _drop(ready)
    return taken


def _inode(path: Path) -> int | None:
    """Which file or folder it is; a rename does not change that."""
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


def _drop(ready: Path) -> None:
    """Forget the record, then what it was of: the old outputs, which have changed places with the new ones."""
    (ready / RECORD).unlink(missing_ok=True)
    flush_folder(ready)
    remove_folder(ready)


def _flush(made: Path) -> None:
    if made.is_dir():
        flush_tree(made)
    else:
        flush_file(made)
    flush_folder(made.parent)


def _put(made: Path, final: Path, *, overwrite: bool) -> None:
    """Give one finished thing its name.

    Raises:
        FileExistsError: something is there, and it is not to be replaced.
    """
    with explained_writes(final):
        if made.is_dir():
            _put_folder(made, final, overwrite=overwrite)
        elif overwrite:
            made.replace(final)
        elif not renameat2(made, final, NOREPLACE):
            os.link(made, final)  # refuses what is there, as a plain rename does not
            made.unlink()
        flush_folder(final.parent)


def _put_folder(made: Path, final: Path, *, overwrite: bool) -> None:
    if final.is_dir() and not any(final.iterdir()):
        made.rename(final)  # an empty folder is nothing
    elif not os.path.lexists(final):
        if not renameat2(made, final, NOREPLACE):
            made.rename(final)
    elif not overwrite:
        raise FileExistsError(errno.EEXIST, "it is there already", str(final))
    elif not renameat2(made, final, EXCHANGE):
        old = made.with_name(f"old-{made.name}")
        remove_folder(old)
        final.rename(old)
        made.rename(final)


def renameat2(source: Path, target: Path, how: int) -> bool:
    """Linux's rename that exchanges two names, or refuses to replace; False where the system or the disk lacks it."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), how) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(target))
