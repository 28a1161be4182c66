"""The work folder of one output: its plan, and chunks of finished images that appear whole or not at all.

Chunk c holds images c·B … (c + 1)·B − 1, B the batch size. Any number of processes, started together or not, share
the work through files alone: a process claims a chunk by locking one byte of a file, and the system frees the byte
when the process ends, however it ends. So nothing waits for a process that is gone, and nothing is made twice.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes, make_folder, read_json, remove_folder, replacing, write_json

PLAN = "plan.json"
CLAIMS = "claims"
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 600.0

Arrays = dict[str, NDArray[Any]]


def work_folder_of(out: Path) -> Path:
    """Where unfinished work for `out` stands: hidden beside it, so that the last rename stays on one disk."""
    return out.with_name(f".{out.name}.work")


class WorkFolder:
    """The chunks of one plan, made and claimed by any number of processes."""

    def __init__(self, path: Path, *, chunks: int) -> None:
        """Open the folder of a plan that `begin` or `join` has found in place."""
        self.path = path
        self.chunks = chunks
        self._held: set[int] = set()
        with explained_writes(path):
            # Closing any descriptor of this file would free all of the process's claims: it is opened once.
            self._claims = os.open(path / CLAIMS, os.O_RDWR | os.O_CREAT, 0o666)

    def close(self) -> None:
        os.close(self._claims)

    def chunk_path(self, chunk: int) -> Path:
        return self.path / f"chunk-{chunk:06d}.safetensors"

    def has(self, chunk: int) -> bool:
        return self.chunk_path(chunk).exists()

    def is_open(self) -> bool:
        """Whether the output still waits to be put together."""
        return (self.path / PLAN).exists()

    def remove(self) -> None:
        """Remove the folder, its plan first: who still looks for work sees at once that none is left."""
        (self.path / PLAN).unlink(missing_ok=True)
        remove_folder(self.path)

    def missing(self) -> list[int]:
        """The chunks that are not there yet."""
        try:
            names = {path.name for path in self.path.iterdir()}
        except FileNotFoundError:  # another process has put the output together and removed the folder
            return []
        return [chunk for chunk in range(self.chunks) if self.chunk_path(chunk).name not in names]

    def claim(self, chunk: int) -> bool:
        """Whether this process alone now works on the chunk, until `release` or its end.

        Chunk number `chunks` stands for putting the output together.

        Raises:
            UserError: the file system has no locks.
        """
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, chunk)
        except OSError as error:
            if error.errno in {errno.EACCES, errno.EAGAIN}:
                return False
            raise UserError(
                f"the file system of {self.path} cannot lock files ({error.strerror}), which keeps processes from "
                f"making the same images twice; choose an --out on another disk"
            ) from error
        self._held.add(chunk)
        return True

    def release(self, chunk: int) -> None:
        fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, chunk)
        self._held.discard(chunk)

    def unclaimed(self, *, rank: int, world_size: int, wait: bool, idle: Callable[[], None]) -> Iterator[int]:
        """Each missing chunk, claimed for this process, until every chunk is there or in someone's hands.

        Process r begins at its share of the chunks and then helps the others. With `wait`, ends only when every
        chunk is there: a chunk whose process died is taken over. `idle` is called while nothing can be done.
        """
        while missing := [chunk for chunk in self.missing() if chunk not in self._held]:
            start = len(missing) * rank // world_size
            claimed = False
            for chunk in missing[start:] + missing[:start]:
                if self.has(chunk) or not self.claim(chunk):
                    continue
                if self.has(chunk) or not self.is_open():  # finished by another between the look and the claim
                    self.release(chunk)
                    continue
                claimed = True
                yield chunk
            if not claimed:
                if not wait:
                    return
                idle()
                time.sleep(POLL_SECONDS)

    def write(self, chunk: int, arrays: Arrays) -> None:
        """The chunk under its final name, flushed, or nothing; the claim ends."""
        write_arrays(self.chunk_path(chunk), arrays)
        self.release(chunk)

    def parts(self) -> Iterator[NDArray[Any]]:
        """The data of every chunk in order, one at a time."""
        for chunk in range(self.chunks):
            yield read_arrays(self.chunk_path(chunk))["data"]


def write_arrays(path: Path, arrays: Arrays) -> None:
    """One safetensors file, flushed and renamed."""
    from safetensors.numpy import save

    with replacing(path) as temporary:
        temporary.write_bytes(save(arrays))


def read_arrays(path: Path) -> Arrays:
    """The arrays of one safetensors file."""
    from safetensors.numpy import load_file

    return dict(load_file(path))


def begin(path: Path, plan: dict[str, Any], *, overwrite: bool) -> None:
    """Put the plan into the work folder, or find the same plan there already and continue.

    Raises:
        UserError: work of another plan is there and goes on, or is unfinished and `overwrite` is not set; or the
            folder cannot be written.
    """
    if (path / PLAN).exists():
        other = read_json(path / PLAN)
        if other == plan:
            return
        difference = differences(other, plan)
        if _is_worked_on(path):
            raise UserError(f"another command ({difference}) is at work in {path}; wait for it or stop it")
        if not overwrite and any(path.glob("chunk-*")):
            raise UserError(
                f"{path} holds unfinished work of another command ({difference}); "
                f"give that command again to finish it, or --overwrite to drop it"
            )
        remove_folder(path)
    make_folder(path)
    write_json(path / PLAN, plan)


def _is_worked_on(path: Path) -> bool:
    """Whether some process has claimed a chunk in the folder."""
    try:
        descriptor = os.open(path / CLAIMS, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def join(path: Path, plan: dict[str, Any], *, finished: Callable[[], bool]) -> bool:
    """Wait until the main process has put the plan there; False if the output is finished instead.

    Raises:
        UserError: neither happens within ten minutes, which only a main process that has failed explains.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if is_plan(path, plan):
            return True
        if finished():
            return False
        time.sleep(POLL_SECONDS)
    raise UserError(f"the main process has not opened {path} within {PATIENCE_SECONDS:.0f} s; start the command again")


def is_plan(path: Path, plan: dict[str, Any]) -> bool:
    """Whether the work folder is there and holds this plan."""
    return (path / PLAN).exists() and read_json(path / PLAN) == plan


def differences(found: Any, wanted: dict[str, Any]) -> str:
    """The first settings in which two plans differ, as `steps 50, not 250`."""
    old, new = dict(_leaves(found)), dict(_leaves(wanted))
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return "; ".join(f"{name} {_short(old.get(name))}, not {_short(new.get(name))}" for name in names[:3])


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
