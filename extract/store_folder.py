"""The output folder while it is being filled: whose it is, which shards are there, who works on which.

    STORE/.work/settings.json   what the store is made of, written before the first shard
    STORE/.work/listing.npz     the listing's cache
    STORE/.work/locks/          one lock file per shard, and one that every process holds while it works here

`.work` goes when the store is finished; what stays is the store alone.
"""

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.latents.manifest import MANIFEST_FILE, read_manifest
from pipeline.latents.records import SKIPPED_FILE, ShardRecord, read_record, skipped_lines
from pipeline.latents.writer import WORK_FOLDER, remove_files, store_files
from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, read_json, remove_folder, write_bytes, write_json
from pipeline.runtime.work_queue import Presence, exclusive, try_claim

_WAIT_FOR_MAIN_S = 60.0
REMOVAL = "removal"
"""The turn of the process that looks whether all is right and then removes a store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFolder:
    """A latent store that is being made, or is finished."""

    path: Path
    split: str

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
    def is_finished(self) -> bool:
        return (self.path / MANIFEST_FILE).exists()

    @property
    def _settings(self) -> Path:
        return self.work / "settings.json"

    def check(self) -> None:
        """Nothing, if the folder is absent, empty, or a store of ours.

        Raises:
            UserError: it is a file, or holds anything else.
        """
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

    @property
    def holds_store(self) -> bool:
        """Whether a store is here, finished or not."""
        return self._settings.exists() or bool(store_files(self.path))

    def recorded(self) -> Mapping[str, Any] | None:
        """The settings that the store was begun with, or None before its first shard."""
        if self.is_finished:
            return dict(read_manifest(self.path).get("extraction", {}))
        return self._recorded_settings()

    def _recorded_settings(self) -> dict[str, Any] | None:
        return dict(read_json(self._settings)) if self._settings.exists() else None

    @contextmanager
    def occupied(self) -> Iterator[Presence]:
        """Make the folder and mark this process as working in it; the last one to leave a finished store cleans up."""
        is_new = not self.path.exists()
        with Presence(self.work) as here:
            make_folder(self.work / "locks")
            try:
                yield here
            finally:
                if self.is_finished or not self._settings.exists():
                    self._clean_up(here, is_new=is_new)

    def _clean_up(self, here: Presence, *, is_new: bool) -> None:
        """Remove the work folder, unless another process is at work in it."""
        with here.gate():
            if here.is_alone():
                remove_folder(self.work)
                if is_new and not any(self.path.iterdir()):
                    self.path.rmdir()

    def tidy(self) -> None:
        """Remove what a process left that was killed right after it wrote the manifest."""
        if self.work.exists():
            with self.occupied():
                pass

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Hold what one process at a time may do; the others wait here."""
        with exclusive(self.work / f"{what}.lock"):
            yield

    def check_settings(self, wanted: Mapping[str, Any]) -> None:
        """Nothing, if the store was begun with these settings, or not begun.

        Raises:
            UserError: it was begun with others; names each, with both values.
        """
        recorded = self.recorded()
        if recorded is None:
            return
        differences = [
            f"--{key} {_short(recorded.get(key))} there, {_short(wanted[key])} now"
            for key in wanted
            if recorded.get(key) != wanted[key]
        ]
        if differences:
            raise UserError(
                f"{self.path} was begun with other settings ({'; '.join(differences)}); "
                "use the same to continue it, name another --out, or start anew with --overwrite"
            )

    def begin(self, settings: Mapping[str, Any], plan: str) -> None:
        """Record the settings before the first shard, or check that they are the recorded ones.

        Raises:
            UserError: they are not, or shards of another plan are there.
        """
        with self.turn("settings"):
            self.check_settings(settings)
            if self.recorded() is None:
                for shard in self.done(range(sys.maxsize))[:1]:  # records whose settings were lost with the manifest
                    read_record(self.path, self.split, shard, plan=plan)
                write_json(self._settings, settings)

    def lost_shards(self) -> list[int]:
        """The shards that the manifest lists and that are not there any more, or not of their size."""
        return [
            number
            for number, shard in enumerate(read_manifest(self.path).shards)
            if not _has_size(self.path / shard.file, shard.bytes)
            or not _has_size(self.path / f"{self.split}-{number:05d}.json")
        ]

    def reopen(self) -> None:
        """Make a finished store that has lost shards an unfinished one, which lacks just these."""
        with self.turn("settings"):
            if not self.is_finished:
                return
            settings, lost = self.recorded(), self.lost_shards()
            warn(f"{len(lost)} shards of the finished store {self.path} are gone or not of their size; made anew")
            write_json(self._settings, settings)
            for shard in lost:
                self.forget(shard)
            (self.path / MANIFEST_FILE).unlink()

    def is_done(self, shard: int) -> bool:
        return (self.path / f"{self.split}-{shard:05d}.json").exists()

    def done(self, shards: range) -> list[int]:
        """Those of the shards that have their commit record."""
        pattern = re.compile(rf"{re.escape(self.split)}-(\d{{5,}})\.json")
        numbers = {int(match[1]) for entry in self.path.iterdir() if (match := pattern.fullmatch(entry.name))}
        return sorted(shard for shard in numbers if shard in shards)

    def claim(self, shard: int) -> FileLock | None:
        """The right to make a shard, or None if it is made or another process makes it."""
        if self.is_done(shard):
            return None
        lock = try_claim(self.work / "locks" / f"{shard:05d}.lock")
        if lock is not None and self.is_done(shard):
            lock.release()
            return None
        if lock is not None:
            self._remove_leftovers(shard)
        return lock

    def _remove_leftovers(self, shard: int) -> None:
        """Remove what a killed process left half-written of this shard."""
        for path in self.work.glob(f"{self.split}-{shard:05d}.*.partial"):
            path.unlink(missing_ok=True)

    def forget(self, shard: int) -> None:
        """Remove the commit record of a shard that turned out not to be whole."""
        (self.path / f"{self.split}-{shard:05d}.json").unlink(missing_ok=True)

    def write_skipped(self, records: Sequence[ShardRecord]) -> Path:
        """List inputs that were left out, as in a finished store."""
        path = self.path / SKIPPED_FILE
        write_bytes(path, skipped_lines(records), work_folder=self.work)
        return path

    def remove_store(self, presence: Presence) -> None:
        """Remove a store that is here, and nothing else (`--overwrite`). Nobody can begin a new one meanwhile.

        What tells that the others may go on (`wait_for_removal`) goes last. The listing stays, it is not the store's.

        Args:
            presence: this process's mark (`occupied`).

        Raises:
            UserError: another process is working in it.
        """
        with presence.gate():
            if not presence.is_alone():
                raise UserError(
                    f"another process is writing to {self.path}; stop it before --overwrite removes its work"
                )
            settings = self._recorded_settings() or {}
            remove_files(store_files(self.path, split=settings.get("split")))
            for left in self.work.glob("*.partial"):
                left.unlink(missing_ok=True)
            self._settings.unlink(missing_ok=True)

    def wait_for_removal(self, since: float) -> None:
        """Return when the store from before that time is gone, which another process of this launch sees to.

        Gives up when that process has not been at it for a minute, and goes on with what is there: if it is the store
        asked for, it is continued.
        """
        end = time.monotonic() + _WAIT_FOR_MAIN_S
        while any(_is_older(path, since) for path in self._marks()):
            if self._is_being_removed():
                end = time.monotonic() + _WAIT_FOR_MAIN_S
            if time.monotonic() > end:
                warn(f"the main process has not removed the old store in {self.path}; going on with what is there")
                return
            time.sleep(0.1)

    def _marks(self) -> Iterator[Path]:
        """What tells that a store is here, finished or not."""
        yield self.path / MANIFEST_FILE
        yield self._settings
        yield from self.path.glob(f"{self.split}-*.json")

    def _is_being_removed(self) -> bool:
        lock = None if not self.work.exists() else try_claim(self.work / f"{REMOVAL}.lock")
        if lock is not None:
            lock.release()
        return lock is None and self.work.exists()


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


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text if len(text) <= 60 else f"{text[:57]}…"
