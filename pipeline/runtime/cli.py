"""Options as frozen dataclasses: read from the command line and from YAML, written down again as flags.

A configuration file is a list of flags written down: every key is a flag's name, and the file's values go
through the same parser as the command line, so that both give the same checks and the same messages.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import tyro

from pipeline.runtime.config_files import as_words, find_config, read_config
from pipeline.runtime.described import described, real, type_and_extras
from pipeline.runtime.errors import UserError
from pipeline.runtime.other_names import advice_for

Options = TypeVar("Options")
_BOX = "─│╭╮╰╯"
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_HOME = re.compile(r"(?:^|(?<=[=,]))~[\w.-]*(?=/|$)")
_GOOD_MATCH = 0.85

SeenConfig = Callable[[Path, dict[str, Any]], dict[str, Any]]
"""(file, {flag: value} as it says them) → what counts."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)  # annotations are hashed: by identity, as this holds dicts
class StandsFor:
    """Annotated to a flag each of whose values stands for values of other flags."""

    flags: Mapping[str, Mapping[str, Any]]
    """{value: {flag: its value}}."""


class _Flag(NamedTuple):
    """An option as far as words on a command line go."""

    kind: Any
    """Its type, None included where it may be that."""
    extras: tuple[Any, ...]
    """What is annotated to it."""

    @property
    def positional(self) -> bool:
        return tyro.conf.Positional in self.extras


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates that look very much like the name, best first, for "did you mean"; often none."""
    by_lower = {str(candidate).lower(): str(candidate) for candidate in candidates}
    lower = name.lower()
    swapped = [key for key in by_lower if len(key) == len(lower) and sorted(key) == sorted(lower)]
    same_length = [key for key in by_lower if len(key) == len(lower) >= 4]
    mistyped = [key for key in same_length if sum(a != b for a, b in zip(key, lower, strict=True)) == 1]
    found = difflib.get_close_matches(lower, by_lower, n=count, cutoff=_GOOD_MATCH)
    return [by_lower[key] for key in dict.fromkeys([*swapped, *mistyped, *found])][:count]


def flag_values(options: Any) -> dict[str, Any]:
    """Every option as {flag name without dashes: value}, nested groups flattened, in the order of the fields."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            values.update(flag_values(value))
        else:
            values[_flag_name(field.name)] = list(value) if isinstance(value, tuple) else value
    return values


def parse_options(
    options_class: type[Options],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    presets: Path | None = None,
    seen_config: SeenConfig = lambda _, values: values,
) -> Options:
    """The options of one command line; `--config FILE.yaml` fills in what the command line does not say.

    A `~` at the beginning of any value is the home folder, from the command line and from files alike.

    Args:
        presets: folder of YAML files whose stems `--config` takes as names.
        seen_config: is shown every file that --config names, and gives what is to be taken of it.

    Raises:
        UserError: an unknown flag or key, a value of another type, a missing flag.
        SystemExit: with status 0, after --help.
    """
    flags = dict(_flags(options_class))
    configs, arguments = _take_configs(list(arguments))
    from_files: list[str] = []
    for config in configs:
        written = _config_arguments(find_config(config, presets), flags, prog=prog, seen_config=seen_config)
        from_files += [*_stood_for(written, flags), *written]
    if _bare_words(arguments, flags):  # the command line overrides the file
        from_files = [argument for argument in from_files if argument.startswith("-")]
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name != "--help":
            _check_flag(name, flags, f"unknown flag {name}", prog=prog)
    words = [_expand_home(word) for word in (*from_files, *_stood_for(arguments, flags), *arguments)]
    shown = _with_config(typing.cast("Any", options_class))
    return real(options_class, _tyro(shown, words, prog=prog, description=description).options)


def _stood_for(words: Sequence[str], flags: Mapping[str, _Flag]) -> list[str]:
    """What the words' flags like --blocks stand for, as words to put before them: a flag given beside them wins."""
    said: list[str] = []
    for name, (_, extras) in flags.items():
        for bundle in (extra for extra in extras if isinstance(extra, StandsFor)):
            values = [
                word.partition("=")[2] if "=" in word else "".join(words[place + 1 : place + 2])
                for place, word in enumerate(words)
                if word.partition("=")[0] == f"--{name}"
            ]
            for flag, value in bundle.flags.get(values[-1], {}).items() if values else ():
                said += as_words(_flag_name(flag), value, *flags[_flag_name(flag)], Path(f"--{name}"))
    return said


def _expand_home(word: str) -> str:
    """The word with the home folder in place of a `~` that begins it, its value, or a part between commas."""
    return _HOME.sub(lambda found: str(Path(found[0]).expanduser()) if _has_home(found[0]) else found[0], word)


def _has_home(tilde: str) -> bool:
    try:
        Path(tilde).expanduser()
    except RuntimeError:  # nobody of that name
        return False
    return True


@functools.cache
def _with_config(options_class: type) -> type:
    """The options and, for the help text alone, --config."""
    help_line = (
        "YAML file that sets any of these flags by name; the command line overrides it. May be given several times: "
        "later files override earlier ones."
    )
    config = tyro.conf.arg(help=help_line, metavar="FILE", help_behavior_hint="(default: none)")
    return dataclasses.make_dataclass(
        "Command",
        [
            ("options", Annotated[described(options_class), tyro.conf.arg(name="", help="")]),
            ("config", Annotated[str | None, config], dataclasses.field(default=None)),
        ],
        frozen=True,
        kw_only=True,
    )


def _tyro(wrapper: type, arguments: list[str], *, prog: str, description: str) -> Any:
    messages = io.StringIO()
    if os.environ.get("NO_COLOR"):  # https://no-color.org, which tyro does not ask
        tyro._experimental_options["ansi_codes"] = False
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                wrapper,
                args=arguments,
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_sentence(messages.getvalue(), prog)) from None


def _one_sentence(boxed: str, prog: str) -> str:
    """tyro's boxed message as one line: the lines of its first section, without the frame and a terminal's colours."""
    words: list[str] = []
    for line in _COLORS.sub("", boxed).splitlines()[1:]:
        text = line.strip(_BOX + " ")
        if words and not text.strip("-"):
            break
        words.append(text)
    sentence = " ".join(words).strip().rstrip(".")
    sentence = sentence.replace(f"Missing from {prog}:", "missing:")
    return f"{sentence}; see {prog} --help" if sentence else f"the command line is not understood; see {prog} --help"


def _flags(options_class: type) -> Iterator[tuple[str, _Flag]]:
    """(flag name without dashes, what it is) of every field, nested groups flattened."""
    hints = typing.get_type_hints(options_class, include_extras=True)
    for field in dataclasses.fields(options_class):
        kind, extras = type_and_extras(hints[field.name])
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _flags(kind)
        else:
            yield _flag_name(field.name), _Flag(kind, extras)


def _bare_words(arguments: Sequence[str], flags: Mapping[str, _Flag]) -> list[str]:
    """The words of a command line that are neither flags nor values of flags."""
    words, takes_values = [], False
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.removeprefix("--").replace("_", "-")
            takes_values = "=" not in argument and name in flags and flags[name].kind is not bool
        elif not takes_values:
            words.append(argument)
    return words


def _flag_name(field_name: str) -> str:
    """The flag without its dashes; a field that would be a Python keyword ends with an underscore, as in `from_`."""
    return field_name.rstrip("_").replace("_", "-")


def _check_flag(written: str, flags: Mapping[str, _Flag], complaint: str, *, prog: str) -> str:
    name = written.removeprefix("--").replace("_", "-")
    switches = {f"no-{flag}" for flag, about in flags.items() if about.kind is bool}
    if name in flags or name in switches:
        return name
    dashes = "--" if written.startswith("--") else ""
    advice = advice_for(name, prog)
    if advice is None:
        close = nearest(name, [*flags, *switches], count=1)
        advice = f"did you mean {dashes}{close[0]}?" if close else f"see {prog} --help for the flags"
    raise UserError(f"{complaint}; {advice}")


def _take_configs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(the files that --config names, in order; the other words)."""
    configs, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            config = next(remaining, None)
            if config is None:
                raise UserError("--config needs the path of a YAML file")
            configs.append(config)
        elif argument.startswith("--config="):
            configs.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return configs, rest


def _config_arguments(path: Path, flags: Mapping[str, _Flag], *, prog: str, seen_config: SeenConfig) -> list[str]:
    """A YAML file's mapping as command-line arguments."""
    values = {
        _check_flag(key, flags, f"unknown key {key!r} in {path}", prog=prog): value
        for key, value in read_config(path).items()
    }
    arguments: list[str] = []
    for name, value in seen_config(path, values).items():
        if name not in flags:
            raise UserError(f"{name} in {path} is no flag with a value; write {name.removeprefix('no-')}: false")
        written = as_words(name, value, *flags[name], path)
        arguments += [word.removeprefix(f"--{name}=") for word in written] if flags[name].positional else written
    return arguments
