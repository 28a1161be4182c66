"""The options of `dit-convert`. No torch: `--help` must be quick."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pipeline.diffusion.process import OBJECTIVES, Objective
from pipeline.runtime.errors import UserError

Format = Literal["dit", "facebook", "diffusers", "store"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """What to convert into what."""

    from_: Annotated[str, tyro.conf.arg(name="from", metavar="PATH")]
    """A run, a checkpoint folder, a state dict (.pt, .pth, .safetensors), a diffusers folder or a Hub name of one;
    for --format store a folder of features (*_features/*.npy beside *_labels/*.npy)."""
    to: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Where to write: a folder; for --format facebook a file that ends in .pt or .safetensors."""
    format: Format
    """dit: a checkpoint of this project. facebook: a state dict in the public release's names. diffusers: a folder
    for DiTPipeline.from_pretrained. store: a latent store."""
    weights: Annotated[str, tyro.conf.arg(metavar="ema|raw|NAME")] = "ema"
    """Which weights to convert: ema, raw, or the NAME of another average."""
    num_heads: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Attention heads of a bare state dict whose width is none of the published ones."""
    objective: Annotated[Objective | None, tyro.conf.arg(metavar="|".join(OBJECTIVES))] = None
    """What bare weights were trained for, which they do not say: sit for SiT's, repa for REPA's. Default: what they
    say, and the release's ddpm where they are like the release's."""
    vae: str | None = None
    """The VAE of the latents: demo, a Hub name or a folder. Default: the recorded one, or
    stabilityai/sd-vae-ft-ema where none is."""
    class_names: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file with one class name per line, label 0 first, for weights that come without names. Default: the
    recorded names, or ImageNet's for 1000 classes."""
    verify_weights: bool = True
    """Compare the weights with the checksums that were recorded for them."""
    overwrite: bool = False
    """Replace what an earlier conversion left at --to. (A store that was begun is continued without it.)"""

    def __post_init__(self) -> None:
        if self.num_heads is not None and self.num_heads < 1:
            raise UserError(f"--num-heads {self.num_heads} must be at least 1")
        if self.format == "facebook" and not self.to.endswith((".pt", ".safetensors")):
            raise UserError(f"--to {self.to} must end in .pt or .safetensors for --format facebook, which is one file")
