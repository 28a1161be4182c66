"""The options of `dit-inspect`. No torch: `--help` must be quick."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.diffusion.process import OBJECTIVES, Objective
from pipeline.runtime.bounds import Batch, Shown, Threads, check_bounds
from pipeline.runtime.config_files import BY_COMMAS
from pipeline.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectOptions:
    """What to look at."""

    path: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")] = None
    """A latent store, a run or a checkpoint in any form (folder or URL), or a Hub name of a diffusers DiT pipeline."""
    verify: bool = False
    """Read everything and check it: every shard's checksum, or every tensor of the weights."""
    grid: Annotated[str | None, tyro.conf.arg(metavar="PNG")] = None
    """Decode some of a store's latents and write them as a labelled contact sheet."""
    classes: Annotated[str | None, BY_COMMAS] = None
    """Classes for --grid, separated by commas: labels, folder names or readable names. Default: the first ten."""
    per_class: Shown = 8
    """Images of each class in --grid (of all together where there are no classes: eight times as many)."""
    vae: str | None = None
    """The VAE for --grid, where the recorded name is not enough to find it: demo, a Hub name or a folder."""
    num_heads: Annotated[Threads | None, tyro.conf.arg(metavar="INT")] = None
    """Attention heads of a bare state dict whose width is none of the published ones."""
    objective: Annotated[Objective | None, tyro.conf.arg(metavar="|".join(OBJECTIVES))] = None
    """What bare weights were trained for, which they do not say: sit for SiT's, repa for REPA's. Default: what they
    say."""
    models: bool = False
    """Print the paper's table of models, our parameters and operations beside the paper's."""
    batch_size: Annotated[Batch | None, tyro.conf.arg(metavar="INT")] = None
    """With --models: what a GPU would hold in training with this batch, over --processes."""
    processes: Batch = 1
    """Processes, one GPU each, that share --batch-size."""
    machine: bool = False
    """Print this machine's device, precision, attention kernel, memory and versions; with a PATH, what its disk can do."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.path is None and not self.models and not self.machine:
            raise UserError("give the PATH of a store or a checkpoint, or --models, or --machine")
        if self.machine and (self.models or self.verify or self.grid):
            raise UserError("--machine looks at the machine and the disk of PATH alone; leave the other flags out")
        if self.path is None and (self.verify or self.grid):
            raise UserError("--verify and --grid need the PATH of a store or a checkpoint")
        if self.classes is not None and self.grid is None:
            raise UserError("--classes chooses what --grid draws; give --grid PNG too")
        if self.grid is not None and not self.grid.lower().endswith(".png"):
            raise UserError(f"--grid {self.grid} must end in .png")
        if self.batch_size is not None and not self.models:
            raise UserError("--batch-size says what training the table's models takes; give --models too")
        if self.batch_size is not None and self.processes > self.batch_size:
            raise UserError(f"--batch-size {self.batch_size} must be no less than --processes")
        if self.batch_size is None and self.processes != 1:
            raise UserError("--processes shares --batch-size among GPUs; give that too")
