"""What a set of samples was made of: enough to make the same again, and nothing about the machine's folders."""

import contextlib
import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_json
from pipeline.runtime.gate import Count, Finite, Passed, parse_json, read_regular, shortened, typed
from pipeline.runtime.publish import finish, work_folder_of
from pipeline.runtime.work_queue import Presence
from sample.options import SampleOptions
from sample.outputs import Output, is_image_name, is_intact
from sample.work_folder import PLAN, differences, is_plan

FORMAT = "dit-samples"
VERSION = 1
PACKAGES = ("dit-pipeline", "torch", "diffusers", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True, eq=False)
class Network(Passed):
    """The weights that images were made by."""

    weights: str | None = None
    step: Count | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelRule(Passed):
    """How the classes were chosen."""

    rule: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe(Passed):
    """What images were made with, as far as it is asked for later; None is what is not said."""

    checkpoint: Network | None = None
    guide: Network | None = None
    labels: LabelRule | None = None
    sampler: str | None = None
    steps: Count | None = None
    timesteps: tuple[Finite, ...] | None = None
    eta: Finite | None = None
    guidance: Finite | None = None
    guidance_interval: tuple[Finite, Finite] | None = None
    guidance_channels: str | int | None = None
    guidance_source: str | None = None
    middle_guidance: Finite | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Sidecar(Passed):
    """The JSON beside an output."""

    recipe: Recipe
    output: Output
    strip: Output | None = None
    """Of --trajectory; old sidecars say nothing of it."""


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


def same_recipe(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two recipes make the same images: all but the libraries' versions is equal."""
    return without_versions(first) == without_versions(second)


def without_versions(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What tells whether two recipes make the same images."""
    return {name: value for name, value in recipe.items() if name != "versions"}


def write(
    path: Path, recipe: Mapping[str, Any], output: Mapping[str, Any], strip: Mapping[str, Any] | None = None
) -> None:
    """Write the sidecar at its place in the stage; it appears together with its output and the strip."""
    content = {"format": FORMAT, "version": VERSION, "recipe": dict(recipe), "output": dict(output)}
    write_json(path, content if strip is None else {**content, "strip": dict(strip)})


def read_sidecar(out: Path) -> Sidecar | None:
    """The JSON beside an output of ours; None where there is none or it is not ours.

    Raises:
        UserError: it was written by a newer version, or its values are of other types.
    """
    with contextlib.suppress(OSError):  # a folder that may not be written to
        finish(out)
    path = sidecar_of(out)
    if not path.is_file():
        return None
    try:
        data = read_regular(path)
    except (UserError, OSError):  # none of ours
        return None
    return parse_sidecar(data, path)


def parse_sidecar(data: bytes, path: Path | str) -> Sidecar | None:
    """What the JSON of that place says; None where it is none, or not ours.

    Raises:
        UserError: it was written by a newer version, or its values are of other types.
    """
    try:
        content = parse_json(data, path)
    except UserError:
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    if (version := content.get("version")) != VERSION:
        raise UserError(
            f"{path} is of version {shortened(version)}, but this program knows version {VERSION}; upgrade it"
        )
    advice = "restore it, or remove it together with what it describes"
    return typed(content, Sidecar, f"{path} is damaged", advice=advice)


def strip_of(out: Path) -> Path:
    """Where the denoising strip of an output goes."""
    return out.with_name(f"{out.stem}.trajectory.png")


def is_finished(options: SampleOptions, recipe: dict[str, Any]) -> bool:
    """Whether the output is there already, made by this very recipe; if not, whether it may be made.

    Raises:
        UserError: something else is in the way that may not, or not without --overwrite, be replaced.
    """
    out, strip = options.path, strip_of(options.path)
    sidecar = read_sidecar(out)
    if sidecar is not None and same_recipe(sidecar.recipe, recipe) and out.exists():
        strip_there = options.trajectory is None or strip.is_file()
        changed = _changed(options, sidecar)
        if strip_there and not changed:
            return True
        if not options.overwrite:
            what = (
                f"{changed[0]} is not what its JSON says" if strip_there else f"{strip} is gone, though {out} is there"
            )
            raise UserError(f"{what} ({sidecar_of(out)}); pass --overwrite to make it again")
        _check_kind(out, options.kind, ours=True)
        return False
    _check_kind(out, options.kind, ours=sidecar is not None)
    if not options.overwrite:
        _check_free(options, sidecar, recipe)
    return False


def _changed(options: SampleOptions, sidecar: Sidecar) -> list[Path]:
    """The output, the strip, or both, as far as they are not what the sidecar says; old ones say nothing of strips."""
    described = {options.path: sidecar.output}
    if options.trajectory is not None and sidecar.strip is not None:
        described[strip_of(options.path)] = sidecar.strip
    return [path for path, description in described.items() if not is_intact(path, description)]


def sweep(out: Path, recipe: dict[str, Any], *, of_others: bool) -> None:
    """Remove the work folder that a kill left behind after its output was finished.

    Args:
        of_others: also unfinished work for another output of this name, which --overwrite drops.
    """
    folder = work_folder_of(out)
    if not folder.exists():
        return
    with Presence(folder) as here, here.last() as alone:
        if alone and (of_others or is_plan(folder, recipe) or not (folder / PLAN).exists()):
            here.remove_folder()


def _check_kind(out: Path, kind: str, *, ours: bool) -> None:
    """A folder never gives way to a file or the other way round, and a folder of other things is never replaced."""
    if kind != "folder":
        if out.is_dir():
            raise UserError(f"--out {out} is a folder; for single PNGs write --out {out}/, or name another file")
    elif out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, but a folder of PNGs is to go there; name another folder")
    elif out.is_dir() and (foreign_files := _foreign_files(out) if ours else sorted(out.iterdir())):
        raise UserError(
            f"--out {out}/ holds other things ({foreign_files[0].relative_to(out)}); move them away, or name a folder "
            f"that is empty or not there yet"
        )


def _foreign_files(folder: Path) -> list[Path]:
    """The files in a folder of ours that are no images of ours."""
    files = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(path for path in files if not is_image_name(path.relative_to(folder).as_posix()))


def _check_free(options: SampleOptions, sidecar: Sidecar | None, recipe: dict[str, Any]) -> None:
    out = options.path
    if out.exists() and not (out.is_dir() and sidecar is None):
        how = f", made another way ({differences(dict(sidecar.recipe), recipe)})" if sidecar else ""
        raise UserError(f"{out} is there already{how}; pass --overwrite to replace it, or name another --out")
    others = [sidecar_of(out)] if sidecar is None else []
    if options.trajectory is not None:
        others.append(strip_of(out))
    for path in others:
        if path.exists():
            raise UserError(f"{path} is in the way; pass --overwrite to replace it, or name another --out")
