"""Checkpoints that appear whole or not at all, written by a thread while training goes on."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint import checkpoint_folders
from pipeline.console import say, warn
from pipeline.errors import UserError
from pipeline.files import explained_writes, make_folder, publish_folder, remove_folder
from train.hardware import Hardware
from train.options import RunOptions
from train.state import Snapshot, TrainState, find_damage, is_amid_skips, take_snapshot, write_snapshot


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:07d}"


class Saver:
    """Takes a snapshot, which is all that training waits for, and writes it in the background.

    One checkpoint is written at a time; the next one waits for it. An error while writing is raised at the next call.
    """

    def __init__(self, options: RunOptions, hardware: Hardware, info: Mapping[str, Any]) -> None:
        self._paused_seconds = 0.0
        self.saved_step: int | None = None
        self._options, self._hardware, self._info = options, hardware, info
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Save this step, once; every process calls it.

        Args:
            wait: until the checkpoint is in place, as before leaving.
        """
        if self.saved_step != state.step:
            started = time.perf_counter()
            self.finish()
            snapshot = take_snapshot(state, keep=self._hardware.is_main)
            paused = time.perf_counter() - started
            self._paused_seconds += paused
            self.saved_step = state.step
            if self._hardware.is_main:
                self._thread = threading.Thread(target=self._write, args=(snapshot, paused), name="checkpoint writer")
                self._thread.start()
        if wait:
            self.finish()
            self._hardware.wait()

    def take_pause(self) -> float:
        """How long training stood still for checkpoints since this was last asked, in seconds."""
        paused, self._paused_seconds = self._paused_seconds, 0.0
        return paused

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Nothing, if every checkpoint so far could be written; does not wait for one.

        Raises:
            UserError: one could not.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot, paused: float) -> None:
        started = time.perf_counter()
        final = checkpoint_path(self._options.out, snapshot.step)
        temporary = final.with_name(f".{final.name}.partial")
        try:
            remove_folder(temporary)
            with explained_writes(final):
                make_folder(temporary)
                write_snapshot(temporary, snapshot, self._info)
            remove_folder(final)  # only a checkpoint that this run has gone back behind can be there
            publish_folder(temporary, final)
            prune(self._options)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that trains
            remove_folder(temporary)
            self._error = error
            return
        written = time.perf_counter() - started
        say(f"checkpoint {final.name}: training paused {paused:.2f} s, written in {written:.1f} s")


def prune(options: RunOptions) -> None:
    """Remove checkpoints beyond the newest `keep_last`, but none at a multiple of `keep_every`.

    While steps are being skipped, the newest one from before that stays too: it is what the run goes back to.
    """
    folders = checkpoint_folders(options.out)
    if not options.keep_last or len(folders) <= options.keep_last:
        return
    doomed = [folder for step, folder in folders if not (options.keep_every and step % options.keep_every == 0)]
    doomed = [folder for folder in doomed if folder not in {kept for _, kept in folders[-options.keep_last :]}]
    if all(is_amid_skips(folder) for _, folder in folders if folder not in doomed):
        spared = next((folder for folder in reversed(doomed) if not is_amid_skips(folder)), None)
        doomed = [folder for folder in doomed if folder != spared]
    for folder in doomed:
        discard(folder)


def discard(folder: Path) -> None:
    """Remove a checkpoint; under another name first, since a half-removed folder must not pass for one."""
    doomed = folder.with_name(f".{folder.name}.partial")
    remove_folder(doomed)
    folder.rename(doomed)
    remove_folder(doomed)


def sweep(run: Path) -> None:
    """Remove what killed processes left behind."""
    for folder in (run / "checkpoints").glob(".step-*.partial"):
        remove_folder(folder)


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint whose every byte is as written, or None in a run that has none yet.

    Damaged ones that are newer are set aside with a clear line.

    Raises:
        UserError: there are checkpoints and none is whole; all stay as they are.
    """
    damaged: list[tuple[Path, str]] = []
    for _, folder in reversed(all_checkpoints(run)):
        damage = find_damage(folder)
        if damage is None:
            _set_aside(damaged)
            return folder
        damaged.append((folder, damage))
    if damaged:
        folder, damage = damaged[0]
        raise UserError(
            f"{folder} is damaged: {damage}; and {run} holds no other checkpoint that is whole: restore one, or begin "
            f"anew with --overwrite"
        )
    return None


def all_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is named like a checkpoint, whole or not, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted((int(path.name[5:]), path) for path in folders)


def _set_aside(damaged: list[tuple[Path, str]]) -> None:
    for folder, damage in damaged:
        aside = folder.with_name(f"damaged-{folder.name}")
        remove_folder(aside)
        folder.rename(aside)
        warn(f"{folder} is damaged: {damage}; set aside as {aside.name}, going back to the checkpoint before it")
