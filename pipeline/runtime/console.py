"""How every command speaks: options in, progress and notes on stderr, one clear sentence for a mistake.

Exit status: 0 done; 2 the user's input is wrong; 128 + signal after a saved stop; 1 anything else.
"""

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.runtime.cli import nearest, parse_options
from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import launch

__all__ = ["nearest", "progress", "run_command", "say", "warn"]

Options = TypeVar("Options")
# What a path that a user gave can be wrong about, wherever it is first looked at.
_PATHS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
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
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with _signals_interrupt():
            try:
                options = parse_options(options_class, arguments, prog=prog, description=description, presets=presets)
            except UserError:
                if launch().is_main:
                    raise
                return 2  # every process was given the same words, and one answer to them is enough
            return run(options) or 0
    except UserError as error:
        return _refused(prog, str(error))
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _PATHS or error.filename is None:
            raise
        return _refused(prog, f"{error.filename} cannot be used ({error.strerror}); change the path or its rights")
    except _InterruptedError as stop:
        tqdm.write(f"{prog}: stopped by {stop}; run the same command again to continue", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        tqdm.write(f"{prog}: interrupted; run the same command again to continue", file=sys.stderr)
        return 128 + signal.SIGINT


def _refused(prog: str, sentence: str) -> int:
    process = ""
    with contextlib.suppress(UserError):
        place = launch()
        process = f" (process {place.rank} of {place.world_size})" if place.world_size > 1 else ""
    tqdm.write(f"{prog}{process}: error: {sentence}", file=sys.stderr)
    return 2


class _InterruptedError(BaseException):
    """A signal came while nothing watched for it with a `StopRequest`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end the command as Ctrl-C does: work folders are tidied, and a line says how to go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise _InterruptedError(number)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _configure_log() -> None:
    if not _log.handlers:
        _log.addHandler(_BesideBars())
        _log.setLevel(logging.INFO)
        _log.propagate = False


def say(message: str, *, every_process: bool = False) -> None:
    """A line for people, from the main process only, or from whichever has something to say."""
    if every_process or launch().is_main:
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
