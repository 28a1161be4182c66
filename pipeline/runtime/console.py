"""How every command speaks: options in, progress and notes on stderr, one clear sentence for a mistake.

Exit status: 0 done; 2 the user's input is wrong; 128 + signal after a saved stop; 1 anything else.
"""

import contextlib
import errno
import io
import logging
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar, cast

from tqdm import tqdm

from pipeline.runtime.cli import SeenConfig, nearest, parse_options
from pipeline.runtime.errors import UserError, explain_path_error
from pipeline.runtime.processes import (
    Interrupted,
    bound_spinning,
    end_in_group,
    in_process_group,
    launch,
    second_signal_ends,
    stop_signals,
)

__all__ = ["nearest", "printable", "progress", "refuse_unless", "run_command", "say", "show", "warn"]

Options = TypeVar("Options")
# What a stream answers that leads nowhere any more.
_GONE = {errno.EIO, errno.EPIPE, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ESTALE}
# C0 and C1 controls, line and paragraph separators, marks of direction, lone surrogates.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_MOST_OF_A_LINE = 10_000
_OF_ITS_END = 2_000
"""Characters of a line for people that are shown: names in it may have a million, and the advice stands last."""
_log = logging.getLogger("dit")


class _BesideBars(logging.Handler):
    """Writes each message above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        _write_line(self.format(record))
        sys.stderr.flush()


def _write_line(text: str) -> None:
    """A line on stderr; on a terminal the bars make room for it."""
    if sys.stderr.isatty():
        tqdm.write(text, file=sys.stderr)
    else:
        sys.stderr.write(f"{text}\n")


class _LineByLine(tqdm):  # type: ignore[type-arg]
    """A bar for a log: each look at it is a line of its own, without a picture of the bar or a carriage return."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Writes what has changed since the last look."""
        last = ""

        def show(text: str) -> None:
            nonlocal last
            if text.strip() not in {"", last}:
                last = text.strip()
                file.write(f"{last}\n")
                file.flush()

        return show

    def close(self) -> None:
        """The last look; not tqdm's own, which ends the line once more."""
        if not self.disable:
            self.display()
            self.delay = math.inf
        super().close()


def run_command(
    options_class: type[Options],
    run: Callable[[Options], int | None],
    *,
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    presets: Path | None = None,
    seen_config: SeenConfig = lambda _, values: values,
) -> int:
    """Parse the command line, run the command, and give its exit status; a `UserError` is printed, not raised."""
    bound_spinning()
    _configure_log()
    arguments = sys.argv[1:] if argv is None else argv
    with _lasting_streams() as output:
        try:
            with _signals_interrupt():
                try:
                    options = parse_options(
                        options_class,
                        arguments,
                        prog=prog,
                        description=description,
                        presets=presets,
                        seen_config=seen_config,
                    )
                except UserError:
                    if launch().is_main:
                        raise
                    return 2  # every process was given the same words, and one answer to them is enough
                status = run(options) or 0
                output.flush()
        except BaseException as error:
            said = _say_ending(prog, error)
            if not in_process_group():
                if said is None:
                    raise
                return said
            if said is None:
                traceback.print_exc()
            end_in_group(1 if said is None else said)
        return status or int(output.lost)


def _say_ending(prog: str, error: BaseException) -> int | None:
    """Say why the command ends; its exit status, or None for a fault of the program's."""
    if isinstance(error, UserError):
        return _refused(prog, str(error), 2)
    if isinstance(error, OSError) and (explained := explain_path_error(error)) is not None:
        return _refused(prog, *explained)
    if isinstance(error, Interrupted):
        _write_line(f"{prog}: stopped by {error}; run the same command again to continue")
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        _write_line(f"{prog}: interrupted; run the same command again to continue")
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit) and in_process_group():  # the main process says it for all
        return error.code if isinstance(error.code, int) else 0
    return None


def _refused(prog: str, sentence: str, status: int) -> int:
    process = ""
    with contextlib.suppress(UserError):
        place = launch()
        process = f" (process {place.rank} of {place.world_size})" if place.world_size > 1 else ""
    _write_line(f"{prog}{process}: error: {_shown(sentence)}")
    return status


class _LastingStream:
    """A standard stream that may go away: what is written to it after that is dropped, and nothing else ends.

    A terminal that is closed answers EIO, a pipe that nobody reads any more EPIPE.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self.lost = False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            if not self.lost:
                action()
        except ValueError:
            if not self._stream.closed:
                raise
            self.lost = True
        except OSError as error:
            self._lose()
            # Notes are worth no run that goes well; a result that cannot be written where it should go is an error.
            if self._name == "standard output" and error.errno not in _GONE:
                raise OSError(error.errno, error.strerror, self._name) from error

    def _lose(self) -> None:
        """Send what is in buffers still, and what libraries write, nowhere."""
        self.lost = True
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def _lasting_streams() -> Iterator[_LastingStream]:
    """Standard output and error that survive what they lead to; gives the output."""
    # A stream that was closed from the start leaves its number to the next file that is opened, and then libraries
    # write their warnings into that.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    kept = sys.stdout, sys.stderr
    for stream in kept:
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks is written as its number
            stream.reconfigure(errors="backslashreplace")
    output = _LastingStream(kept[0] or Path(os.devnull).open("w"), "standard output")  # noqa: SIM115 - until the end
    notes = _LastingStream(kept[1] or Path(os.devnull).open("w"), "standard error")  # noqa: SIM115
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", notes)
    try:
        yield output
    finally:
        sys.stdout, sys.stderr = kept


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGHUP end the command as Ctrl-C does: work is cleaned up, and a line says how to go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:  # cleaning up is not interrupted again; it has 5 s from the second signal
            interrupted = True
            raise Interrupted(number)

    previous = {number: signal.signal(number, interrupt) for number in stop_signals() - {signal.SIGINT}}
    try:
        with second_signal_ends():
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _configure_log() -> None:
    if not _log.handlers:
        _log.addHandler(_BesideBars())
        _log.setLevel(logging.INFO)
        _log.propagate = False


def printable(text: str) -> str:
    """One line of text that does to a terminal nothing but to appear: names in it are a stranger's.

    Control characters (an escape sequence recolours, moves or retitles), line ends, what turns the direction of
    writing, and bytes that are no text are written as Python writes them in a string.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if _CONTROLS.fullmatch(character) else character
        for character in text
    )


def _shown(line: str) -> str:
    """A line as it is written: printable, and without its middle where it is too long to be read."""
    return _without_middle(printable(_without_middle(line)))


def _without_middle(line: str) -> str:
    if len(line) <= _MOST_OF_A_LINE:
        return line
    return f"{line[: _MOST_OF_A_LINE - _OF_ITS_END]} … {line[-_OF_ITS_END:]}"


def say(*lines: str, every_process: bool = False) -> None:
    """Lines for people, from the main process only, or from whichever has something to say."""
    if every_process or launch().is_main:
        _log.info("%s", "\n".join(map(_shown, lines)))


def warn(message: str) -> None:
    """A line for people that begins with "warning:", from the main process only."""
    if launch().is_main:
        _log.warning("warning: %s", _shown(message))


def refuse_unless(anyway: bool, sentence: str, advice: str = "") -> None:
    """What is more likely a mistake than a wish: a warning where the user says --anyway, else the end.

    Raises:
        UserError: the sentence and the advice, if the user does not say so.
    """
    if not anyway:
        raise UserError(f"{sentence}{advice}")
    warn(sentence)


def show(lines: Iterable[str]) -> None:
    """Lines of a result, on standard output."""
    for line in lines:
        sys.stdout.write(f"{_shown(line)}\n")


def progress(total: int | None, *, unit: str, description: str, initial: int = 0) -> "tqdm[Any]":
    """A progress bar on stderr: a live one on a terminal, a line now and then in a log, none off the main process.

    Args:
        total: how many units there are in all.
        unit: what is counted, in the plural.
        initial: how many were done before this run.
    """
    live = sys.stderr.isatty()
    known = "{percentage:.0f}%, {n_fmt} of {total_fmt}{unit}, {remaining} to go" if total else "{n_fmt}{unit}"
    return (tqdm if live else _LineByLine)(
        total=total,
        initial=initial,
        desc=description,
        unit=f" {unit}",
        file=sys.stderr,
        disable=not launch().is_main,
        mininterval=0.2 if live else 30.0,
        maxinterval=1.0 if live else 60.0,
        bar_format=None if live else f"{{desc}}: {known}, {{elapsed}} so far, {{rate_noinv_fmt}}{{postfix}}",
        dynamic_ncols=live,
        smoothing=0.1,
    )
