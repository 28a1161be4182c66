"""Configuration files: YAML whose keys are flags, as the words of a command line, so that both are checked alike."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, get_origin

import yaml

from pipeline.runtime.described import without_none
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import read_regular, typed

BY_COMMAS: Final = "values separated by commas"
"""Annotated to an option whose text is a list with commas: in a file it may be a list."""
Scalar: TypeAlias = bool | int | float | str | None
Setting: TypeAlias = Scalar | list[Scalar]
MOST_SETTINGS: Final = 1 << 17
"""Bytes of the settings of a run, or of a user's own file: YAML is read at 40 kB a second where it is all commas."""
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_TRUTHS = {"yes": True, "on": True, "no": False, "off": False}


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are truth values (`no` is a precision), 1:30 is a text, no key comes twice.

    A number that begins with 0, such as 010, is left to the flag as a command line would: it is 10, not 8.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        return super().construct_yaml_int(node) if _DECIMAL.fullmatch(node.value) else node.value

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> Any:
        is_one = node.value.lower() in {"true", "false"}
        return super().construct_yaml_bool(node) if is_one else node.value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_float(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value).replace("_", "-"), key.start_mark.line + 1
            if name in lines and key.tag != "tag:yaml.org,2002:merge":
                raise UserError(f"{key.value} stands twice, in line {lines[name]} and in line {line}; leave one")
            lines[name] = line
        return super().construct_mapping(node, deep=deep)


class _WrittenLoader(yaml.SafeLoader):
    """YAML as a command writes it: without references, thirteen lines of which stand for more than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1} refers to another by *")
        return super().compose_node(parent, index)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_yaml_bool)


def find_config(config: str, presets: Path | None, *, flag: str = "--config", suffix: str = ".yaml") -> Path:
    """The file that a flag names, or the preset of that name, which is a file with that suffix.

    Raises:
        UserError: there is neither.
    """
    path = Path(config).expanduser()
    if path.is_file():
        return path
    named = sorted(preset.stem for preset in presets.glob(f"*{suffix}")) if presets else []
    if presets and config in named:
        return presets / f"{config}{suffix}"
    known = f"; the names that need no file are {', '.join(named)}" if named else ""
    raise UserError(f"{flag} {config} is not a file{known}")


def read_config(path: Path, *, flag: str = "--config") -> dict[str, Any]:
    """A file's keys, as they are written, and values.

    Raises:
        UserError: it cannot be read, is no mapping, or says something twice.
    """
    try:
        text = read_regular(path, most=MOST_SETTINGS).decode("utf-8-sig")
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 - it is a SafeLoader
    except UserError as error:
        raise UserError(f"{flag} {path}: {error}") from error
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{flag} {path} must hold `flag: value` lines, not a {type(content).__name__}")
    return {str(key): value for key, value in (content or {}).items()}


def parse_settings(text: str, place: object) -> dict[str, Setting]:
    """What a config.yaml that a command wrote says: flags and values, no more.

    Raises:
        UserError: it is no such text.
    """
    refusal, advice = f"{place} cannot be read as this project's settings", "restore it, or choose another folder"
    try:
        content = yaml.load(text, Loader=_WrittenLoader)  # noqa: S506 - it is a SafeLoader
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{refusal} ({' '.join(str(error)[:300].split())}); {advice}") from error
    return typed(content, dict[str, Setting], refusal, advice=advice)


def as_words(name: str, value: Any, kind: Any, extras: tuple[Any, ...], path: Path) -> list[str]:
    """An option of a file as words of a command line.

    Args:
        name: the flag without dashes.
        kind: its type, `extras` what is annotated to it.

    Raises:
        UserError: the value is of another kind than the flag takes.
    """
    if kind is bool:
        value = _TRUTHS.get(str(value).lower(), value)
        if not isinstance(value, bool):
            raise UserError(f"{name} in {path} is {value!r}, but must be true or false")
        return [f"--{name}" if value else f"--no-{name}"]
    inner, may_be_none = without_none(kind)
    if isinstance(value, Mapping):
        raise UserError(f"{name} in {path} is {value!r}, but must be the value of the flag --{name}")
    if value is None and not may_be_none:
        raise UserError(f'{name} in {path} has no value; write one (in quotes where YAML reads it as nothing: "~")')
    if isinstance(value, list):
        if get_origin(inner) is tuple:
            return [f"--{name}", *(str(item) for item in value)]
        if BY_COMMAS not in extras:
            raise UserError(f"{name} in {path} is a list, but the flag --{name} takes one value")
        return [f"--{name}={','.join(str(item) for item in value)}"]
    return [f"--{name}={value}"]
