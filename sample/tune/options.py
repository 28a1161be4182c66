"""The options of `dit-tune`. No torch: `--help` must be quick."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from msgspec import Meta

from pipeline.diffusion.process import OBJECTIVES, Objective
from pipeline.runtime.bounds import Images, Pixels, Scale, Seed, Share, Sigma, Threads, are_within, check_bounds
from pipeline.runtime.config_files import BY_COMMAS
from pipeline.runtime.errors import UserError
from sample.options import ComputeOptions, GuidedChannels, ReverseOptions
from sample.tune.search import Space, grid_of

ALWAYS = "always"


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions:
    """What `dit-tune` is asked to try, and against what."""

    checkpoint: str
    """A run folder (its newest checkpoint), a checkpoint folder, or any form that dit-convert knows."""
    reference: str
    """The images to compare with: a folder, an .npz of images or (with --features inception) of statistics, or a latent store."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Folder for the table and the picture, tune.json and tune.png, and for the result of every point, which is never made again."""
    guidance: Annotated[str | None, BY_COMMAS, tyro.conf.arg(metavar="LIST|A:B")] = None
    """Guidance scales: a list, as in 1,1.5,2, to try each, or a range A:B for a golden-section search. Default: dit-sample's."""
    guidance_interval: Annotated[str | None, BY_COMMAS, tyro.conf.arg(metavar="LIST")] = None
    """Guidance intervals to try, as in always,0.2:0.8. Default: always."""
    sigma: Annotated[str | None, BY_COMMAS, tyro.conf.arg(metavar="LIST|A:B")] = None
    """Relative widths of power-function averages (dit-train --ema-sigma) to sample with: a list, or a range A:B to search. Default: --weights."""
    weights: Annotated[str, BY_COMMAS, tyro.conf.arg(metavar="LIST")] = "ema"
    """Weights to try: ema, raw, NAME, sigma=S."""
    steps: Annotated[str | None, BY_COMMAS, tyro.conf.arg(metavar="LIST")] = None
    """Numbers of steps to try. Default: dit-sample's."""
    sampler: Annotated[str | None, BY_COMMAS, tyro.conf.arg(metavar="LIST")] = None
    """Samplers to try. Default: dit-sample's."""
    points: Annotated[int, Meta(ge=2, le=100)] = 8
    """Points of every golden-section search; each further one divides what is left of the range by 1.6."""
    num_samples: Images = 10_000
    """Images of every point, the same noise in each."""
    labels: str | None = None
    """Their classes: random (uniform, by the seed; the default), balanced, or a FILE, as in dit-sample."""
    repeat: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Sampling seeds of every point, --seed and those after it: means, their spread, and the cheapest setting within it."""
    seed: Annotated[Seed, tyro.conf.arg(metavar="INT")] = 0
    """Image k of every point depends on this and on k alone."""
    features: Annotated[str, tyro.conf.arg(metavar="inception|pixels|ENCODER")] = "inception"
    """What images are compared by, as in dit-evaluate: FID with the network's weights, FD-pixels without any, or FD under a vision encoder."""
    inception: Annotated[str | None, tyro.conf.arg(metavar="FILE|URL")] = None
    """Weights of the FID network, as in dit-evaluate. Default: the file in the cache."""
    image_size: Pixels | None = None
    """Centre-crop the images of a reference folder to this many pixels. Default: the checkpoint's size."""
    eta: Share = 0.0
    """Noise of ddim, in every point, as in dit-sample."""
    guide: Annotated[str | None, tyro.conf.arg(metavar="CHECKPOINT[@WEIGHTS]")] = None
    """Guide away from another network's prediction, in every point, as in dit-sample."""
    guidance_source: Literal["class", "middle", "both"] = "class"
    """What to guide away from, in every point, as in dit-sample."""
    middle_guidance: Scale = 1.4
    """Scale of the middle head with --guidance-source both."""
    guidance_channels: GuidedChannels = None
    """Latent channels to guide: all, or the first 3."""
    objective: Annotated[Objective | None, tyro.conf.arg(metavar="|".join(OBJECTIVES))] = None
    """What bare weights were trained for, as in dit-sample."""
    num_heads: Annotated[Threads | None, tyro.conf.arg(metavar="INT")] = None
    """Attention heads of bare weights whose width is none of the published ones."""
    vae: str | None = None
    """The VAE that decodes. Default: the one the checkpoint names; another one must be the same by its fingerprint."""
    allow_other_vae: bool = False
    """Decode with --vae even if its fingerprint is another."""
    workers: Threads = 4
    """Threads that decode image files of the reference, per process."""
    overwrite: bool = False
    """Replace the table and the picture of another search in --out; results of points stay."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    def __post_init__(self) -> None:
        check_bounds(self)
        _ = self.space

    @property
    def seeds(self) -> range:
        """The sampling seeds of every point."""
        return range(self.seed, self.seed + self.repeat)

    @property
    def space(self) -> Space:
        """What is searched.

        Raises:
            UserError: a list or a range is none, or holds what dit-sample would refuse.
        """
        ranges = {
            name: bounds
            for name, text, kind in (("guidance", self.guidance, _scale), ("sigma", self.sigma, _sigma))
            if text is not None and (bounds := _range(f"--{name}", text, kind)) is not None
        }
        if self.sigma is not None and self.weights != "ema":
            raise UserError(
                "--sigma and --weights both name the weights; write --weights ema,sigma=0.05 for both kinds"
            )
        scales = [None] if "guidance" in ranges else _listed("--guidance", self.guidance, _scale)
        weights = _listed("--weights", self.weights, str)
        if self.sigma is not None and "sigma" not in ranges:
            weights = [f"sigma={sigma:g}" for sigma in _listed("--sigma", self.sigma, _sigma)]
        grid = grid_of(
            weights=weights,
            sampler=_listed("--sampler", self.sampler, str),
            interval=_listed("--guidance-interval", self.guidance_interval, _interval),
            steps=_listed("--steps", self.steps, _steps),
            guidance=scales,
        )
        return Space(grid=grid, ranges=ranges)


def _listed(flag: str, text: str | None, kind: Callable[[str], Any]) -> Sequence[Any]:
    """The values of a list, each once; None alone where there is no list.

    Raises:
        UserError: one is not of the kind.
    """
    if text is None:
        return [None]
    try:
        return list(dict.fromkeys(kind(word.strip()) for word in text.split(",")))
    except ValueError as error:
        raise UserError(f"{flag} {text} is no list of values with commas between them ({error})") from error


def _range(flag: str, text: str, kind: Callable[[str], float]) -> tuple[float, float] | None:
    """The two ends of A:B; None for a list.

    Raises:
        UserError: they are no numbers, or do not rise.
    """
    if ":" not in text:
        return None
    low, _, high = text.partition(":")
    try:
        bounds = kind(low), kind(high)
    except ValueError:
        bounds = (0.0, 0.0)
    if not bounds[0] < bounds[1]:
        raise UserError(f"{flag} {text} must be a list, or a range A:B with 0 ≤ A < B, as in 1:4")
    return bounds


def _scale(word: str) -> float:
    ReverseOptions(guidance=float(word))
    return float(word)


def _sigma(word: str) -> float:
    if not are_within([float(word)], Sigma):
        raise ValueError("a relative width lies above 0 and below 0.289")
    return float(word)


def _steps(word: str) -> int:
    ReverseOptions(steps=int(word))
    return int(word)


def _interval(word: str) -> str | None:
    return None if word == ALWAYS else ReverseOptions(guidance_interval=word).guidance_interval
