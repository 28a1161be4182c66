"""Files of weights, anyone's: safetensors, or pickles that are opened without running them.

The only module that calls `torch.load` and `torch.save`. Unpickling is restricted to tensors and plain containers
(`weights_only=True`); a file that would call anything else is refused, not run, and so is one that asks for more memory
than it has bytes (`pickles.py`).
"""

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from pipeline.checkpoint.pickles import ClaimError, is_zip, look_through
from pipeline.checkpoint.tensor_files import (
    PROCESS,
    check_readable,
    files_of,
    join_names,
    plain_names,
    read_header,
    read_tensors,
)
from pipeline.runtime.console import printable
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes
from pipeline.runtime.gate import shortened

PICKLED: Final = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES: Final = (".safetensors", *PICKLED)
# Where training scripts put a network's weights inside a larger file, most wanted first.
_NESTED = {"ema": ("ema", "model_ema", "model", "state_dict"), "raw": ("model", "state_dict")}


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
        tensors = plain_names(read_tensors(path), origin=path)
        told = read_header(files_of(path)[-1]).get("__metadata__", {}).get(PROCESS)
        return WeightFile(tensors, {} if told is None else {PROCESS: told}, 0)
    raise UserError(f"{path} is no weight file that is known here; its name must end in {', '.join(SUFFIXES)}")


def load_pickled_tensors(path: Path, *, weights: str = "ema") -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`, under plain names, without running anything in it.

    A training checkpoint holds several: "ema" is preferred, then "model"; `weights="raw"` takes "model".

    Raises:
        UserError: the file is missing or damaged, would run code, or holds no state dict (of that kind).
    """
    return plain_names(_choose(_unpickled(path), weights, path), origin=path)


def _unpickled(path: Path) -> Any:
    check_readable(path)
    strange, fault = look_through(path)
    if strange:
        raise UserError(
            f"{path} is refused: opening it would run code ({printable(', '.join(strange))}), and only tensors in "
            f"plain containers are read; ask its author for a .safetensors file"
        )
    if isinstance(fault, ClaimError):
        raise UserError(f"{path} is damaged: {fault}; restore it, or load and save it again by the torch that wrote it")
    if fault is not None:
        raise UserError(_is_damaged(path, fault)) from fault
    try:
        # The release's own training checkpoints carry their options: a Namespace is a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's age; what matters is in the error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))  # noqa: TID251 -- the one place
    except Exception as error:  # a damaged archive shows as almost any exception
        raise UserError(_is_damaged(path, error)) from error


def _is_damaged(path: Path, error: Exception) -> str:
    return f"{path} is damaged or no file of torch.save ({_first_line(error)}); restore or remake it"


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


def holds_tensors(path: Path) -> bool:
    """Whether a file is one of weights, by its contents and its name, without reading all of them."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            check_readable(path)
            with safe_open(path, framework="pt") as file:
                return bool(file.keys())
        return bool(load_pickled_tensors(path))
    except (UserError, SafetensorError, OSError):
        return False


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
