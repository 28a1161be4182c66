"""The output folder while it is being filled: whose it is, which shards are there, who works on which.

    STORE/.work/settings.json   what the store is made of, written before the first shard
    STORE/.work/listing.npz     the listing's cache
    STORE/.work/locks/          one lock file per shard, and one that every process holds while it works here

`.work` goes when the store is finished; what stays is the store alone.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.locks import Lock, locked, try_lock
from pipeline.console import warn
from pipeline.errors import UserError
from pipeline.files import make_folder, read_json, remove_folder, write_bytes, write_json
from pipeline.latents.manifest import MANIFEST_FILE
from pipeline.latents.records import SKIPPED_FILE, ShardRecord, skipped_lines
from pipeline.latents.writer import WORK_FOLDER

_WAIT_FOR_MAIN_S = 60.0


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
        if entries and not self._settings.exists() and not self._holds_store():
            shown = ", ".join(entries[:3]) + (", …" if len(entries) > 3 else "")
            raise UserError(f"--out {self.path} holds other things ({shown}); name an empty or a new folder")

    def _holds_store(self) -> bool:
        manifest = read_json(self.path / MANIFEST_FILE) if self.is_finished else None
        return isinstance(manifest, dict) and manifest.get("format") == "dit-latents"

    def recorded(self) -> Mapping[str, Any] | None:
        """The settings that the store was begun with, or None before its first shard."""
        if self.is_finished:
            return dict(read_json(self.path / MANIFEST_FILE).get("extraction", {}))
        return dict(read_json(self._settings)) if self._settings.exists() else None

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Make the folder and mark this process as working in it; the last one to leave a finished store tidies up."""
        is_new = not self.path.exists()
        presence = self._enter()
        try:
            yield
        finally:
            if (self.is_finished or not self._settings.exists()) and presence.take_alone():
                remove_folder(self.work)
                if is_new and not any(self.path.iterdir()):
                    self.path.rmdir()
            presence.release()

    def _enter(self) -> Lock:
        """A shared lock on the presence file; tried again if a leaving process removes that file meanwhile."""
        while True:
            make_folder(self.work / "locks")
            path = self.work / "presence.lock"
            try:
                presence = try_lock(path, shared=True)
            except FileNotFoundError:
                continue
            if presence is not None and presence.is_at(path):
                return presence
            if presence is not None:
                presence.release()
            time.sleep(0.05)

    def tidy(self) -> None:
        """Remove what a process left that was killed right after it wrote the manifest."""
        if self.work.exists():
            with self.occupied():
                pass

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Hold what one process at a time may do; the others wait here."""
        with locked(self.work / f"{what}.lock"):
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

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Record the settings before the first shard, or check that they are the recorded ones."""
        with self.turn("settings"):
            self.check_settings(settings)
            if self.recorded() is None:
                write_json(self._settings, settings)

    def is_done(self, shard: int) -> bool:
        return (self.path / f"{self.split}-{shard:05d}.json").exists()

    def done(self, shards: range) -> list[int]:
        """Those of the shards that have their commit record."""
        pattern = re.compile(rf"{re.escape(self.split)}-(\d{{5,}})\.json")
        numbers = {int(match[1]) for entry in self.path.iterdir() if (match := pattern.fullmatch(entry.name))}
        return [shard for shard in shards if shard in numbers]

    def claim(self, shard: int) -> Lock | None:
        """The right to make a shard, or None if it is made or another process makes it."""
        if self.is_done(shard):
            return None
        lock = try_lock(self.work / "locks" / f"{shard:05d}.lock")
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

    def remove_store(self) -> None:
        """Remove a store that is here, and nothing else (`--overwrite`). Nobody can begin a new one meanwhile.

        Raises:
            UserError: another process is working in it.
        """
        if not self.path.exists():
            return
        make_folder(self.work)
        presence = try_lock(self.work / "presence.lock")
        if presence is None:
            raise UserError(f"another process is writing to {self.path}; stop it before --overwrite removes its work")
        ours = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*-\d{5,}\.(safetensors|tar|json)")
        (self.path / MANIFEST_FILE).unlink(missing_ok=True)
        for path in list(self.path.iterdir()):
            if ours.fullmatch(path.name) or path.name == SKIPPED_FILE:
                path.unlink()
        remove_folder(self.work)
        presence.release()

    def wait_for_removal(self, since: float) -> None:
        """Return when the store from before that time is gone, which another process of this launch sees to.

        Gives up after a minute and goes on with what is there: if it is the store that is asked for, it is continued.
        """
        end = time.monotonic() + _WAIT_FOR_MAIN_S
        while any(_is_older(path, since) for path in (self.path / MANIFEST_FILE, self._settings)):
            if time.monotonic() > end:
                warn(f"the main process has not removed the old store in {self.path}; going on with what is there")
                return
            time.sleep(0.1)


def _is_older(path: Path, since: float) -> bool:
    try:
        return path.stat().st_mtime < since
    except FileNotFoundError:
        return False


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text if len(text) <= 60 else f"{text[:57]}…"
