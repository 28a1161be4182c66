"""What a file of torch.save would call, and the memory it claims: told before any of it is called or taken.

Restricted to tensors, torch's unpickler runs no code, but takes what a file asks for: storages of any size in the form
from before torch 1.6, and in both forms `bytearray(10**12)` or tensors made of a number of numbers. Here its few
instructions are gone through with nothing behind them: nothing is imported, called or allocated.
"""

import mmap
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

# What a file of tensors calls or names to make them.
_HARMLESS: Final = re.compile(
    r"torch\.(_utils|_tensor)\._rebuild\w+|torch\.(\w+\.)*\w*(Storage|Tensor)|torch\.[a-z]+\d+\w*|torch\.per_\w+"
    r"|torch\.(Size|device|bool|nn\.parameter\.Parameter|serialization\._get_layout)|collections\.(OrderedDict|Counter)"
    r"|argparse\.Namespace|_codecs\.encode|(__builtin__|builtins)\.(set|bytearray|complex)"
)
_FROM_STORAGE: Final = re.compile(r"torch\._utils\._rebuild_(q?tensor|tensor_v\d+)")
_FROM_NUMBERS: Final = re.compile(r"torch\.(\w+\.)*\w*(Storage|Tensor)|\w+\.bytearray")
_PICKLES_OF_OLD: Final = 5  # a magic number, a version, the machine, the content, the order of the storages behind it
_PUSHED: Final = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
_GOT: Final = ("BINGET", "LONG_BINGET")
_TAKEN: Final = {
    "APPEND": 1,
    "SETITEM": 2,
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPENDS": 0,
    "SETITEMS": 0,
    "TUPLE": 0,
}
"""From the end of the stack; 0 is what stands behind the last mark."""


class ClaimError(ValueError):
    """A file asks for more than it holds, or in a way that cannot be told."""


class _Storage(NamedTuple):
    held: int
    """Bytes."""
    itemsize: int


class _Thing(NamedTuple):
    """What is imported, made by a call, or a list, dict or set."""

    name: str = ""
    is_made: bool = True


_CONSTANTS: Final = {"NONE": None, "NEWFALSE": False, "NEWTRUE": True, "EMPTY_TUPLE": ()} | dict.fromkeys(
    ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), _Thing()
)


def is_zip(path: Path) -> bool:
    """Whether a file is in the form since torch 1.6, told as torch does."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"


def look_through(path: Path) -> tuple[list[str], Exception | None]:
    """The names that no plain file of tensors has, and what is wrong (a ClaimError, or any error), if something is.

    Compared are storages with the file's bytes, tensors with their storages, and members of the archive with theirs.
    """
    fault: Exception | None = None
    try:
        with _pickles_in(path) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that its storages' types are old when their size is asked
            begins, *_ = [_result(stream, path.stat().st_size) for _ in range(1 if is_zip(path) else _PICKLES_OF_OLD)]
            if not is_zip(path) and begins != torch.serialization.MAGIC_NUMBER:
                fault = ValueError("it does not begin as one")
    except Exception as error:  # noqa: BLE001 -- a damaged file shows as almost any
        fault = error
    return [name for name in dict.fromkeys(_names(path)) if not _HARMLESS.fullmatch(name)], fault


@contextmanager
def _pickles_in(path: Path) -> Iterator[Any]:
    """A stream that makes no room for more than there is."""
    if not is_zip(path):
        with path.open("rb") as file, closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
            yield data
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size for one in members):
            raise ClaimError("it is compressed inside, as torch.save never does and torch.load misreads")
        pickles = [one for one in members if one.filename.lower().endswith("data.pkl")]
        if len(pickles) != 1 or len({one.filename.lower() for one in members}) != len(members):
            raise ClaimError("it has no data.pkl, or several members of one name")
        if (most := max(one.file_size for one in members)) > path.stat().st_size:
            raise ClaimError(f"a member claims {most} bytes, but the file has {path.stat().st_size}")
        yield BytesIO(archive.read(pickles[0]))


def _names(path: Path) -> Iterator[str]:
    """All that unpickling would import, also where the instructions are none of torch's."""
    with suppress(Exception), _pickles_in(path) as stream:  # what is damaged names what it still can
        for _ in range(_PICKLES_OF_OLD):
            words: list[str] = []
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in {"GLOBAL", "INST"}:
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL" and len(words) > 1:
                    yield f"{words[-2]}.{words[-1]}"
                elif isinstance(argument, str):
                    words.append(argument)


def _result(stream: Any, held: int) -> Any:
    """Of the next pickle, which has so many bytes for its storages."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    storages: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _PUSHED or name in _CONSTANTS or name in _GOT or name == "GLOBAL":
            stack.append(_pushed(name, argument, memo))
        elif name in _TAKEN:
            at = len(stack) - _TAKEN[name] if _TAKEN[name] else marks.pop()
            stack[at:] = [tuple(stack[at:])] if name.startswith("TUPLE") else []
        elif name == "MARK":
            marks.append(len(stack))
        elif name in {"BINPUT", "LONG_BINPUT"}:
            memo[argument] = stack[-1]
        elif name in {"REDUCE", "NEWOBJ"}:
            _check_call(*stack[-2:])
            stack[-2:] = [_Thing(stack[-2].name)]
        elif name == "BUILD":
            _check_built_of(stack.pop())
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), storages, held))
        elif name == "STOP":
            return stack[-1]
        elif name != "PROTO":
            raise ValueError(f"its pickle has {name}, which torch.save does not write")
    raise EOFError


def _pushed(name: str, argument: Any, memo: dict[Any, Any]) -> Any:
    if name in _GOT:
        return memo[argument]
    if name == "GLOBAL":
        return _Thing(str(argument).replace(" ", "."), is_made=False)
    return _CONSTANTS.get(name, argument)


def _storage(told: Any, storages: dict[Any, int], most: int) -> _Storage:
    """What torch makes of ("storage", type, key, device, count, in the old form also which part of it)."""
    kind, key, count, view = told[1], told[2], told[4], (*told, None)[5]
    if type(count) is not int or count < 0:
        raise ClaimError("a storage in it has no size, or less than nothing")
    itemsize = _itemsize(kind)
    held = storages.setdefault(key, count * itemsize)
    if (claims := sum(storages.values())) > most:
        raise ClaimError(f"its tensors claim {claims} bytes, but it has {most}")
    return _Storage(held if view is None else min(held, view[2] * itemsize), itemsize)


def _check_call(function: _Thing, arguments: Any) -> None:
    if not isinstance(arguments, tuple) or function.is_made:
        raise ClaimError("it calls what cannot be told")
    if function.name == "torch._tensor._rebuild_from_type_v2":
        _check_call(arguments[0], arguments[2])
    elif _FROM_STORAGE.fullmatch(function.name):
        _check_tensor(function.name, *arguments)
    elif arguments and _FROM_NUMBERS.fullmatch(function.name):
        # A bytearray is made of bytes, which protocol 2 has as a text with its encoding.
        is_of_bytes = isinstance(arguments[0], str) or arguments[0] == _Thing("_codecs.encode")
        if not (is_of_bytes and function.name.endswith("bytearray")):
            raise ClaimError(f"it makes a {function.name.rpartition('.')[2]} of numbers rather than of its bytes")


def _check_built_of(parts: Any) -> None:
    if isinstance(parts, tuple) and any(isinstance(one, _Storage) for one in parts):
        _check_tensor("", *parts)


def _check_tensor(name: str, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> None:
    """What a tensor takes of its storage, which torch would make larger."""
    numbers = [offset, *size, *stride] if isinstance(size, tuple) and isinstance(stride, tuple) else [-1]
    if not isinstance(storage, _Storage) or any(type(one) is not int or one < 0 for one in numbers):
        raise ClaimError("a tensor in it has no storage, or no sizes")
    itemsize = max(storage.itemsize, *map(_itemsize, rest), 1)
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    takes = 0 if 0 in size else last + 1
    if name.endswith("_rebuild_qtensor"):  # whose numbers get a place each before the storage is looked at
        takes = max(takes, prod(size))
    if takes * itemsize > storage.held:
        raise ClaimError(f"a tensor in it claims {takes * itemsize} bytes, but {storage.held} are there")


def _itemsize(thing: Any) -> int:
    """Of torch.float32 or torch.FloatStorage; 1 where it has none, as an untyped one."""
    what = getattr(torch, thing.name.rpartition(".")[2], None) if isinstance(thing, _Thing) else None
    dtype = what if isinstance(what, torch.dtype) else getattr(what, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 1
