"""Tensor files that others wrote: pickles opened without running them, safetensors, and names made plain.

The only module that calls `torch.load` and `torch.save`. Unpickling is restricted to tensors and plain containers
(`weights_only=True`); a file that would call anything else is refused, not run.
"""

import argparse
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import explained_writes

PICKLED: Final = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES: Final = (".safetensors", *PICKLED)
# Where training scripts put a network's weights inside a larger file, most wanted first.
_NESTED = {"ema": ("ema", "model_ema", "model", "state_dict"), "raw": ("model", "state_dict")}
_WRAPPERS = ("module", "_orig_mod")


def load_tensors(path: Path, *, weights: str = "ema") -> dict[str, Tensor]:
    """Every tensor of a .safetensors file or a pickled state dict, under plain names, on the CPU.

    Raises:
        UserError: the file is missing, damaged, of an unknown kind, would run code, or lacks the wanted weights.
    """
    if path.suffix in PICKLED:
        return load_pickled_tensors(path, weights=weights)
    if path.suffix == ".safetensors":
        return plain_names(read_safetensors(path), origin=path)
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
    _check_readable(path)
    try:
        # The release's own training checkpoints carry their options: a Namespace is a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # noqa: TID251 -- the one place
    except Exception as error:  # a damaged archive shows as almost any exception
        raise UserError(_refusal(path, error)) from error
    return plain_names(_choose(content, weights, path), origin=path)


def save_pickled_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write plain tensors as `torch.save` does, for tools that open nothing else."""
    with explained_writes(path):
        torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)  # noqa: TID251 -- the one place


def save_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; the bytes depend on names and values alone.

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
        try:
            save_file(contents, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"cannot write {path}: {error}") from error


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
        raise UserError(f"{origin} holds some tensors twice, with and without a prefix: {listed(twice)}")
    return plain


def listed(names: Iterable[str]) -> str:
    """Names in order, for a message: every one of them, numbers sorted as numbers."""
    return ", ".join(sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]))


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its rights") from error


def _refusal(path: Path, error: Exception) -> str:
    names = re.findall(r"(?:GLOBAL|global|class) ([\w.]+)", str(error))
    if not names:
        return f"{path} is damaged or no file of torch.save ({_first_line(error)}); restore or remake it"
    return (
        f"{path} is refused: opening it would run code ({', '.join(dict.fromkeys(names))}), and only tensors in plain "
        f"containers are read; ask its author for a .safetensors file"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _choose(content: Any, weights: str, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict (names with their tensors)")
    for key in _NESTED.get(weights, (weights,)):
        if isinstance(content.get(key), Mapping):
            return _only_tensors(content[key], path)
    nested = [str(key) for key in content if isinstance(content[key], Mapping)]
    if nested and any(key in content for keys in _NESTED.values() for key in keys):
        raise UserError(f"{path} has no {weights} weights; it has {listed(nested)}: pass another --weights")
    return _only_tensors(content, path)


def _only_tensors(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    others = [f"{name} ({type(value).__name__})" for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(f"{path} holds what are no tensors where a state dict is expected: {listed(others)}")
    if not content:
        raise UserError(f"{path} holds no tensors")
    return {str(name): tensor for name, tensor in content.items()}
