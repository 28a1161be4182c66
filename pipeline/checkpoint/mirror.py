"""A copy of a run behind a URL: kept up in the background while it is trained, and gone on from on another machine.

What goes up: config.yaml, metrics.jsonl, samples/, averages/ and checkpoints/. Of a checkpoint the weights go first
and state/files.json, by which it counts, last; it is removed the other way round. So a kill at any moment leaves whole
checkpoints, and parts that count for nothing and go at the next start. What was put is remembered: a listing that
lags can hide a checkpoint from a start, which then goes on from the one before, and nothing else.
"""

import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from pipeline.checkpoint.folder import (
    CONFIG,
    METRICS,
    STATE_FILES,
    checkpoint_folders,
    checkpoint_name,
    recorded_files,
    step_of,
)
from pipeline.checkpoint.remote import whole_steps
from pipeline.checkpoint.snapshots import snapshots
from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, publish_folder, remove_folder, write_bytes
from pipeline.runtime.remote_files import DamagedError, UrlFolder

_TRAINER: Final = "state/trainer.json"

Rule = Callable[[Sequence[int], Callable[[int], bytes | None]], Collection[int]]
"""(steps of checkpoints, what reads one's trainer.json) → those that nothing keeps."""


class Mirror:
    """A run's copy; one thread brings it up to date when it is woken."""

    def __init__(self, url: str, run: Path, superfluous: Rule) -> None:
        """Raise UserError if there is no such kind of URL, or none that takes files."""
        self.far, self.run = UrlFolder(url), run
        self.far.check_writable()
        self.at_work: int | None = None
        """The step of the checkpoint that is going up, which must not be removed meanwhile."""
        self._superfluous = superfluous
        self._whole: dict[int, bytes | None] = {}
        """By step of the checkpoints that count there: the contents of state/files.json, once they are known."""
        self._sent: dict[str, tuple[int, int]] = {}
        """(mtime, size) of small files as they were put."""
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # ---- going on from it

    def fetch(self, check: Callable[[str], None], *, overwrite: bool) -> None:
        """Bring the newest whole checkpoint here, with the settings and the log, if it is newer than what is here.

        Args:
            check: raises UserError unless the settings of the run there are those that are wanted.
            overwrite: whether a run is to begin anew, which is refused where another one is there.

        Raises:
            UserError: no checkpoint there is whole, or the server cannot be reached.
        """
        settings = self.far.read(CONFIG)
        if settings is None:
            return
        if overwrite:
            raise UserError(
                f"--mirror {self.far.url} holds a run, and --overwrite removes nothing there; name another --mirror, "
                "or remove that one first"
            )
        names = self.far.names()
        steps = whole_steps(names)
        if not steps:
            return
        check(settings.decode(errors="replace"))
        local = max((step for step, _ in checkpoint_folders(self.run)), default=-1)
        for step in reversed(steps):
            if step <= local:
                return
            try:
                self._fetch_checkpoint(step, settings)
            except DamagedError as error:
                warn(f"{error}; going back to the checkpoint before it")
                continue
            say(f"going on from {self.far.describe(checkpoint_name(step))}")
            return
        raise UserError(f"{self.far.url} holds no checkpoint that is whole; restore one, or name another --mirror")

    def _fetch_checkpoint(self, step: int, settings: bytes) -> None:
        final = self.run / checkpoint_name(step)
        temporary = final.with_name(f".{final.name}.partial")
        listing = self.far.read(f"{checkpoint_name(step)}/{STATE_FILES}")
        if listing is None:
            raise DamagedError(f"{self.far.describe(checkpoint_name(step))} is listed, but gone")
        remove_folder(temporary)
        make_folder(temporary / "state")
        write_bytes(temporary / STATE_FILES, listing)
        for name, known in (recorded_files(temporary) or {}).items():
            make_folder((temporary / name).parent)
            self.far.fetch(f"{checkpoint_name(step)}/{name}", temporary / name, size=known.bytes, sha256=known.sha256)
        metrics = self.far.read(METRICS)
        write_bytes(self.run / CONFIG, settings)
        if metrics is not None:
            write_bytes(self.run / METRICS, metrics)
        remove_folder(final)
        publish_folder(temporary, final)

    # ---- keeping it up

    def begin(self) -> None:
        """Put the settings there, and see what is there; from here on the thread waits to be woken.

        Raises:
            UserError: nothing can be put there.
        """
        self._send(self.run / CONFIG)
        names = self.far.names()
        self._whole = dict.fromkeys(whole_steps(names))
        for name, size in names.items():
            path = self.run / name
            if name.startswith("samples/") and path.is_file() and path.stat().st_size == size:
                self._sent[name] = _mark(path)
        for step in {step for name in names if (step := step_of(name)) is not None} - self._whole.keys():
            self._drop(step)  # what was going up when a process was killed
        self._thread = threading.Thread(target=self._work, name="mirror")
        self._thread.start()
        self.wake()

    def wake(self) -> None:
        """Let the thread bring up what is new."""
        self._calls.put(True)

    def close(self) -> None:
        """End the thread, after what it is at."""
        if self._thread is not None:
            self._calls.put(False)
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Bring everything up and end.

        Raises:
            UserError: that cannot be done; what is there is whole.
        """
        self.close()
        self._bring_up()
        say(f"all of it is at {self.far.url}")

    def _work(self) -> None:
        while self._calls.get():
            try:
                self._bring_up()
            except (UserError, OSError) as error:
                warn(f"the copy at --mirror is behind: {error}; trying again after the next checkpoint")

    def _bring_up(self) -> None:
        for path in self._small_files():
            self._send(path)
        self._send_averages()
        while (step := self._next()) is not None:
            self._send_checkpoint(step)
        self._drop_superfluous()

    def _small_files(self) -> Iterator[Path]:
        yield self.run / CONFIG
        yield self.run / METRICS
        yield from sorted((self.run / "samples").glob("[!.]*"))

    def _send(self, path: Path) -> None:
        """Put a small file, if it is another one than what was put; of a log that is being written the whole lines."""
        name = path.relative_to(self.run).as_posix()
        if not path.is_file() or self._sent.get(name) == _mark(path):
            return
        mark, data = _mark(path), path.read_bytes()
        self.far.put(name, data[: data.rfind(b"\n") + 1] if name == METRICS else data)
        self._sent[name] = mark

    def _send_averages(self) -> None:
        """Put snapshots of averages, each one's record last."""
        for one in snapshots(self.run):
            record = one.path.with_name(f"{one.path.name}.json")
            name = record.relative_to(self.run).as_posix()
            if self._sent.get(name) == _mark(record):
                continue
            mark = _mark(record)
            if self.far.read(name) != record.read_bytes():
                self.far.remove(name)
                self.far.put_all({name.removesuffix(".json"): one.path, name: record})
            self._sent[name] = mark

    def _next(self) -> int | None:
        """The newest checkpoint that is here and not there, and that the rules keep."""
        here = dict(checkpoint_folders(self.run))
        dropped = self._superfluous(sorted(here.keys() | self._whole.keys()), self._trainer)
        missing = [step for step, folder in here.items() if step not in dropped and not self._has(step, folder)]
        return max(missing, default=None)

    def _has(self, step: int, folder: Path) -> bool:
        """Whether that very checkpoint is there; after a return to an earlier step another one may be."""
        if step not in self._whole:
            return not (folder / STATE_FILES).is_file()
        if self._whole[step] is None:
            self._whole[step] = self.far.read(f"{checkpoint_name(step)}/{STATE_FILES}")
        return self._whole[step] == (folder / STATE_FILES).read_bytes()

    def _trainer(self, step: int) -> bytes | None:
        path = self.run / checkpoint_name(step) / _TRAINER
        return path.read_bytes() if path.is_file() else self.far.read(f"{checkpoint_name(step)}/{_TRAINER}")

    def _send_checkpoint(self, step: int) -> None:
        self.at_work = step
        folder = self.run / checkpoint_name(step)
        try:
            if self._whole.pop(step, None) is not None:
                self.far.remove(f"{checkpoint_name(step)}/{STATE_FILES}")
            listing = (folder / STATE_FILES).read_bytes()
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file()]
            self.far.put_all({f"{checkpoint_name(step)}/{name}": folder / name for name in sorted(names, key=_order)})
            self._whole[step] = listing
        except FileNotFoundError:  # the run has gone back behind it, or keeps it no longer
            self._drop(step)
            return
        finally:
            self.at_work = None
        say(f"checkpoint {folder.name} is at {self.far.url}")

    def _drop_superfluous(self) -> None:
        """Remove there what the rules do not keep, and what the run has gone back behind."""
        newest = max((step for step, _ in checkpoint_folders(self.run)), default=None)
        if newest is None:
            return
        for step in sorted(self._whole):
            if step > newest:
                self._drop(step)
        for step in sorted(self._superfluous(sorted(self._whole), self._trainer)):
            self._drop(step)

    def _drop(self, step: int) -> None:
        self._whole.pop(step, None)
        self.far.remove(f"{checkpoint_name(step)}/{STATE_FILES}")
        self.far.remove_folder(checkpoint_name(step))


def _order(name: str) -> tuple[bool, bool, bool, str]:
    """Weights, the optimizer, settings, and last what makes the checkpoint count."""
    return name == STATE_FILES, name == "config.json", name.startswith("state/"), name


def _mark(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_mtime_ns, about.st_size
