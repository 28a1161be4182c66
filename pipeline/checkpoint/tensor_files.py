"""Files of tensors: safetensors written and read, pickles of others opened without running them, damage noticed.

The only module that calls `torch.load` and `torch.save`. Unpickling is restricted to tensors and plain containers
(`weights_only=True`); a file that would call anything else is refused, not run.
"""

import argparse
import errno
import hashlib
import json
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Final, NamedTuple

import torch
from torch import Tensor

from pipeline.hub import POINTER_ADVICE, is_pointer
from pipeline.runtime.console import printable
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes
from pipeline.runtime.gate import check_regular, parse_json, shortened

PICKLED: Final = (".pt", ".pth", ".bin", ".ckpt")
PROCESS: Final = "dit_diffusion"
"""In the metadata of a lone file: the JSON of what its network was trained for, where it is not the release's."""
SUFFIXES: Final = (".safetensors", *PICKLED)
# Where training scripts put a network's weights inside a larger file, most wanted first.
_NESTED = {"ema": ("ema", "model_ema", "model", "state_dict"), "raw": ("model", "state_dict")}
_WRAPPERS = ("module", "_orig_mod")
# What a file of tensors calls to make them.
_HARMLESS = re.compile(
    r"torch\.(_utils|_tensor)\._rebuild\w+|torch\.\w*Storage|torch\.storage\.\w+|collections\.OrderedDict"
    r"|argparse\.Namespace|_codecs\.encode"
)
_MOST_PICKLES = 8
_SUM, _UNKNOWN_SUM = "sha256", "0" * 64
_PIECE_BYTES = 1 << 22
_MOST_HEADER = 100_000_000
"""Bytes, as in safetensors."""


class WeightFile(NamedTuple):
    """What a file of weights holds, on the CPU."""

    tensors: dict[str, Tensor]
    """Under plain names."""
    arguments: dict[str, Any]
    """What the training that wrote it was told (`args`), where it says so."""
    step: int
    """After how many steps, or 0 where it does not say."""


def load_tensors(path: Path, *, weights: str = "ema") -> dict[str, Tensor]:
    """Every tensor of a .safetensors file or a pickled state dict, under plain names, on the CPU.

    Raises:
        UserError: as `read_weight_file`.
    """
    return read_weight_file(path, weights=weights).tensors


def read_weight_file(path: Path, *, weights: str = "ema") -> WeightFile:
    """The tensors of a .safetensors file or a pickled state dict, and what a training file says beside them.

    Raises:
        UserError: the file is missing, damaged, of an unknown kind, would run code, or lacks the wanted weights.
    """
    if path.suffix in PICKLED:
        content = _unpickled(path)
        tensors = plain_names(_choose(content, weights, path), origin=path)
        told = content.get("args")
        told = vars(told) if isinstance(told, argparse.Namespace) else told
        arguments = {str(name): value for name, value in told.items()} if isinstance(told, Mapping) else {}
        steps = [content.get(name) for name in ("steps", "step", "train_steps")]
        return WeightFile(tensors, arguments, next((step for step in steps if type(step) is int), 0))
    if path.suffix == ".safetensors":
        tensors = plain_names(read_safetensors(path), origin=path)
        told = _header(path).get("__metadata__", {}).get(PROCESS)
        return WeightFile(tensors, {} if told is None else {PROCESS: told}, 0)
    raise UserError(f"{path} is no weight file that is known here; its name must end in {', '.join(SUFFIXES)}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by the names in it.

    Raises:
        UserError: the file is missing, unreadable or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_readable(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); restore or remake it") from error


def load_pickled_tensors(path: Path, *, weights: str = "ema") -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`, under plain names, without running anything in it.

    A training checkpoint holds several: "ema" is preferred, then "model"; `weights="raw"` takes "model".

    Raises:
        UserError: the file is missing or damaged, would run code, or holds no state dict (of that kind).
    """
    return plain_names(_choose(_unpickled(path), weights, path), origin=path)


def _unpickled(path: Path) -> Any:
    _check_readable(path)
    try:
        # The release's own training checkpoints carry their options: a Namespace is a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's age; what matters is in the error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # noqa: TID251 -- the one place
    except Exception as error:  # a damaged archive shows as almost any exception
        raise UserError(_refusal(path, error)) from error


def save_pickled_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write plain tensors as `torch.save` does, for tools that open nothing else.

    Raises:
        UserError: the file cannot be written.
    """
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with explained_writes(path), path.open("wb") as file:
        try:
            torch.save(contents, file)  # noqa: TID251 -- the one place
        except RuntimeError as error:  # what torch makes of a file that may not grow
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from error


def save_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, sealed: bool = False, about: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write tensors as safetensors; the bytes depend on names and values alone, the file's rights on the umask.

    Args:
        about: further texts for the metadata.
        sealed: put `contents_sha256` into the metadata, for a file with nothing beside it to say its checksum.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contents: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        # The format has no way to say that two names are one tensor, so each gets its own bytes.
        contents[name] = whole.clone() if whole.data_ptr() in memory else whole
        memory.add(whole.data_ptr())
    with explained_writes(path):
        path.touch()
        rights = path.stat().st_mode  # safetensors would leave the file to its owner alone
        try:
            save_file(contents, path, metadata={"format": "pt", **about, **({_SUM: _UNKNOWN_SUM} if sealed else {})})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        path.chmod(rights)
        if sealed:
            _seal(path)


def _seal(path: Path) -> None:
    """Put the sum into the place that was kept free for it, which moves no other byte.

    The metadata is put in order, too: safetensors writes its keys as they come.
    """
    header = _header(path)
    header["__metadata__"] = dict(sorted({**header["__metadata__"], _SUM: contents_sha256(path)}.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        assert len(text) <= length, "the header grew, and would overwrite the first tensor"
        file.write(text.ljust(length))


def find_changed(path: Path) -> str | None:
    """What differs in a lone file from what was written, or None if nothing does, or nothing was recorded.

    Looked at are the CRC of every member of a .pt's archive, and the SHA-256 that a conversion leaves in a
    safetensors file's metadata (`save_safetensors`).
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            try:
                member = archive.testzip()
            except (zipfile.BadZipFile, EOFError, zlib.error) as error:
                return f"{path.name} is no whole archive ({error})"
        return f"{member} in {path.name} has other contents than were written" if member else None
    if path.suffix != ".safetensors":
        return None
    recorded = _header(path).get("__metadata__", {}).get(_SUM)
    if recorded is None or recorded == contents_sha256(path):
        return None
    return f"{path.name} has other contents than were written"


def contents_sha256(path: Path) -> str:
    """SHA-256, in hexadecimal, of a safetensors file apart from its metadata.

    Hashed are the header without `__metadata__`, as JSON (sorted keys, separators `,` and `:`, ASCII only) and a
    newline, then every byte behind the header.
    """
    header = {name: entry for name, entry in _header(path).items() if name != "__metadata__"}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _header(path: Path) -> dict[str, Any]:
    check_regular(path)
    with path.open("rb") as file:
        length, held = int.from_bytes(file.read(8), "little"), path.stat().st_size - 8
        if length > min(held, _MOST_HEADER):
            raise UserError(f"{path} is damaged: its header claims {length} bytes, but it holds {max(held, 0)}")
        header = parse_json(file.read(length), f"the header of {path}")
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise UserError(f"the header of {path} is no JSON object of tensors; restore or remake it")
    return header


def holds_tensors(path: Path) -> bool:
    """Whether a file is one of weights, by its contents and its name, without reading all of them."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return bool(file.keys())
        return bool(load_pickled_tensors(path))
    except (UserError, SafetensorError, OSError):
        return False


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors with a value that is infinite or no number."""
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]


def plain_names(tensors: Mapping[str, Tensor], *, origin: object) -> dict[str, Tensor]:
    """The same tensors without the `module.` and `_orig_mod.` that wrappers put into their names, at any depth.

    Raises:
        UserError: two names become one.
    """
    plain: dict[str, Tensor] = {}
    twice = []
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in plain:
            twice.append(short)
        plain[short] = tensor
    if twice:
        raise UserError(f"{origin} holds some tensors twice, with and without a prefix: {join_names(twice)}")
    return plain


def join_names(names: Iterable[str]) -> str:
    """Names in order, for a message: every one of them, numbers sorted as numbers."""
    return ", ".join(sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]))


def _check_readable(path: Path) -> None:
    try:
        check_regular(path)
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its rights") from error
    if is_pointer(path):
        raise UserError(f"{path} {POINTER_ADVICE}")


def _refusal(path: Path, error: Exception) -> str:
    called = list(dict.fromkeys(_called(path)))
    strange = [name for name in called if not _HARMLESS.fullmatch(name)]
    if type(error).__name__ != "UnpicklingError" or not called:
        return f"{path} is damaged or no file of torch.save ({_first_line(error)}); restore or remake it"
    return (
        f"{path} is refused: opening it would run code ({', '.join(strange or called)}), and only tensors in plain "
        f"containers are read; ask its author for a .safetensors file"
    )


def _called(path: Path) -> Iterator[str]:
    """The functions and classes that unpickling the file would call, by name, without unpickling anything."""
    with suppress(Exception), closing(_pickle_in(path)) as file:  # what is damaged names what it still can
        for _ in range(_MOST_PICKLES):  # torch.save once wrote several, one after the other
            words: list[str] = []
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in {"GLOBAL", "INST"}:
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL" and len(words) > 1:
                    yield f"{words[-2]}.{words[-1]}"
                elif isinstance(argument, str):
                    words.append(argument)


def _pickle_in(path: Path) -> IO[bytes]:
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    archive = zipfile.ZipFile(path)
    return archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _first_line(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200].rstrip(": "))


def _choose(content: Any, weights: str, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict (names with their tensors)")
    for key in _NESTED.get(weights, (weights,)):
        if isinstance(content.get(key), Mapping):
            return _only_tensors(content[key], path)
    nested = [str(key) for key in content if isinstance(content[key], Mapping)]
    if nested and any(key in content for keys in _NESTED.values() for key in keys):
        raise UserError(
            f"{path} has no {weights} weights, but {join_names(nested)}; give --weights (--init-weights to dit-train)"
        )
    return _only_tensors(content, path)


def _only_tensors(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    others = [f"{name} ({type(value).__name__})" for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(f"{path} holds what are no tensors where a state dict is expected: {join_names(others)}")
    if not content:
        raise UserError(f"{path} holds no tensors")
    odd = [f"{shortened(name)} ({why})" for name, tensor in content.items() if (why := _is_odd(tensor))]
    if odd:
        raise UserError(f"{path} holds tensors that are no plain arrays of numbers: {join_names(odd)}; save them dense")
    return {str(name): tensor for name, tensor in content.items()}


def _is_odd(tensor: Tensor) -> str | None:
    """Why a tensor is not an array of numbers that are all there, or None if it is."""
    if tensor.is_meta:
        return "meta: a shape without numbers"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantised"
    claims, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    return f"claims {claims} bytes, but {held} are there" if claims > held else None
