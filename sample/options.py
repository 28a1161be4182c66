"""The options of `dit-sample`, in the groups that the parts of the stage read. No torch: `--help` must be quick."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.diffusion.process import OBJECTIVES, Objective
from pipeline.diffusion.samplers import samplers_help, takes_eta
from pipeline.runtime.config_files import BY_COMMAS
from pipeline.runtime.errors import UserError

SUFFIXES = {".png": "grid", ".npz": "npz", ".safetensors": "latents"}
CHANNELS = {"all": None, "3": 3}
GRID_PIXELS = 80_000_000  # in one picture: beyond this Pillow warns whoever opens it


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """Which classes, and how many images of each."""

    classes: Annotated[str | None, BY_COMMAS] = None
    """Classes, separated by commas: labels, folder names (synsets) or readable names, as in "0,7,golden retriever". Default: all of them; more than 20 without --num-samples: eight drawn by the seed."""
    samples_per_class: int | None = None
    """Images of each class, in rows by class. Default 8, unless --num-samples is given."""
    num_samples: int | None = None
    """Images in all; their classes follow --labels."""
    labels: str | None = None
    """How --num-samples images get their classes: random (uniform, by the seed), balanced (each in turn), or a FILE (.txt with one class a line, .npy, or the arr_1 of an .npz). Default random."""

    def __post_init__(self) -> None:
        if self.samples_per_class is not None and (self.num_samples is not None or self.labels is not None):
            raise UserError("--samples-per-class excludes --num-samples and --labels; give one or the others")
        for flag, value in (("--samples-per-class", self.samples_per_class), ("--num-samples", self.num_samples)):
            if value is not None and value < 1:
                raise UserError(f"{flag} {value} must be at least 1")
        if self.labels in {"random", "balanced"} and self.num_samples is None:
            raise UserError(f"--labels {self.labels} needs --num-samples, the number of images in all")
        if self.classes is not None and self.labels not in {None, "random", "balanced"}:
            raise UserError(f"--labels {self.labels} names a file, which excludes --classes; drop one of the two")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReverseOptions:
    """How noise becomes a latent."""

    sampler: Annotated[str | None, tyro.conf.arg(help=samplers_help())] = None
    steps: int = 250
    """Steps of the reverse process."""
    eta: Annotated[
        float, tyro.conf.arg(help=f"Noise of {takes_eta()}: 0 is deterministic, 1 adds as much as ddpm.")
    ] = 0.0
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none and costs half. Default 4.0 where the network was trained with label dropout, else 1."""
    guidance_channels: Annotated[
        int | None,
        tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{all,3}",
            instance_from_str=lambda written: CHANNELS[written[0]],
            is_instance=lambda value: value in CHANNELS.values(),
            str_from_instance=lambda value: [written for written, channels in CHANNELS.items() if channels == value],
            choices=tuple(CHANNELS),
        ),
    ] = None
    """Latent channels to guide: all, or the first 3 as the released model did."""
    guidance_interval: str | None = None
    """A:B, guide only while the time (0 data, 1 noise) is within it, as in 0.2:0.8. Default: always."""
    objective: Annotated[Objective | None, tyro.conf.arg(metavar="|".join(OBJECTIVES))] = None
    """What bare weights were trained for, which they do not say: sit for SiT's, repa for REPA's. Default: what the checkpoint says."""
    num_heads: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Attention heads of bare weights whose width is none of the published ones."""
    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Image k depends on this and on k alone."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"--steps {self.steps} must be at least 1")
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"--eta {self.eta} must lie in 0 … 1")
        if self.num_heads is not None and self.num_heads < 1:
            raise UserError(f"--num-heads {self.num_heads} must be at least 1")
        if self.guidance is not None and not 0.0 <= self.guidance < float("inf"):
            raise UserError(f"--guidance {self.guidance} must be a number from 0 on; 1 is no guidance")
        _ = self.interval

    @property
    def interval(self) -> tuple[float, float] | None:
        """The guidance interval as (low, high) fractions of time.

        Raises:
            UserError: it is not two numbers A:B with 0 ≤ A < B ≤ 1.
        """
        if self.guidance_interval is None:
            return None
        low, _, high = self.guidance_interval.partition(":")
        try:
            bounds = float(low), float(high)
        except ValueError:
            bounds = (1.0, 0.0)
        if not 0.0 <= bounds[0] < bounds[1] <= 1.0:
            raise UserError(
                f"--guidance-interval {self.guidance_interval} must be A:B with 0 ≤ A < B ≤ 1, as in 0.2:0.8"
            )
        return bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeOptions:
    """On what, and in which precision."""

    batch_size: int | None = None
    """Images in one batch and one unit of work; every batch is padded to it, so pixels depend on it by at most one level. Default: what the job needs, up to 64 (128 on a GPU)."""
    device: str = "auto"
    """auto (an accelerator if there is one), cpu, cuda, cuda:N, or another accelerator that torch names, such as mps."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the network's matrix products: auto is bf16 on a GPU that has it, else no (float32)."""
    decode_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the VAE's decoder."""
    compile: bool = False
    """Compile the network's blocks first: minutes once, then faster. On a GPU only."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOptions:
    """What `dit-sample` is asked to make."""

    checkpoint: str
    """A run folder (its newest checkpoint), a checkpoint folder, or any form that dit-convert knows."""
    out: str
    """What to write: PATH.png a labelled grid, PATH.npz the images and labels as ADM's tools want them, PATH.safetensors raw latents, FOLDER/ single PNGs by class. PATH.json beside it tells how to make the same again."""
    weights: str = "ema"
    """Weights to sample with: ema, raw, or the NAME of a further EMA."""
    verify_weights: bool = True
    """Compare the weights with the checksums that were recorded for them."""
    vae: str | None = None
    """The VAE that decodes: a Hub name, a folder, or demo. Default: the one the checkpoint names; another one must be the same by its fingerprint."""
    allow_other_vae: bool = False
    """Decode with --vae even if its fingerprint is not the checkpoint's."""
    trajectory: int | None = None
    """Also draw a strip of N moments of the reverse process, as PATH.trajectory.png."""
    overwrite: bool = False
    """Replace an output that was made another way."""
    images: ImageOptions = field(default_factory=ImageOptions)
    reverse: ReverseOptions = field(default_factory=ReverseOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    def __post_init__(self) -> None:
        if self.trajectory is not None and self.trajectory < 2:
            raise UserError(f"--trajectory {self.trajectory} must be at least 2 moments")
        if self.trajectory is not None and self.kind == "latents":
            raise UserError("--trajectory draws pictures, but --out *.safetensors decodes none; choose another --out")
        if Path(self.out).name in {"", ".."}:
            raise UserError(f"--out {self.out!r} names no file or folder of its own; use PATH.png, PATH.npz or FOLDER/")
        suffix = Path(self.out).suffix
        folder = self.out.endswith("/") or Path(self.out).is_dir()
        if suffix not in SUFFIXES and re.fullmatch(r"\.[A-Za-z]\w*", suffix) and not folder:
            raise UserError(f"--out {self.out} ends in {suffix}; use .png, .npz, .safetensors, or FOLDER/")

    @property
    def path(self) -> Path:
        return Path(self.out)

    @property
    def kind(self) -> str:
        """What --out asks for: grid, npz, latents or folder."""
        return "folder" if self.out.endswith("/") else SUFFIXES.get(self.path.suffix, "folder")
