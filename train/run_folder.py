"""A run's folder: made, claimed by one command at a time, and refused to settings that would alter its past.

`--overwrite` does not remove a run before there is another: what it consists of goes to RUN/.replaced, its settings
last, and stays there until the new run has saved a checkpoint. A kill on the way is undone by the next command: the
old run is the run until the new one's settings stand.
"""

import contextlib
import json
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.folder import CONFIG, METRICS, checkpoint_folders
from pipeline.runtime.config_files import MOST_SETTINGS, Setting, parse_settings
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import (
    explained_writes,
    flush_file,
    flush_folder,
    make_folder,
    remove,
    remove_folder,
    write_bytes,
)
from pipeline.runtime.gate import read_log, read_regular
from pipeline.runtime.work_queue import exclusive
from train.options import FREE, START, DataOptions, RunOptions, TrainOptions, plain_values

DATA_IDENTITY = "data_identity"
_OURS = ("checkpoints", "averages", "samples", "tensorboard", METRICS)
_LOCK, _REPLACED, _LEAVING = ".lock", ".replaced", ".leaving"
_LEFT_BY_A_KILL = re.compile(r"\..+\.\d+\.partial")
_OURS_WHILE_BEGINNING = re.compile(rf"\.lock|\.replaced|\.leaving|\.({CONFIG}|{METRICS})\.\d+\.partial")


def check_run(options: TrainOptions, data_identity: str) -> None:
    """Raise UserError unless the folder is empty or holds this very run (any run, with --overwrite); writes nothing.

    A run that these settings would alter is refused with every difference.
    """
    folder = options.run.out
    held = [path.name for path in folder.iterdir() if not _OURS_WHILE_BEGINNING.fullmatch(path.name)]
    if CONFIG in held:
        if not options.run.overwrite and has_learned(folder):
            _compare(folder, options, data_identity)
    elif held:
        raise UserError(
            f"--out {folder} is not empty and holds no run (no {CONFIG}, but {min(held)}); choose another --out"
        )


def has_learned(folder: Path) -> bool:
    """Whether the run has a checkpoint or has logged a step: one that has neither may as well begin with others."""
    return bool(checkpoint_folders(folder)) or (folder / METRICS).is_file()


def begin_run(options: TrainOptions, data_identity: str) -> None:
    """Write the resolved options into the checked folder; the run that --overwrite replaces is set aside first."""
    folder = options.run.out
    if options.run.overwrite and (folder / CONFIG).is_file():
        _set_aside(folder)
    header = f"# The resolved options of this run; dit-train --config {CONFIG} repeats it.\n"
    header += f"# {DATA_IDENTITY}: {data_identity}\n"
    text = yaml.safe_dump(plain_values(options) | {"overwrite": False}, sort_keys=False, allow_unicode=True)
    for place in (folder, folder / "samples", folder / "averages"):
        for left in (path for path in place.glob(".*.partial") if _LEFT_BY_A_KILL.fullmatch(path.name)):
            remove(left)
    write_bytes(folder / CONFIG, (header + text).encode())
    make_folder(folder / "checkpoints")


def _set_aside(folder: Path) -> None:
    """Move what a run consists of to RUN/.replaced; anything else stays, and so does a run that lies there already."""
    replaced = folder / _REPLACED
    with explained_writes(folder):
        if (replaced / CONFIG).is_file():  # an earlier --overwrite, which has saved nothing yet
            for name in _OURS:
                _remove(folder / name)
            return
        make_folder(replaced)
        for name in (*_OURS, CONFIG):
            if (folder / name).exists():
                (folder / name).rename(replaced / name)
        flush_folder(replaced)
        flush_folder(folder)
    if checkpoint_folders(replaced):
        say(f"the run that {folder} held stays in {replaced} until this one has saved its first checkpoint")


def _put_back(folder: Path) -> None:
    """Undo an --overwrite that was killed before the new run's settings stood."""
    replaced = folder / _REPLACED
    if not replaced.is_dir() or ((replaced / CONFIG).is_file() and (folder / CONFIG).is_file()):
        return
    with explained_writes(folder):
        for name in (*_OURS, CONFIG):
            if (replaced / name).exists():
                (replaced / name).rename(folder / name)
        flush_folder(folder)
        replaced.rmdir()


def drop_replaced(folder: Path) -> None:
    """Remove the run that --overwrite replaced, now that there is a checkpoint of the new one."""
    leaving = folder / _LEAVING
    remove_folder(leaving)
    if (folder / _REPLACED).is_dir():
        (folder / _REPLACED).rename(leaving)  # half of it must not be put back
        remove_folder(leaving)


def _remove(path: Path) -> None:
    if path.is_dir():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)


def _compare(folder: Path, options: TrainOptions, data_identity: str) -> None:
    path = folder / CONFIG
    differences = _differences(
        _text_of(path), path, options, data_identity, with_checkpoint=bool(checkpoint_folders(folder))
    )
    if differences:
        raise UserError(
            f"--out {folder} holds a run with other settings: {differences}; use the same settings to "
            f"continue it, another --out for a new run, or --overwrite to begin anew"
        )


def check_mirrored(text: str, options: TrainOptions, data_identity: str) -> None:
    """Raise UserError unless the settings of a run with checkpoints at --mirror, its config.yaml, are these."""
    url = options.run.mirror
    differences = _differences(text, f"{url}/{CONFIG}", options, data_identity, with_checkpoint=True)
    if differences:
        raise UserError(
            f"--mirror {url} holds a run with other settings: {differences}; use the same settings to continue it, or "
            f"another --mirror for a new run"
        )


def _differences(text: str, place: object, options: TrainOptions, data_identity: str, *, with_checkpoint: bool) -> str:
    """What differs from recorded settings that a run cannot go on with; empty where nothing does."""
    recorded = parse_settings(text, place)
    now = plain_values(options)
    # A flag that was not there when the run began stood at its default.
    before = plain_values(TrainOptions(data=DataOptions(latents=""), run=RunOptions(out=options.run.out))) | recorded
    free = may_change(TrainOptions, with_checkpoint=with_checkpoint)
    changed = [
        f"--{name} was {before[name]} and is now {value}"
        for name, value in now.items()
        if name not in free and before[name] != value
    ]
    marker = f"# {DATA_IDENTITY}: "
    identities = [line.removeprefix(marker) for line in text.splitlines() if line.startswith(marker)]
    if identities and identities[0] != data_identity:
        changed.append(f"the data of --latents was {recorded.get('latents')} and is now other data")
    return "; ".join(changed)


def _text_of(path: Path) -> str:
    try:
        return read_regular(path, most=MOST_SETTINGS).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as this project's settings; restore it, or choose another folder"
        ) from error


def settings_in(folder: Path) -> tuple[dict[str, Setting], str]:
    """What a run's config.yaml says, and its text.

    Raises:
        UserError: it cannot be read, or as `parse_settings`.
    """
    text = _text_of(folder / CONFIG)
    return parse_settings(text, folder / CONFIG), text


def recorded_intervals(folder: Path) -> dict[str, int]:
    """Every how many steps the run was logged and validated so far, by flag."""
    if not (folder / CONFIG).is_file():
        return {}
    values, _ = settings_in(folder)
    return {name: value for name in ("log-every", "validate-every") if type(value := values.get(name)) is int}


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process alone while the block runs.

    Raises:
        UserError: another process is training in it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file, but a run needs a folder; choose another --out")
    made = [path for path in (folder, folder / _LOCK) if not path.exists()]
    make_folder(folder)
    refusal = (
        f"another process is training in {folder}; wait for it, or choose another --out (processes of one run "
        f"must be started together, by accelerate launch or torchrun)"
    )
    with exclusive(folder / _LOCK, needed=False, refusal=refusal):
        try:
            _put_back(folder)
            yield
        finally:
            _leave_nothing(folder, made)


def _leave_nothing(folder: Path, made: list[Path]) -> None:
    """Take back the lock and the folder, as far as they were made here, where no run was begun: it was refused."""
    if not (folder / CONFIG).exists():
        with contextlib.suppress(OSError):
            if folder / _LOCK in made:
                (folder / _LOCK).unlink()
            if folder in made:
                folder.rmdir()


class MetricsFile:
    """metrics.jsonl: one JSON object per line, the line whole before the next is begun."""

    def __init__(self, folder: Path, *, after_step: int) -> None:
        """Open for appending, dropping the lines past `after_step` and a last line cut short."""
        self.path = folder / METRICS
        self.drop_after(after_step)

    def drop_after(self, step: int) -> None:
        """Drop the lines past a step that the run has rolled back behind."""
        if self.path.exists():
            write_bytes(self.path, b"".join(line + b"\n" for line, said in read_log(self.path) if said.step <= step))

    def append(self, values: Mapping[str, Any]) -> None:
        """Add one line; it outlives this process at once, and a power cut after `flush`."""
        line = json.dumps(values, allow_nan=False)
        with explained_writes(self.path), self.path.open("a") as file:
            file.write(line + "\n")

    def smallest(self, name: str) -> tuple[float, int] | None:
        """The smallest value of a number that was logged, and its step; None where it never was."""
        if not self.path.exists():
            return None
        logged = [(said.numbers, said.step) for _, said in read_log(self.path, naming=f'"{name}"')]
        return min(((numbers[name], step) for numbers, step in logged if name in numbers), default=None)

    def flush(self) -> None:
        """Make the lines survive a power cut."""
        if self.path.exists():
            flush_file(self.path)


def may_change(options_class: type, *, with_checkpoint: bool) -> set[str]:
    """The flags that may have other values when a run goes on; each field says so itself."""
    marks = (FREE, START) if with_checkpoint else (FREE,)
    names: set[str] = set()
    for name, hint in typing.get_type_hints(options_class, include_extras=True).items():
        if is_dataclass(hint):
            names |= may_change(typing.cast("type", hint), with_checkpoint=with_checkpoint)
        elif any(mark in marks for mark in getattr(hint, "__metadata__", ())):
            names.add(name.replace("_", "-"))
    return names
