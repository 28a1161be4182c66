"""The options of `dit-sample`, in the groups that the parts of the stage read. No torch: `--help` must be quick."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro
from msgspec import Meta

from pipeline.diffusion.process import OBJECTIVES, Objective
from pipeline.diffusion.samplers import samplers_help, takes_eta
from pipeline.runtime.bounds import (
    Batch,
    Images,
    ReverseSteps,
    Scale,
    Seed,
    Share,
    Threads,
    Time,
    are_within,
    check_bounds,
)
from pipeline.runtime.config_files import BY_COMMAS
from pipeline.runtime.errors import UserError

SUFFIXES = {".png": "grid", ".npz": "npz", ".safetensors": "latents"}
CHANNELS = {"all": None, "3": 3}
GuidedChannels: TypeAlias = Annotated[
    int | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{all,3}",
        instance_from_str=lambda written: CHANNELS[written[0]],
        is_instance=lambda value: value in CHANNELS.values(),
        str_from_instance=lambda value: [written for written, channels in CHANNELS.items() if channels == value],
        choices=tuple(CHANNELS),
    ),
]
GRID_PIXELS = 80_000_000  # in one picture: beyond this Pillow warns whoever opens it


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageOptions:
    """Which classes, and how many images of each."""

    classes: Annotated[str | None, BY_COMMAS] = None
    """Classes, separated by commas: labels, folder names (synsets) or readable names, as in "0,7,golden retriever". Default: all of them; more than 20 without --num-samples: eight drawn by the seed."""
    samples_per_class: Images | None = None
    """Images of each class, in rows by class. Default 8, unless --num-samples is given."""
    num_samples: Images | None = None
    """Images in all; their classes follow --labels."""
    labels: str | None = None
    """How --num-samples images get their classes: random (uniform, by the seed), balanced (each in turn), or a FILE (.txt with one class a line, .npy, or the arr_1 of an .npz). Default random."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.samples_per_class is not None and (self.num_samples is not None or self.labels is not None):
            raise UserError("--samples-per-class excludes --num-samples and --labels; give one or the others")
        if self.labels in {"random", "balanced"} and self.num_samples is None:
            raise UserError(f"--labels {self.labels} needs --num-samples, the number of images in all")
        if self.classes is not None and self.labels not in {None, "random", "balanced"}:
            raise UserError(f"--labels {self.labels} names a file, which excludes --classes; drop one of the two")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReverseOptions:
    """How noise becomes a latent."""

    sampler: Annotated[str | None, tyro.conf.arg(help=samplers_help())] = None
    quality: Literal["fast"] | None = None
    """fast takes settings that measured as good as 250 ancestral steps with a twentieth of the passes, where nothing else is said: a sampler, its steps, a guidance interval. Default: the paper's."""
    steps: ReverseSteps | None = None
    """Steps of the reverse process. Default 250, or as many as --timesteps has."""
    timesteps: Annotated[str | None, BY_COMMAS, tyro.conf.arg(metavar="LIST")] = None
    """Where the steps begin, from noise to data, separated by commas: times of a flow, as in 1,0.8,0.5,0.2, or timesteps of a diffusion's training, as in 999,700,300,0. Default: where the sampler has them begin."""
    eta: Annotated[
        Share, tyro.conf.arg(help=f"Noise of {takes_eta()}: 0 is deterministic, 1 adds as much as ddpm.")
    ] = 0.0
    guidance: Scale | None = None
    """Guidance scale; 1 is none and costs half. Default 4.0 where the network was trained with label dropout, else 1; 2.0 with --guide."""
    guide: Annotated[str | None, tyro.conf.arg(metavar="CHECKPOINT[@WEIGHTS]")] = None
    """Guide away from another network's prediction in place of the missing class (autoguidance): a smaller or less trained one, such as an earlier checkpoint of the run, with its ema, raw or NAME weights. Default: ema."""
    guidance_source: Literal["class", "middle", "both"] = "class"
    """What to guide away from: the missing class, the middle head (dit-train --middle-head; one pass a step), or both."""
    middle_guidance: Scale = 1.4
    """Scale of the middle head with --guidance-source both; with middle alone --guidance is its scale (default 1.4)."""
    guidance_channels: GuidedChannels = None
    """Latent channels to guide: all, or the first 3 as the released model did."""
    guidance_interval: str | None = None
    """A:B, guide only while the time (0 data, 1 noise) is within it, as in 0.2:0.8. Default: always."""
    objective: Annotated[Objective | None, tyro.conf.arg(metavar="|".join(OBJECTIVES))] = None
    """What bare weights were trained for, which they do not say: sit for SiT's, repa for REPA's. Default: what the checkpoint says."""
    num_heads: Annotated[Threads | None, tyro.conf.arg(metavar="INT")] = None
    """Attention heads of bare weights whose width is none of the published ones."""
    seed: Annotated[Seed, tyro.conf.arg(metavar="INT")] = 0
    """Image k depends on this and on k alone."""

    def __post_init__(self) -> None:
        check_bounds(self)
        _ = self.interval, self.times

    @property
    def times(self) -> tuple[float, ...] | None:
        """The list of --timesteps as numbers.

        Raises:
            UserError: it is no list of numbers.
        """
        if self.timesteps is None:
            return None
        try:
            times = tuple(float(word) for word in self.timesteps.split(","))
        except ValueError:
            times = (math.nan,)
        if not are_within(times, Time):
            raise UserError(f"--timesteps {self.timesteps} must be numbers from 0 on with commas between them")
        return times

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
        if not bounds[0] < bounds[1] or not are_within(bounds, Share):
            raise UserError(
                f"--guidance-interval {self.guidance_interval} must be A:B with 0 ≤ A < B ≤ 1, as in 0.2:0.8"
            )
        return bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class EditOptions:
    """Images that begin as others."""

    vary: Annotated[str | None, tyro.conf.arg(metavar="LATENTS@T")] = None
    """Vary images: image k begins as latent k of a .safetensors of dit-sample's, with the noise of time T from data (0) to noise (1), as in made.safetensors@0.6. Default: one image of each latent, of its class."""
    inpaint: Annotated[str | None, tyro.conf.arg(metavar="LATENTS@MASK")] = None
    """Make a part anew: image k is latent k of a .safetensors of dit-sample's, but where MASK, a picture, is white."""
    interpolate: Annotated[Seed | None, tyro.conf.arg(metavar="INT")] = None
    """Go from image 0 of --seed to image 0 of this seed in the --samples-per-class images of every class, each row a strip."""
    interpolate_class: Annotated[str | None, tyro.conf.arg(metavar="CLASS")] = None
    """Go from the row's class to this one in the same way, all from image 0's noise; with --interpolate both at once. Each step costs two passes in place of one."""

    def __post_init__(self) -> None:
        check_bounds(self)
        between = "--interpolate" if self.interpolate is not None else "--interpolate-class"
        asked = {"--vary": self.vary is not None, "--inpaint": self.inpaint is not None, between: self.interpolates}
        given = [flag for flag, is_given in asked.items() if is_given]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are two ways to begin; give one")
        if self.inpaint is not None and not all(self.inpaint.rpartition("@")):
            raise UserError(f"--inpaint {self.inpaint} must be LATENTS@MASK, as in made.safetensors@mask.png")
        _ = self.share

    @property
    def interpolates(self) -> bool:
        """Whether rows go from one seed or class to another."""
        return self.interpolate is not None or self.interpolate_class is not None

    @property
    def share(self) -> float:
        """T of --vary; 1, all noise, without it.

        Raises:
            UserError: it is no number above 0 and at most 1.
        """
        if self.vary is None:
            return 1.0
        try:
            share = float(self.vary.rpartition("@")[2])
        except ValueError:
            share = 0.0
        if not 0 < share <= 1 or not self.vary.rpartition("@")[0]:
            raise UserError(f"--vary {self.vary} must be LATENTS@T with 0 < T ≤ 1, as in made.safetensors@0.6")
        return share

    @property
    def mask(self) -> Path:
        """MASK of --inpaint."""
        return Path((self.inpaint or "").rpartition("@")[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeOptions:
    """On what, and in which precision."""

    batch_size: Batch | None = None
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
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOptions:
    """What `dit-sample` is asked to make."""

    checkpoint: str
    """A run folder (its newest checkpoint), a checkpoint folder, the URL of either, or any form that dit-convert knows."""
    out: str
    """What to write: PATH.png a labelled grid, PATH.npz the images and labels as ADM's tools want them, PATH.safetensors raw latents, FOLDER/ single PNGs by class; or the URL of one, s3://bucket/PATH.npz. PATH.json beside it tells how to make the same again."""
    weights: str = "ema"
    """Weights to sample with: ema, raw, the NAME of a further EMA, or sigma=S for a power-function average made of those that the run keeps."""
    verify_weights: bool = True
    """Compare the weights with the checksums that were recorded for them."""
    vae: str | None = None
    """The VAE that decodes: a Hub name, a folder, or demo. Default: the one the checkpoint names; another one must be the same by its fingerprint."""
    allow_other_vae: bool = False
    """Decode with --vae even if its fingerprint is not the checkpoint's."""
    trajectory: Annotated[int, Meta(ge=2, le=1000)] | None = None
    """Also draw a strip of N moments of the reverse process, as PATH.trajectory.png."""
    overwrite: bool = False
    """Replace an output that was made another way."""
    images: ImageOptions = field(default_factory=ImageOptions)
    reverse: ReverseOptions = field(default_factory=ReverseOptions)
    edit: EditOptions = field(default_factory=EditOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    def __post_init__(self) -> None:
        check_bounds(self)
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
