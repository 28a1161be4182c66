"""How every command speaks: options in, progress and notes on stderr, one clear sentence for a mistake.

Exit status: 0 done; 2 the user's input is wrong; 128 + signal after a saved stop; 1 anything else.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.options import nearest, parse_options
from pipeline.processes import launch

__all__ = ["nearest", "progress", "run_command", "say", "warn"]

Options = TypeVar("Options")
_log = logging.getLogger("dit")


class _BesideBars(logging.Handler):
    """Writes each message above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


def run_command(
    options_class: type[Options],
    run: Callable[[Options], int | None],
    *,
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    presets: Path | None = None,
) -> int:
    """Parse the command line, run the command, and give its exit status; a `UserError` is printed, not raised."""
    _configure_log()
    try:
        place = launch()
        arguments = sys.argv[1:] if argv is None else argv
        options = parse_options(options_class, arguments, prog=prog, description=description, presets=presets)
        return run(options) or 0
    except UserError as error:
        process = f" (process {place.rank} of {place.world_size})" if place.world_size > 1 else ""
        tqdm.write(f"{prog}{process}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        tqdm.write(f"{prog}: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _configure_log() -> None:
    if not _log.handlers:
        _log.addHandler(_BesideBars())
        _log.setLevel(logging.INFO)
        _log.propagate = False


def say(message: str) -> None:
    """A line for people, from the main process only."""
    if launch().is_main:
        _log.info("%s", message)


def warn(message: str) -> None:
    """A line for people that begins with "warning:", from the main process only."""
    if launch().is_main:
        _log.warning("warning: %s", message)


def progress(total: int | None, *, unit: str, description: str, initial: int = 0) -> "tqdm[Any]":
    """A progress bar on stderr: a live one on a terminal, a line now and then in a log, none off the main process.

    Args:
        total: how many units there are in all.
        unit: what is counted, in the plural.
        initial: how many were done before this run.
    """
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=f" {unit}",
        file=sys.stderr,
        disable=not launch().is_main,
        mininterval=0.2 if live else 10.0,
        maxinterval=1.0 if live else 20.0,
        dynamic_ncols=live,
        smoothing=0.1,
    )
