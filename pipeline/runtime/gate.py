"""The gate for files that may be a stranger's: only regular files, JSON within limits, values of exactly their types.

What passes is a typed, frozen object; what does not is one `UserError` that names the file, the key and what is wrong.
"""

import dataclasses
import json
import math
import os
import re
import stat
import typing
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from pipeline.runtime.errors import UserError
from pipeline.runtime.units import size

MOST_BYTES: Final = 1 << 28
"""Of JSON: the commit record of a million samples has about a third, ImageNet's labels in a dataset.json a quarter."""
MOST_IMAGE_BYTES: Final = 1 << 30
"""Of an image's file, or of one in an archive."""
MOST_LINE: Final = 1 << 20
"""Of a line of a log; a run's have about a thousand."""
MOST_DEPTH: Final = 64
"""Lists and objects within one another."""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""A whole number of things or bytes, which every JSON reader can hold."""
Whole = Annotated[int, msgspec.Meta(ge=-(1 << 53), le=1 << 53)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e300)]
"""And finite."""
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
Crc32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
MOST_FAULTS: Final = 8
"""Named in one sentence."""

Typed = TypeVar("Typed")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
_PLACE = re.compile(r"^(?P<what>.*) - at `\$\.?(?P<key>[^`]*)`$")
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "array": "a list",
    "object": "an object",
    "bool": "true or false",
}


def check_regular(path: Path) -> None:
    """Look at what a path leads to, without opening it: a pipe would wait, a device never end.

    Raises:
        UserError: it is there, and no regular file.
        OSError: it is not there, or may not be looked at.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise UserError(f"{path} is {_KINDS.get(kind, 'no file')}, where a file is expected; check the path")


def read_regular(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        UserError: it is no regular file, or has more bytes than `most`.
        OSError: it is not there, or cannot be read.
    """
    check_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # should a pipe have come meanwhile
    with os.fdopen(descriptor, "rb") as file:
        held = os.fstat(descriptor).st_size
        check_length(held, path, most=most)
        data = file.read(min(held, most) + 1)  # Python makes room for all that is asked for
    check_length(len(data), path, most=most)  # some files of the system say that they are empty
    return data


def check_length(count: int, origin: object, *, most: int = MOST_BYTES, advice: str = "check the path") -> None:
    """Raise UserError if there are more bytes than such a file may have, as a reader does before it takes memory."""
    if count > most:
        raise UserError(f"{origin} has more than the {size(most)} that such a file may have; {advice}")


def parse_json(data: bytes, origin: object, *, advice: str = "restore or remake it") -> Any:
    """The value in JSON text, however it is made.

    Args:
        origin: what to call it.
        advice: what to do about a damaged one.

    Raises:
        UserError: it is not JSON, nests too deeply, or a number in it has too many digits.
    """
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise UserError(f"{origin} nests too deeply for valid JSON; it is damaged, {advice}") from error
    except ValueError as error:  # no JSON, no UTF-8, or more digits than Python reads
        raise UserError(f"{origin} is not valid JSON ({error}); it is damaged, {advice}") from error
    level, depth = [value], 0
    while level := [inner for outer in level if isinstance(outer, list | dict) for inner in _inside(outer)]:
        depth += 1
        if depth > MOST_DEPTH:
            raise UserError(f"{origin} nests lists and objects more than {MOST_DEPTH} deep; it is damaged, {advice}")
    return value


def _inside(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value
    return [one for one in inner if isinstance(one, list | dict)]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Passed(Mapping[str, Any]):
    """A JSON object that passed: what the program knows of it as typed attributes, all of it as a mapping.

    The mapping is for who copies the object, unknown keys and all; whoever wants a value takes the attribute.
    """

    def __getitem__(self, key: str) -> Any:
        return self.__dict__["content"][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__["content"])

    def __len__(self) -> int:
        return len(self.__dict__["content"])


def typed(value: Any, kind: type[Typed], refusal: str, *, advice: str) -> Typed:
    """A JSON value as an object of that type: nothing is converted, keys that it does not know are ignored.

    Args:
        kind: a frozen `msgspec.Struct` or dataclass, its bounds as `msgspec.Meta`; what belongs together is checked by
            its `__post_init__`, with a ValueError.
        refusal: the file and what it is not, as in "x.json is no commit record".

    Raises:
        UserError: values are missing, of another type or out of bounds; it names the keys.
    """
    try:
        passed = msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise UserError(f"{refusal}: {'; '.join(_faults(value, kind)[:MOST_FAULTS])}; {advice}") from error
    _keep(passed, value)
    return passed


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Logged(Passed):
    """A line of a run's metrics.jsonl: what was logged at a step."""

    step: Count

    @property
    def numbers(self) -> dict[str, float]:
        """All else in it that is a number, and none of more digits than can be drawn."""
        return {
            name: value
            for name, value in self.items()
            if name != "step" and isinstance(value, int | float) and -1e100 < value < 1e100
        }


def read_log(path: Path, *, naming: str = "") -> Iterator[tuple[bytes, Logged]]:
    """(line, what it says) of a run's metrics.jsonl, in order; one that is none, such as one cut short, is passed over.

    Args:
        naming: only lines that this stands in.

    Raises:
        UserError: it is no regular file.
        OSError: it is not there, or cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        for line in iter(partial(file.readline, MOST_LINE), b""):
            if naming.encode() in line:
                try:
                    said = typed(parse_json(line, path), Logged, f"{path} is damaged", advice="")
                except UserError:
                    continue
                yield line.rstrip(b"\r\n"), said


def _keep(passed: Any, value: Any) -> None:
    """Let what passed be a mapping over the value that it was made of, and so what is within it."""
    if isinstance(passed, Passed):
        passed.__dict__["content"] = dict(value)
        for name in value.keys() & passed.__dict__.keys():
            _keep(getattr(passed, name), value[name])


def _faults(value: Any, kind: Any, key: str = "") -> list[str]:
    """All that keeps a value from being of a type, object by object; of a list or a mapping the first."""
    found = []
    for name, inner, is_needed in _fields(kind) if isinstance(value, Mapping) else ():
        place = f"{key}.{name}" if key else name
        if name in value:
            found += _faults(value[name], inner, place)
        elif is_needed:
            found.append(f"{place} is missing")
    if typing.get_origin(kind) is dict and isinstance(value, Mapping):
        held = typing.get_args(kind)[1]
        inside = (_faults(inner, held, f"{key}.{shortened(name)[1:-1]}".strip(".")) for name, inner in value.items())
        found += next(filter(None, inside), [])
    if found:
        return found
    try:
        msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        return [_in_words(value, key, error, kind)]
    except UnicodeEncodeError as error:
        return [f"{key or 'it'} holds a text that is no Unicode ({error.object!a:.40})"]
    return []


@cache
def _fields(kind: Any) -> list[tuple[str, Any, bool]]:
    """(key, type, whether it must be there) of all that an object of a type knows; nothing of other types."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [(field.encode_name, field.type, field.required) for field in msgspec.structs.fields(kind)]
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        return []
    hints = typing.get_type_hints(kind, include_extras=True)
    nothing = (dataclasses.MISSING, dataclasses.MISSING)
    return [
        (field.name, hints[field.name], (field.default, field.default_factory) == nothing)
        for field in dataclasses.fields(kind)
    ]


def _in_words(value: Any, key: str, error: msgspec.ValidationError, kind: Any) -> str:
    """What msgspec says of a value, as key, what it is, and what it must be."""
    found = _PLACE.match(str(error))
    what, inner = (found["what"], found["key"]) if found else (str(error), "")
    place = f"{key}.{inner}".strip(".").replace(".[", "[")
    if error.__cause__ is not None:  # of a __post_init__, which names the key itself
        return f"{place}.{error.__cause__}".lstrip(".")
    missing = re.fullmatch(r"Object missing required field `(.*)`", what)
    if missing:
        return f"{place}.{missing[1]} is missing".lstrip(".")
    wanted = what.removeprefix("Expected ").partition(", got ")[0]
    wanted = re.sub(r"`([^`]*)`", lambda kinds: " or ".join(_WORDS.get(k, k) for k in kinds[1].split(" | ")), wanted)
    if what.startswith("Invalid enum value"):
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        wanted = f"one of {', '.join(map(str, choices))}" if choices else "one of the words that are known there"
    value = _at(value, inner)
    if isinstance(value, float) and not math.isfinite(value):
        wanted = "a finite number"
    return f"{place or 'it'} is {shortened(value)}, but must be {wanted}"


def _at(value: Any, key: str) -> Any:
    """The value at a key such as `sums.mean[2]`."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key):
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list | tuple) and index:
            value = value[int(index)]
    return value


def shortened(value: Any) -> str:
    """A value for a message: control characters escaped, no longer than 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}…"
