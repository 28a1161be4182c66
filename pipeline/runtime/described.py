"""Options as tyro is to see them: each field with its docstring, one true default and a plain type in the help.

tyro shows an option that may be None as `{None}|PATH (default: None)`, beside a docstring that says what happens then.
Annotations are all it can be told by, so it is given dataclasses of the same fields with richer ones, and what it
parses into those is put into the real ones afterwards.
"""

import ast
import dataclasses
import sys
import types
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro

Options = TypeVar("Options")
_WORDS = {str: "TEXT", int: "INT", float: "FLOAT", bool: "TRUE|FALSE"}


def described(options_class: type) -> type:
    """A dataclass with the fields of an options class, annotated for the help; groups of options likewise."""
    hints = typing.get_type_hints(options_class, include_extras=True)
    texts = _field_texts(options_class)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(options_class):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            # tyro looks for a text of every group in its source, unless there is one
            group = Annotated[described(hint), tyro.conf.arg(help=hint.__doc__ or "")]  # type: ignore[valid-type]
            fields.append((field.name, group, dataclasses.field()))
            continue
        hint = Annotated[hint, _told(hint, texts.get(field.name, ""))]
        fields.append((field.name, hint, dataclasses.field(default=field.default)))
    shown = dataclasses.make_dataclass(options_class.__name__, fields, frozen=True, kw_only=True)
    shown.__doc__ = options_class.__doc__
    return shown


def real(options_class: type[Options], parsed: Any) -> Options:
    """The options that were parsed into the described class.

    Raises:
        UserError: their values do not fit together.
    """
    hints = typing.get_type_hints(options_class)
    values = {}
    for field in dataclasses.fields(typing.cast("Any", options_class)):
        value, hint = getattr(parsed, field.name), hints[field.name]
        values[field.name] = real(hint, value) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else value
    return options_class(**values)


def type_and_extras(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A field's type without what is annotated to it, and all of that."""
    extras: tuple[Any, ...] = ()
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        extras += tuple(more)
    return hint, extras


def without_none(kind: Any) -> tuple[Any, bool]:
    """A type without None, and whether None was among it."""
    if get_origin(kind) not in {typing.Union, types.UnionType}:
        return kind, False
    kinds = [type_and_extras(inner)[0] for inner in get_args(kind) if inner is not type(None)]
    return (kinds[0] if len(kinds) == 1 else kind), len(kinds) < len(get_args(kind))


def _told(hint: Any, text: str) -> Any:
    """What tyro is to know of a field, where its own annotation does not say it."""
    kind, extras = type_and_extras(hint)
    own = [extra for extra in extras if hasattr(extra, "help_behavior_hint")]
    shown = next((conf.help for conf in own if conf.help is not None), text)
    spec = any(isinstance(extra, tyro.constructors.PrimitiveConstructorSpec) for extra in extras)
    plain = None if spec or any(conf.metavar is not None for conf in own) else _plain_name(kind)

    def hint_of(default: str) -> str:
        if default == "None" and "efault" in shown:
            return ""
        return f"(default: {default if default not in {'None', ''} else 'none'})"

    return tyro.conf.arg(help=shown or None, metavar=plain, help_behavior_hint=hint_of)


def _plain_name(kind: Any) -> str | None:
    """What stands behind a flag that takes this type; None where tyro's own words are plain."""
    kind, _ = without_none(kind)
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if kind is bool or not isinstance(kind, type):
        return None
    return _WORDS.get(kind) or kind.__name__.upper()


def _field_texts(options_class: type) -> dict[str, str]:
    """{field: the docstring below it}, of the class and what it inherits from."""
    texts: dict[str, str] = {}
    for kind in reversed(options_class.__mro__[:-1]):
        source = getattr(sys.modules.get(kind.__module__), "__file__", None)
        texts |= _texts_by_class(source).get(kind.__name__, {}) if source else {}
    return texts


@cache
def _texts_by_class(source: str) -> dict[str, dict[str, str]]:
    """{class: {field: the docstring below it}} of a file, read once for all its classes."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(source).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            texts = found.setdefault(node.name, {})
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    value = below.value if isinstance(below, ast.Expr) else None
                    text = value.value if isinstance(value, ast.Constant) else ""
                    texts[field.target.id] = " ".join(text.split()) if isinstance(text, str) else ""
    return found
