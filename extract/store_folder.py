"""The output folder while it is being filled: whose it is, which shards are there, who works on which.

    STORE/.work/settings.json   what the store is made of, written before the first shard
    STORE/.work/listing.npz     the listing's cache
    STORE/.work/locks/          one lock file per shard
    STORE/.work/present/        one for each process that works here
    STORE/.work/replacement/    with --overwrite: the new store, until it takes the place of the finished one
    STORE/.work/ready/          the same while it does

`.work` goes when the store is finished; what stays is the store alone.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from extract.same_data import Begun, begun, differences
from pipeline.latents.manifest import ShardEntry, read_manifest
from pipeline.latents.names import MANIFEST_FILE, SKIPPED_FILE, WORK_FOLDER, record_name, recorded_shards
from pipeline.latents.records import ShardRecord, read_record, skipped_lines
from pipeline.latents.store_files import READY, REPLACEMENT_LOCK, remove_files, replace_store, store_files
from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import (
    explained_writes,
    flush_folder,
    make_folder,
    read_json,
    remove_folder,
    write_bytes,
    write_json,
)
from pipeline.runtime.work_queue import Presence, exclusive, try_claim

_WAIT_FOR_MAIN_S = 60.0
_LOOK_EVERY_S = 0.5
BEGINNING = "removal"
"""The lock of the process that looks whether all is right and then begins anew (`--overwrite`)."""


def _read_latents(folder: Path) -> tuple[Mapping[str, Any], Sequence[ShardEntry]]:
    manifest = read_manifest(folder)
    return manifest.extraction, manifest.shards


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFolder:
    """A latent store, or features beside one, that is being made, or is finished."""

    path: Path
    split: str
    read: Callable[[Path], tuple[Mapping[str, Any], Sequence[ShardEntry]]] = _read_latents
    """(settings, shards) of what is finished here, from its manifest."""
    elsewhere: str = "name another --out, or "
    """What to do about other settings than those that are there, besides beginning anew."""

    @property
    def shards_on_disk(self) -> None:
        """All of them."""
        return

    @property
    def work(self) -> Path:
        return self.path / WORK_FOLDER

    @property
    def listing_cache(self) -> Path:
        return self.work / "listing.npz"

    @property
    def remote_copies(self) -> Path:
        return self.work / "remote"

    @property
    def _settings(self) -> Path:
        return self.work / "settings.json"

    @property
    def _replacement(self) -> Path:
        return self.work / "replacement"

    @property
    def _ready(self) -> Path:
        return self.work / READY

    @property
    def place(self) -> Path:
        """Where shards and records are put: here, or aside while a finished store stands here."""
        return self._replacement if self._replacement.is_dir() else self.path

    @property
    def has_manifest(self) -> bool:
        """Whether a finished store stands here, to be replaced or not."""
        return (self.path / MANIFEST_FILE).exists()

    @property
    def is_finished(self) -> bool:
        """Whether the store that is being made is finished."""
        return self.has_manifest and not self._replacement.is_dir() and not self._ready.is_dir()

    @property
    def holds_store(self) -> bool:
        """Whether a store is here, finished or not."""
        return self._settings.exists() or bool(store_files(self.path))

    def check(self) -> None:
        """Raise UserError unless the folder is absent, empty, or a store of ours."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file; name a folder for the latent store")
        try:
            found = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        except OSError as error:
            raise UserError(f"--out {self.path} cannot be read ({error.strerror}); change its rights") from error
        entries = [name for name in found if name != WORK_FOLDER]
        if entries and not self.holds_store:
            shown = ", ".join(entries[:3]) + (", …" if len(entries) > 3 else "")
            raise UserError(f"--out {self.path} holds other things ({shown}); name an empty or a new folder")

    # ---- who is here

    @contextmanager
    def occupied(self) -> Iterator[Presence]:
        """Make the folder and be known to work in it; the last process to leave a finished store cleans up."""
        is_new = not self.path.exists()
        with Presence(self.work) as here:
            with here.gate():
                if here.is_alone():
                    self._sweep()
            try:
                yield here
            finally:
                with here.last() as alone:
                    if alone and (self.is_finished or not self._settings.exists()):
                        here.remove_folder()
                        if is_new and not any(self.path.iterdir()):
                            self.path.rmdir()

    def _sweep(self) -> None:
        """Remove what killed processes left half-written."""
        for folder in (self.work, self.place / WORK_FOLDER):
            for left in folder.glob("*.partial"):
                left.unlink(missing_ok=True)

    def clean_up(self) -> None:
        """Remove what a process left that was killed right after it wrote the manifest."""
        if self.work.exists():
            with self.occupied():
                pass

    def exclusive(self, what: str) -> AbstractContextManager[None]:
        """Hold what one process at a time may do; the others wait here."""
        return exclusive(self.work / f"{what}.lock")

    # ---- of what settings

    def recorded(self) -> Mapping[str, Any] | None:
        """The settings that the store was begun with, or None before its first shard."""
        if self.is_finished:
            return dict(self.read(self.path)[0])
        return self._recorded_settings()

    def _recorded_settings(self) -> "Begun | None":
        return begun(read_json(self._settings), self._settings) if self._settings.exists() else None

    def replaces_by(self, wanted: Mapping[str, Any]) -> bool:
        """Whether a store of these settings is being made that is to replace the finished one here."""
        recorded = self._recorded_settings() if self._replacement.is_dir() else None
        if recorded is not None and differences(recorded, wanted):
            warn(
                f"an unfinished store of other settings, which is to replace this one, waits in {self._replacement}; "
                "the command that began it goes on with it, --overwrite drops it"
            )
        return recorded is not None and not differences(recorded, wanted)

    def check_settings(self, wanted: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> None:
        """Raise UserError unless a store was begun with the wanted settings, or not begun; names each difference."""
        found = [] if recorded is None else differences(recorded, wanted)
        if found:
            raise UserError(
                f"{self.path} was begun with other settings ({'; '.join(found)}); "
                f"use the same to continue it, {self.elsewhere}start anew with --overwrite"
            )

    def begin(self, settings: Mapping[str, Any], plan: str) -> None:
        """Record the settings before the first shard, or check that they are the recorded ones.

        Raises:
            UserError: they are not, or shards of another plan are there.
        """
        with self.exclusive("settings"):
            recorded = self.recorded()
            self.check_settings(settings, recorded)
            if recorded is None:
                for shard in self.done(range(sys.maxsize))[:1]:  # records whose settings were lost with the manifest
                    read_record(self.place, self.split, shard, plan=plan)
                write_json(self._settings, settings)

    # ---- shards

    def is_done(self, shard: int) -> bool:
        return self._ready.is_dir() or (self.place / record_name(self.split, shard)).exists()

    def done(self, shards: range) -> list[int]:
        """Those of the shards that have their commit record."""
        if self._ready.is_dir():
            return list(shards)
        place = self.place
        try:
            found = recorded_shards((entry.name for entry in place.iterdir()), self.split)
        except FileNotFoundError:
            if place == self.path:
                raise
            return self.done(shards)  # another process has put the new store in its place meanwhile
        return sorted(shard for shard in found if shard in shards)

    def lacks_shards(self, shards: int, *, what: str = "shards", whole: str = "the store") -> bool:
        """Whether some of so many shards are not in place; if so, says whose business they are."""
        missing = shards - len(self.done(range(shards)))
        if missing:
            say(
                f"{missing} of {shards} {what} are not in place yet: other processes are at them, or they are outside "
                f"--shard-range; whichever process makes the last one finishes {whole}"
            )
        return missing > 0

    def claim(self, shard: int) -> FileLock | None:
        """The right to make a shard, or None if it is made or another process makes it."""
        if self.is_done(shard):
            return None
        make_folder(self.work / "locks")
        lock = try_claim(self.work / "locks" / f"{shard:05d}.lock")
        if lock is not None and self.is_done(shard):
            lock.release()
            return None
        if lock is not None:
            for left in (self.place / WORK_FOLDER).glob(f"{self.split}-{shard:05d}.*.partial"):
                left.unlink(missing_ok=True)  # what a killed process left half-written
        return lock

    def publish(self, shard: int, shard_format: str) -> None:
        """It is where it belongs."""

    def forget(self, shard: int) -> None:
        """Remove the commit record of a shard that turned out not to be whole."""
        (self.place / record_name(self.split, shard)).unlink(missing_ok=True)

    def lost_shards(self) -> list[int]:
        """The shards that the manifest lists and that are not there any more, or not of their size."""
        return [
            number
            for number, shard in enumerate(self.read(self.path)[1])
            if not _has_size(self.path / shard.file, shard.bytes)
            or not _has_size(self.path / record_name(self.split, number))
        ]

    def reopen(self) -> None:
        """Make a finished store that has lost shards an unfinished one, which lacks just these."""
        with self.exclusive("settings"):
            if not self.is_finished:
                return
            settings, lost = self.recorded(), self.lost_shards()
            warn(f"{len(lost)} shards of the finished store {self.path} are gone or not of their size; made anew")
            write_json(self._settings, settings)
            for shard in lost:
                self.forget(shard)
            (self.path / MANIFEST_FILE).unlink()

    def write_skipped(self, records: Sequence[ShardRecord]) -> Path:
        """List inputs that were left out, as in a finished store."""
        path = self.place / SKIPPED_FILE
        write_bytes(path, skipped_lines(records), work_folder=self.work)
        return path

    # ---- anew

    def begin_anew(self, here: Presence, settings: Mapping[str, Any]) -> None:
        """Drop a store that is unfinished; one that is finished stands until the new one is (`put_in_place`).

        Nobody can come in meanwhile. The settings, by which the others see that they may go on (`wait_for_main`), come
        last. The listing and copies of remote tars stay, they are not the store's.

        Raises:
            UserError: another process is working here.
        """
        with here.gate():
            if not here.is_alone():
                raise UserError(
                    f"another process is writing to {self.path}; stop it before --overwrite removes its work"
                )
            recorded = self._recorded_settings() or Begun()
            self._settings.unlink(missing_ok=True)
            remove_folder(self._replacement)
            if self.has_manifest:
                make_folder(self._replacement)
            else:
                remove_files(store_files(self.path, split=recorded.split))
            write_json(self._settings, settings)

    def put_in_place(self) -> None:
        """Let the new store take the place of the old one, if it is whole; goes on where a killed process stopped."""
        if self._ready.is_dir() or (self._replacement / MANIFEST_FILE).exists():
            with self.unmoved():
                pass

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """While here, all shards and records are of one store: none takes the place of another meanwhile."""
        if not self._replacement.is_dir() and not self._ready.is_dir():
            yield
            return
        with exclusive(self.work / REPLACEMENT_LOCK):
            if (self._replacement / MANIFEST_FILE).exists():
                self._replacement.rename(self._ready)
                flush_folder(self.work)
            if self._ready.is_dir():
                replace_store(self.path, self._ready)
            yield

    def wait_for_main(self, since: float) -> None:
        """Return when the main process of this launch, which was started about then, has begun the store anew.

        Gives up when that process has not been at it for a minute, and goes on with what is there: if it is the store
        asked for, it is continued.
        """
        since += _seconds_ahead(self.path)
        end = time.monotonic() + _WAIT_FOR_MAIN_S
        while self._is_from_before(since):
            if self._is_beginning():
                end = time.monotonic() + _WAIT_FOR_MAIN_S
            if time.monotonic() > end:
                warn(f"the main process has not removed the old store in {self.path}; going on with what is there")
                return
            time.sleep(0.1)

    def wait_for_others(self) -> None:
        """Return when the store is finished, or when nobody is at work on it any more."""
        while not self.is_finished:
            with self.occupied() as here, here.gate():
                if here.is_alone():
                    return
            time.sleep(_LOOK_EVERY_S)

    def _is_from_before(self, since: float) -> bool:
        """Whether what tells that a store is here, finished or not, is older."""
        if self._settings.exists() and not _is_older(self._settings, since):
            return False
        marks = (self._settings, self.path / MANIFEST_FILE, *self.path.glob(f"{self.split}-*.json"))
        return any(_is_older(path, since) for path in marks)

    def _is_beginning(self) -> bool:
        try:
            lock = try_claim(self.work / f"{BEGINNING}.lock") if self.work.is_dir() else None
        except FileNotFoundError:
            return False
        if lock is not None:
            lock.release()
        return lock is None and self.work.is_dir()


def _seconds_ahead(folder: Path) -> float:
    """By how much the clock of a folder's disk, whose times files have, is ahead of this machine's."""
    if not folder.is_dir():
        return 0.0
    with explained_writes(folder), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime - time.time()


def _is_older(path: Path, since: float) -> bool:
    try:
        return path.stat().st_mtime < since
    except FileNotFoundError:
        return False


def _has_size(path: Path, size: int | None = None) -> bool:
    """Whether a file is there, and of that many bytes."""
    try:
        return path.stat().st_size == size if size is not None else path.is_file()
    except FileNotFoundError:
        return False
