"""Options as frozen dataclasses: read from the command line and from YAML, written down again as flags.

A configuration file is a list of flags written down: every key is a flag's name, and the file's values go
through the same parser as the command line, so that both give the same checks and the same messages.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml

from pipeline.runtime.errors import UserError

Options = TypeVar("Options")
_BOX = "─│╭╮╰╯"
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates that look most like the name, best first, for "did you mean"."""
    by_lower = {str(candidate).lower(): str(candidate) for candidate in candidates}
    found = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)
    return [by_lower[key] for key in found]


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
) -> Options:
    """The options of one command line; `--config FILE.yaml` fills in what the command line does not say.

    Args:
        presets: folder of YAML files whose stems `--config` takes as names.

    Raises:
        UserError: an unknown flag or key, a value of another type, a missing flag.
        SystemExit: with status 0, after --help.
    """
    flags = dict(_flags(options_class))
    config, arguments = _take_config(list(arguments))
    from_file = _config_arguments(_find_config(config, presets), flags, _positional(options_class)) if config else []
    if _bare_words(arguments, flags):  # the command line overrides the file
        from_file = [argument for argument in from_file if argument.startswith("-")]
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name != "--help":
            _check_flag(name, flags, f"unknown flag {name}", "see --help")
    return _tyro(_with_config(options_class), [*from_file, *arguments], prog=prog, description=description).options


def _with_config(options_class: type) -> type:
    """The options and, for the help text alone, --config."""
    help_line = "YAML file that sets any of these flags by name; the command line overrides it."
    return dataclasses.make_dataclass(
        "Command",
        [
            ("options", Annotated[options_class, tyro.conf.arg(name="")]),
            (
                "config",
                Annotated[str | None, tyro.conf.arg(help=help_line, metavar="FILE")],
                dataclasses.field(default=None),
            ),
        ],
        frozen=True,
        kw_only=True,
    )


def _tyro(wrapper: type, arguments: list[str], *, prog: str, description: str) -> Any:
    messages = io.StringIO()
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


def _flags(options_class: type) -> Iterator[tuple[str, type]]:
    """(flag name without dashes, its type) of every field, nested groups flattened."""
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _flags(hint)
        else:
            yield _flag_name(field.name), hint


def _positional(options_class: type) -> set[str]:
    """The names of the options that a command line gives without a flag."""
    hints = typing.get_type_hints(options_class, include_extras=True)
    return {
        _flag_name(name) for name, hint in hints.items() if tyro.conf.Positional in getattr(hint, "__metadata__", ())
    }


def _bare_words(arguments: Sequence[str], flags: dict[str, type]) -> list[str]:
    """The words of a command line that are neither flags nor values of flags."""
    words, takes_values = [], False
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.removeprefix("--").replace("_", "-")
            takes_values = "=" not in argument and flags.get(name, bool) is not bool
        elif not takes_values:
            words.append(argument)
    return words


def _flag_name(field_name: str) -> str:
    """The flag without its dashes; a field that would be a Python keyword ends with an underscore, as in `from_`."""
    return field_name.rstrip("_").replace("_", "-")


def _check_flag(written: str, flags: dict[str, type], complaint: str, otherwise: str) -> str:
    name = written.removeprefix("--").replace("_", "-")
    positive = name.removeprefix("no-")
    if name in flags or (positive in flags and flags[positive] is bool):
        return name
    spellings = [*flags, *(f"no-{flag}" for flag, kind in flags.items() if kind is bool)]
    close = nearest(name, spellings, count=1)
    hint = f"did you mean {'--' if written.startswith('--') else ''}{close[0]}?" if close else otherwise
    raise UserError(f"{complaint}; {hint}")


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    config, rest = None, []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            config = next(remaining, None)
            if config is None:
                raise UserError("--config needs the path of a YAML file")
        elif argument.startswith("--config="):
            config = argument.partition("=")[2]
        else:
            rest.append(argument)
    return config, rest


def _find_config(config: str, presets: Path | None) -> Path:
    path = Path(config)
    if path.is_file():
        return path
    named = sorted(preset.stem for preset in presets.glob("*.yaml")) if presets else []
    if presets and config in named:
        return presets / f"{config}.yaml"
    known = f"; the names that need no file are {', '.join(named)}" if named else ""
    raise UserError(f"--config {config} is not a file{known}")


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are truth values (`no` is a precision) and 1:30 is a text, as a range is."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_int(node)

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> Any:
        is_one = node.value.lower() in {"true", "false"}
        return super().construct_yaml_bool(node) if is_one else node.value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_yaml_bool)
_TRUTHS = {"yes": True, "on": True, "no": False, "off": False}


def _config_arguments(path: Path, flags: dict[str, type], positional: set[str]) -> list[str]:
    """A YAML file's mapping as command-line arguments."""
    try:
        content = yaml.load(path.read_text(), Loader=_Loader)  # noqa: S506 - it is a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold `flag: value` lines, not a {type(content).__name__}")
    arguments: list[str] = []
    for key, value in content.items():
        name = _check_flag(str(key), flags, f"unknown key {key!r} in {path}", "see --help for the flags")
        written = _argument(name, value, flags, path)
        arguments += [word.removeprefix(f"--{name}=") for word in written] if name in positional else written
    return arguments


def _argument(name: str, value: Any, flags: dict[str, type], path: Path) -> list[str]:
    if flags.get(name) is bool:
        value = _TRUTHS.get(str(value).lower(), value)
        if not isinstance(value, bool):
            raise UserError(f"{name} in {path} is {value!r}, but must be true or false")
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, dict) or name not in flags:
        raise UserError(f"{name} in {path} is {value!r}, but must be the value of the flag --{name}")
    if isinstance(value, list):
        return [f"--{name}", *(str(item) for item in value)]
    return [f"--{name}={value}"]
