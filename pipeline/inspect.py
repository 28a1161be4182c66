"""`dit-inspect`: what a latent store or a checkpoint holds, whether it is whole, and what it looks like."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.console import run_command
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectOptions:
    """What to look at."""

    path: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")] = None
    """A latent store (folder or URL), a run, a checkpoint in any form, or a Hub name of a diffusers DiT pipeline."""
    verify: bool = False
    """Read everything and check it: every shard's checksum, or every tensor of the weights."""
    grid: Annotated[str | None, tyro.conf.arg(metavar="PNG")] = None
    """Decode some of a store's latents and write them as a labelled contact sheet."""
    classes: str | None = None
    """Classes for --grid, separated by commas: labels, folder names or readable names. Default: the first ten."""
    per_class: int = 8
    """Images of each class in --grid (of all together where there are no classes: eight times as many)."""
    vae: str | None = None
    """The VAE for --grid, where the recorded name is not enough to find it: demo, a Hub name or a folder."""
    num_heads: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Attention heads of a bare state dict whose width is none of the published ones."""
    models: bool = False
    """Print the paper's table of models, our parameters and operations beside the paper's."""

    def __post_init__(self) -> None:
        if self.path is None and not self.models:
            raise UserError("give the PATH of a store or a checkpoint, or --models")
        if self.path is None and (self.verify or self.grid):
            raise UserError("--verify and --grid need the PATH of a store or a checkpoint")
        if self.classes is not None and self.grid is None:
            raise UserError("--classes chooses what --grid draws; give --grid PNG too")
        if self.grid is not None and not self.grid.lower().endswith(".png"):
            raise UserError(f"--grid {self.grid} must end in .png")
        if self.per_class < 1:
            raise UserError(f"--per-class {self.per_class} must be at least 1")


def is_store(path: str) -> bool:
    """Whether a path is, or was going to be, a latent store: it has a manifest, or shards with their records."""
    if "://" in path:
        return True
    folder = Path(path)
    return (folder / "manifest.json").exists() or any(folder.glob("*-[0-9][0-9][0-9][0-9][0-9].json"))


def run(options: InspectOptions) -> None:
    """Print what is asked for to standard output."""
    if options.models:
        from pipeline.inspection.models import describe_models

        _write(describe_models())
    if options.path is None:
        return
    if is_store(options.path):
        from pipeline.inspection.store import describe_store, draw_store, verify_store

        _write(describe_store(options.path))
        if options.verify:
            _write(verify_store(options.path))
        if options.grid is not None:
            _write(draw_store(options.path, Path(options.grid), options))
        return
    if options.grid is not None:
        raise UserError(f"--grid draws a store, and {options.path} is none; draw a checkpoint's images with dit-sample")
    from pipeline.inspection.checkpoint import describe_checkpoint

    _write(describe_checkpoint(options.path, verify=options.verify, num_heads=options.num_heads))


def _write(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")


def main() -> int:
    """The command's exit status."""
    return run_command(
        InspectOptions,
        run,
        prog="dit-inspect",
        description="Show what a latent store or a checkpoint holds, and check it.",
    )


if __name__ == "__main__":
    sys.exit(main())
