"""Which checkpoints a run holds: where they lie, which are whole, which one to go on from, and which go."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.checkpoint.folder import STATE_FILES, checkpoint_folders, checkpoint_name, find_damage
from pipeline.checkpoint.snapshots import discard_snapshots_after
from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import remove_folder
from pipeline.runtime.gate import parse_json, read_regular
from train.options import RunOptions
from train.run_folder import drop_replaced


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / checkpoint_name(step)


def clean_up(options: RunOptions, *, spared: int | None = None) -> None:
    """Remove what the newest checkpoint makes superfluous; what cannot go stays until the next time, with a warning.

    Args:
        spared: the step of one that is being copied.
    """
    try:
        if checkpoint_folders(options.out):
            drop_replaced(options.out)
        prune(options, spared=spared)
    except OSError as error:
        warn(f"an old checkpoint stays for now: {error.filename} cannot be removed ({error.strerror})")


def prune(options: RunOptions, *, spared: int | None = None) -> None:
    """Remove the checkpoints that nothing keeps, but for one that is spared."""
    folders = dict(checkpoint_folders(options.out))
    for step in superfluous(options, list(folders), lambda step: is_amid_skips(folders[step])):
        if step != spared:
            discard(folders[step])


def superfluous(options: RunOptions, steps: Sequence[int], is_amid: Callable[[int], bool]) -> list[int]:
    """Those of a run's checkpoints beyond the newest `keep_last`, but none at a multiple of `keep_every`.

    While steps are being skipped, the newest one from before that stays too: it is what the run goes back to.

    Args:
        options: what is kept.
        steps: the steps of all checkpoints, rising.
        is_amid: whether steps had just been skipped when one was taken.
    """
    if not options.keep_last or len(steps) <= options.keep_last:
        return []
    older = steps[: -options.keep_last]
    to_delete = [step for step in older if not (options.keep_every and step % options.keep_every == 0)]
    if all(is_amid(step) for step in steps if step not in to_delete):
        kept = next((step for step in reversed(to_delete) if not is_amid(step)), None)
        to_delete = [step for step in to_delete if step != kept]
    return to_delete


def discard(folder: Path) -> None:
    """Remove a checkpoint; under another name first, since a half-removed folder must not pass for one."""
    leaving = folder.with_name(f".{folder.name}.partial")
    remove_folder(leaving)
    folder.rename(leaving)
    remove_folder(leaving)


def discard_after(run: Path, step: int) -> None:
    """Remove the checkpoints, and the snapshots of averages, of what was rolled back behind."""
    discard_snapshots_after(run, step)
    for number, folder in checkpoint_folders(run, whole=False):
        if number > step:
            discard(folder)


def is_amid_skips(folder: Path) -> bool:
    """Whether steps had just been skipped when the checkpoint was taken, or it does not tell."""
    path = folder / "state" / "trainer.json"
    return tells_skips(read_regular(path) if path.is_file() else None)


def tells_skips(trainer: bytes | None) -> bool:
    """Whether a checkpoint's trainer.json says that steps had just been skipped, or does not tell."""
    try:
        return float(parse_json(trainer or b"", Path("trainer.json"))["skipped_in_a_row"]) > 0
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        return True


def sweep(run: Path) -> None:
    """Remove what killed processes left behind."""
    for folder in (run / "checkpoints").glob(".step-*.partial"):
        remove_folder(folder)


def why_not_resumable(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None if every one is as it was written."""
    return find_damage(folder) if (folder / STATE_FILES).exists() else f"{STATE_FILES} is missing"


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint whose every byte is as written, or None in a run that has none yet.

    Damaged ones that are newer are set aside with a clear line.

    Raises:
        UserError: there are checkpoints and none is whole; all stay as they are.
    """
    damaged: list[tuple[Path, str]] = []
    for _, folder in reversed(checkpoint_folders(run, whole=False)):
        damage = why_not_resumable(folder)
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


def newest_good(run: Path) -> Path | None:
    """The newest whole checkpoint from before the skipped steps; if all were taken amid such, the newest whole one.

    Skipped steps leave the weights alone, so that one is good too; it only may stand close before the trouble.
    """
    newest = newest_sound(run)
    before = (folder for _, folder in reversed(checkpoint_folders(run, whole=False)) if not is_amid_skips(folder))
    return next((folder for folder in before if why_not_resumable(folder) is None), newest)


def _set_aside(damaged: list[tuple[Path, str]]) -> None:
    for folder, damage in damaged:
        aside = folder.with_name(f"damaged-{folder.name}")
        remove_folder(aside)
        folder.rename(aside)
        warn(f"{folder} is damaged: {damage}; set aside as {aside.name}, going back to the checkpoint before it")
