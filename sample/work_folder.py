"""The work folder of one output: its plan, and chunks of finished images that appear whole or not at all.

Chunk c holds images c·B … (c + 1)·B − 1, B the batch size. Any number of processes, started together or not, share the
work through files alone (`pipeline.runtime.work_queue`): a claim ends with its process, so nothing waits for one that
is gone and nothing is made twice. Every chunk carries the plan's digest and its own checksum: a part of something else,
or a damaged one, is never taken and simply made again.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, replacing, write_json
from pipeline.runtime.gate import check_regular, parse_json
from pipeline.runtime.work_queue import Presence, try_claim

PLAN = "plan.json"
CLAIMS = "claims"
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 600.0

Arrays = dict[str, NDArray[Any]]


class WorkFolder:
    """The chunks of one plan, made and claimed by any number of processes."""

    def __init__(self, path: Path, plan: dict[str, Any], *, chunks: int, here: Presence) -> None:
        """Work in the folder of a plan that `begin` or `join` has found in place."""
        self.path = path
        self.chunks = chunks
        self._digest = _digest_of(plan)
        self._here = here
        self._held: dict[int, FileLock] = {}
        self._found: set[int] = set()

    def close(self) -> None:
        """Leave; what came into the folder while another took it away with its finished output goes too."""
        for chunk in list(self._held):
            self.release(chunk)
        if self.path.exists() and not self.is_open():
            leave_nothing(self._here)
        else:
            self._here.leave()

    def chunk_path(self, chunk: int) -> Path:
        return self.path / f"chunk-{chunk:06d}.safetensors"

    def has(self, chunk: int) -> bool:
        """Whether a chunk of this plan is there; its contents are looked at by `drop_damaged`."""
        if chunk not in self._found and _seal_of(self.chunk_path(chunk)).get("plan") == self._digest:
            self._found.add(chunk)
        return chunk in self._found and self.chunk_path(chunk).exists()

    def is_open(self) -> bool:
        """Whether the output still waits to be put together."""
        return (self.path / PLAN).exists()

    def remove(self, *, unless_shared: bool = False) -> None:
        """Remove the folder, its plan first: who still looks for work sees at once that none is left.

        Args:
            unless_shared: leave, and leave it to the others, where some are at work here.
        """
        with self._here.last() if unless_shared else self._here.gate() as alone:
            if alone or not unless_shared:
                (self.path / PLAN).unlink(missing_ok=True)
                self._here.remove_folder()

    def missing(self) -> list[int]:
        """The chunks that are not there yet; none where another process has put the output together."""
        return [chunk for chunk in range(self.chunks) if not self.has(chunk)] if self.is_open() else []

    def claim(self, chunk: int) -> bool:
        """Whether this process alone now works on the chunk, until `release` or its end.

        Chunk number `chunks` stands for putting the output together.

        Raises:
            UserError: the file system has no locks.
        """
        if chunk in self._held:
            return True
        try:
            (self.path / CLAIMS).mkdir(exist_ok=True)
            lock = try_claim(self.path / CLAIMS / f"{chunk:06d}.lock")
        except FileNotFoundError:  # the folder has gone with its finished output
            return False
        if lock is not None:
            self._held[chunk] = lock
        return lock is not None

    def release(self, chunk: int) -> None:
        lock = self._held.pop(chunk, None)
        if lock is not None:
            lock.release()

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
        self.write_part(self.chunk_path(chunk).name, arrays)
        self.release(chunk)

    def write_part(self, name: str, arrays: Arrays) -> None:
        """One safetensors file of the folder, sealed with the plan's digest and its own checksum."""
        from safetensors.numpy import save

        seal = {"plan": self._digest, "sha256": _checksum(arrays)}
        with replacing(self.path / name) as temporary:
            temporary.write_bytes(save(arrays, metadata=seal))

    def read_part(self, name: str) -> Arrays | None:
        """The arrays of such a file; None where it is missing, damaged, or part of another plan."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.path / name
        try:
            seal, arrays = _seal_of(path), dict(load_file(path))
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        return arrays if seal == {"plan": self._digest, "sha256": _checksum(arrays)} else None

    def drop_damaged(self, *, together: str | None = None) -> int:
        """Remove every chunk that is not as it was written, so that it is made again; how many there were.

        Args:
            together: a part that was made with chunk 0, and is made again with it.
        """
        bad = [chunk for chunk in range(self.chunks) if self.read_part(self.chunk_path(chunk).name) is None]
        if together is not None and self.read_part(together) is None:
            bad = sorted({0, *bad})
        for chunk in bad:
            self._found.discard(chunk)
            self.chunk_path(chunk).unlink(missing_ok=True)
        return len(bad)

    def parts(self) -> Iterator[NDArray[Any]]:
        """The data of every chunk in order, one at a time.

        Raises:
            UserError: one was damaged since `drop_damaged` looked.
        """
        for chunk in range(self.chunks):
            arrays = self.read_part(self.chunk_path(chunk).name)
            if arrays is None:
                raise UserError(f"{self.chunk_path(chunk)} was changed just now; run the same command again")
            yield arrays["data"]


def _digest_of(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _checksum(arrays: Arrays) -> str:
    """The SHA-256 over every array's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}\0{arrays[name].dtype}\0{list(arrays[name].shape)}\0".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data.cast("B") if arrays[name].size else b"")
    return digest.hexdigest()


def _seal_of(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; nothing where there is no sound header."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(length, 1 << 20)), path)
    except (OSError, UserError):
        return {}
    seal = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return seal if isinstance(seal, dict) else {}


def begin(path: Path, plan: dict[str, Any], *, chunks: int, overwrite: bool) -> WorkFolder:
    """The work folder with the plan in it: a new one, or what a command with the same plan has begun.

    Raises:
        UserError: work of another plan is there and goes on, or is unfinished and `overwrite` is not set; or the
            folder cannot be written.
    """
    here = Presence(path)
    try:
        with here.gate():
            if _plan_in(path) != plan:
                _make_room(path, plan, here, overwrite=overwrite)
                write_json(path / PLAN, plan)
    except BaseException:
        here.leave()
        raise
    return WorkFolder(path, plan, chunks=chunks, here=here)


def _make_room(path: Path, plan: dict[str, Any], here: Presence, *, overwrite: bool) -> None:
    """Drop what is there of another plan, if that is right."""
    other = _plan_in(path)
    difference = "its plan is damaged" if other is None else differences(other, plan)
    if not here.is_alone():
        raise UserError(f"another command ({difference}) is at work in {path}; wait for it or stop it")
    if other is not None and not overwrite and any(path.glob("chunk-*")):
        raise UserError(
            f"{path} holds unfinished work of another command ({difference}); "
            f"give that command again to finish it, or --overwrite to drop it"
        )
    (path / PLAN).unlink(missing_ok=True)
    digest = _digest_of(plan)
    here.clear(but=lambda part: _seal_of(part).get("plan") == digest)


def _plan_in(path: Path) -> Any:
    """The plan of a work folder; None where there is none that can be read."""
    with contextlib.suppress(UserError):
        return read_json(path / PLAN)
    return None


def join(path: Path, plan: dict[str, Any], *, chunks: int, finished: Callable[[], bool]) -> WorkFolder | None:
    """The work folder, once the main process has put the plan there; None if the output is finished instead.

    Raises:
        UserError: neither happens within ten minutes, which only a main process that has failed explains.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if _plan_in(path) == plan:
            here = Presence(path)
            if _plan_in(path) == plan:
                return WorkFolder(path, plan, chunks=chunks, here=here)
            leave_nothing(here)  # the others have put the output together just now, and removed the folder
        if finished():
            return None
        time.sleep(POLL_SECONDS)
    raise UserError(f"the main process has not opened {path} within {PATIENCE_SECONDS:.0f} s; start the command again")


def leave_nothing(here: Presence) -> None:
    """Leave a work folder, and take it away where nobody is left and nothing was begun."""
    with here.last() as alone:
        if alone and not (here.folder / PLAN).exists():
            here.remove_folder()
    here.leave()


def is_plan(path: Path, plan: dict[str, Any]) -> bool:
    """Whether the work folder is there and holds this plan."""
    return bool(_plan_in(path) == plan)


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
