"""What a set of samples was made of: enough to make the same again, and nothing about the machine's folders."""

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import read_json, write_json

FORMAT = "dit-samples"
VERSION = 1
PACKAGES = ("dit-pipeline", "torch", "diffusers", "numpy", "pillow")


def sidecar_of(out: Path) -> Path:
    """Where the description of `out` stands: beside it, `.json` added to its whole name."""
    return out.with_name(f"{out.name}.json")


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, in the names' order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what the pixels depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "not installed"
    return {**found, "torch": str(torch.__version__)}  # with its build, which the package's version may leave out


def same_recipe(first: Any, second: Mapping[str, Any]) -> bool:
    """Whether two recipes make the same images: all but the libraries' versions is equal."""
    return isinstance(first, dict) and _without_versions(first) == _without_versions(second)


def _without_versions(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name != "versions"}


def write(out: Path, recipe: Mapping[str, Any], output: Mapping[str, Any]) -> None:
    """Write the sidecar; it comes after the output, so that it never describes one that is not whole."""
    content = {"format": FORMAT, "version": VERSION, "recipe": dict(recipe), "output": dict(output)}
    write_json(sidecar_of(out), content)


def read_sidecar(out: Path) -> dict[str, Any] | None:
    """The JSON beside an output of ours; None where there is none or it is not ours.

    Raises:
        UserError: it was written by a newer version.
    """
    path = sidecar_of(out)
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except UserError:  # no JSON: none of ours
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    if content.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {content.get('version')}, but this program knows version {VERSION}; upgrade it"
        )
    return content
