"""A process's settings as plain values, checked: they come from command lines and from strangers' checkpoints."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline.errors import UserError


def check_settings(kind: type, values: Mapping[str, Any]) -> None:
    """Nothing, if every key is a field of that process, of its type, and every choice among words is one of them.

    Raises:
        UserError: some are not; each is named.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    hints = get_type_hints(kind)
    wrong = [f"{name} is no setting of it (they are {', '.join(names)})" for name in values if name not in names]
    for name in (name for name in names if name in values):
        value, choices = values[name], get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        if choices and value not in choices:
            wrong.append(f"{name} is {value!r} but must be one of {', '.join(choices)}")
        if hints[name] is int and type(value) is not int:
            wrong.append(f"{name} is {value!r} but must be a whole number")
        if hints[name] == tuple[int, ...] | None and not (value is None or _are_whole(value)):
            wrong.append(f"{name} is {value!r} but must be whole numbers")
    if wrong:
        raise UserError(f"this {kind.__name__} cannot be made: {'; '.join(wrong)}")


def _are_whole(value: object) -> bool:
    return isinstance(value, tuple) and all(type(number) is int for number in value)
