"""The options of `dit-convert`. No torch: `--help` must be quick."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pipeline.convert.layouts import LAYOUTS, LAYOUTS_HELP, LayoutName
from pipeline.diffusion.process import OBJECTIVES, Objective
from pipeline.hub import HUB, HUB_NAME
from pipeline.runtime.bounds import AmountOrNone, Sigma, Threads, check_bounds
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import shortened

Format = Literal["dit", "facebook", "diffusers", "store"]
LAYOUT_HELP = (
    f"For --format store: how --from is laid out, where what is found by itself is not what is meant: {LAYOUTS_HELP}."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """What to convert into what."""

    from_: Annotated[str, tyro.conf.arg(name="from", metavar="PATH")]
    """A run, a checkpoint folder, a state dict (.pt, .pth, .safetensors), a diffusers folder or a Hub name of one;
    for --format store what another project saved its latents in."""
    to: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Where to write: a folder; for --format facebook a file that ends in .pt or .safetensors; for dit and diffusers
    also hf:OWNER/NAME, a repository on the Hugging Face Hub (log in with `hf auth login`, or set HF_TOKEN)."""
    format: Format
    """dit: a checkpoint of this project. facebook: a state dict in the public release's names. diffusers: a folder
    for DiTPipeline.from_pretrained. store: a latent store."""
    weights: Annotated[str, tyro.conf.arg(metavar="ema|raw|NAME")] = "ema"
    """Which weights to convert: ema, raw, or the NAME of another average."""
    average: Annotated[Sigma | None, tyro.conf.arg(metavar="SIGMA")] = None
    """In place of --weights: the power-function average of this relative width, as in 0.08, made of those that the
    run keeps (dit-train --ema-sigma); it becomes the ema weights of what is written."""
    at_step: Annotated[AmountOrNone | None, tyro.conf.arg(metavar="N")] = None
    """Make --average as of this step, one at which the run took snapshots. Default: the checkpoint's."""
    num_heads: Annotated[Threads | None, tyro.conf.arg(metavar="INT")] = None
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
    layout: Annotated[LayoutName | None, tyro.conf.arg(metavar="|".join(LAYOUTS), help=LAYOUT_HELP)] = None
    model_card: bool = False
    """Write README.md beside the weights: a model card made from the checkpoint. A repository on the Hub always gets
    one."""
    license: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """The licence that the model card states, as the Hub names it: apache-2.0, mit, cc-by-nc-4.0, other, … Needed for
    --to hf:OWNER/NAME."""
    results: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """The RESULT.json of dit-evaluate whose scores the model card shows. Default: RESULT.json or result.json in the
    checkpoint's or the run's folder."""
    picture: Annotated[str | None, tyro.conf.arg(metavar="PNG")] = None
    """Samples that the model card shows, as dit-sample draws them."""
    private: bool = False
    """Create the repository on the Hub as a private one."""
    overwrite: bool = False
    """Replace what an earlier conversion left at --to. (A store that was begun is continued without it.)"""

    @property
    def hub_name(self) -> str | None:
        """OWNER/NAME of the repository to write, or None for a place on a disk."""
        return self.to.removeprefix(HUB) if self.to.startswith(HUB) else None

    @property
    def writes_card(self) -> bool:
        return self.model_card or self.hub_name is not None

    @property
    def wanted_weights(self) -> str:
        """Which weights to read, in the words of `read_checkpoint`."""
        if self.average is None:
            return self.weights
        return f"sigma={self.average:g}" + (f"@{self.at_step}" if self.at_step is not None else "")

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.at_step is not None and self.average is None:
            raise UserError("--at-step says when --average SIGMA was; give that too")
        if self.average is not None and self.weights != "ema":
            raise UserError(f"--average {self.average:g} excludes --weights {self.weights}; drop one of the two")
        if self.layout is not None and self.format != "store":
            raise UserError(f"--layout {self.layout} is for --format store, not {self.format}; drop one of the two")
        self._check_card()
        if self.format == "facebook" and not self.to.endswith((".pt", ".safetensors")):
            raise UserError(f"--to {self.to} must end in .pt or .safetensors for --format facebook, which is one file")

    def _check_card(self) -> None:
        """Raise UserError for what a repository or a model card needs, or what asks for one where there is none."""
        if self.hub_name is not None:
            if not HUB_NAME.fullmatch(self.hub_name):
                raise UserError(f"--to {self.to} must be hf:OWNER/NAME, of letters, digits, '-', '_' and '.'")
            if self.license is None:
                raise UserError(
                    f"--to {self.to} publishes these weights: say under which licence with --license, as in apache-2.0, "
                    f"cc-by-nc-4.0 or other"
                )
        elif self.private:
            raise UserError(f"--private is for --to hf:OWNER/NAME, not {self.to}; drop it")
        if self.writes_card and self.format not in {"dit", "diffusers"}:
            raise UserError(f"a model card or a repository is for --format dit or diffusers, not {self.format}")
        given = {"license": self.license, "results": self.results, "picture": self.picture}
        lone = next((name for name, value in given.items() if value is not None and not self.writes_card), None)
        if lone is not None:
            raise UserError(f"--{lone} is for the model card; pass --model-card too, or drop it")
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", self.license):
            raise UserError(f"--license {shortened(self.license)} is no identifier such as apache-2.0, mit or other")
