"""The options of `dit-evaluate`. No torch: `--help` must be quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from msgspec import Meta

from pipeline.runtime.bounds import Images, Pixels, Threads, check_bounds
from pipeline.runtime.cli import nearest
from pipeline.runtime.config_files import BY_COMMAS
from pipeline.runtime.errors import UserError
from sample.evaluate.metrics import METRICS, METRICS_HELP, feature_kind
from sample.options import ComputeOptions, ReverseOptions

PART_IMAGES = 512
"""Images in one unit of work, unless they are sampled: few enough to lose little by a kill, many enough to share out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """What `dit-evaluate` is asked to compare."""

    samples: str | None = None
    """The images to judge: a folder of images, an .npz with arr_0 (also behind a URL), a latent store (decoded), a run or checkpoint (sampled), or an .npz with mu and sigma."""
    reference: str | None = None
    """The images to compare them with: any of the same, such as ADM's reference files or ours from --make-reference."""
    metrics: Annotated[str | None, BY_COMMAS, tyro.conf.arg(help=METRICS_HELP)] = None
    features: Annotated[str, tyro.conf.arg(metavar="inception|pixels|ENCODER")] = "inception"
    """What images are compared by: the FID network; pixels, which need no weights; or a vision encoder of transformers, a folder or Hub name: fd-encoder, and cmmd under CLIP."""
    inception: Annotated[str | None, tyro.conf.arg(metavar="FILE|URL")] = None
    """Weights of the FID network, pt_inception-2015-12-05-6726825d.pth: a file, or a URL to download into the cache once. Default: the file in the cache."""
    make_reference: Annotated[str | None, tyro.conf.arg(metavar="FILE.npz")] = None
    """Write the statistics of --reference (without one: of --samples) for later use as --reference, to a path or a URL: mu, sigma, mu_s, sigma_s."""
    reference_features: bool = False
    """Put the 2,048 features of every image into --make-reference too; precision, recall and kid need them (8 kB per image)."""
    out: Annotated[str | None, tyro.conf.arg(metavar="RESULT.json")] = None
    """Write the numbers and where they come from as JSON, to a path or a URL."""
    overwrite: bool = False
    """Replace --out and --make-reference where they hold something else."""
    image_size: Pixels | None = None
    """Centre-crop every image of a folder to this many pixels, as extraction does. Default: as they are; or, where the other side has one square size, that size."""
    kid_subsets: Annotated[int, Meta(ge=1, le=100_000)] = 100
    """Random subsets whose mean and spread kid reports."""
    kid_subset_size: Annotated[int, Meta(ge=2, le=1_000_000)] = 1000
    """Images in one such subset; smaller sets shrink it."""
    num_samples: Images = 50_000
    """Images to make where an input is a run or checkpoint."""
    repeat: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Sample --samples, a run or checkpoint, with so many seeds, --seed and those after it: each metric's mean and standard deviation over them."""
    labels: str | None = None
    """Their classes: random (uniform, by the seed; the default), balanced, or a FILE, as in dit-sample."""
    weights: str = "ema"
    """Their weights: ema, raw, the NAME of a further EMA, or sigma=S for a power-function average made of those that the run keeps."""
    vae: str | None = None
    """The VAE that decodes a latent store or a checkpoint's samples. Default: the one named there; another one must be the same by its fingerprint."""
    allow_other_vae: bool = False
    """Decode with --vae even if its fingerprint is another."""
    work: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for unfinished work, shared by all processes. Default: hidden beside --out or --make-reference, else in the cache."""
    workers: Threads = 4
    """Threads that decode image files ahead of the network, per process."""
    reverse: ReverseOptions = field(default_factory=ReverseOptions)
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.samples is None and (self.reference is None or self.make_reference is None):
            raise UserError("--samples is missing: give the images to judge (or --reference with --make-reference)")
        for flag, path, suffix in (("--out", self.out, ".json"), ("--make-reference", self.make_reference, ".npz")):
            if path is not None and Path(path).suffix != suffix:
                raise UserError(f"{flag} {path} must end in {suffix}")
        if self.reference_features and self.make_reference is None:
            raise UserError("--reference-features says what --make-reference FILE.npz holds; give both")
        if self.features != "inception" and self.make_reference is not None:
            raise UserError(
                f"--make-reference holds the FID network's statistics, which --features {self.features} cannot read; "
                f"give the images themselves as --reference"
            )
        if self.samples is not None and self.reference is None and not self.only_makes_reference:
            self._check_no_reference_needed()
        _ = self.wanted

    def _check_no_reference_needed(self) -> None:
        comparing = [metric for metric in self.wanted if METRICS[metric].compares]
        if comparing:
            names, alone = ", ".join(comparing), " or ".join(name for name in METRICS if not METRICS[name].compares)
            raise UserError(
                f"--reference is missing: {names} compare with it; give it, or ask for --metrics {alone} alone"
            )

    @property
    def only_makes_reference(self) -> bool:
        """Whether a reference is all that is asked for."""
        one_input = self.samples is None or (self.reference is None and self.metrics is None)
        return self.make_reference is not None and one_input

    @property
    def wanted(self) -> tuple[str, ...]:
        """The metrics asked for, in the order in which they are reported.

        Raises:
            UserError: a name is unknown; every such name is given, with the nearest one.
        """
        if self.metrics is None:
            return tuple(
                name for name, spec in METRICS.items() if spec.standard and spec.kind == feature_kind(self.features)
            )
        names = [name.strip().lower() for name in self.metrics.split(",") if name.strip()]
        unknown = []
        for name in names:
            if name not in METRICS:
                close = nearest(name, METRICS, count=1)
                unknown.append(f"{name!r}" + (f" (did you mean {close[0]}?)" if close else ""))
        if unknown or not names:
            raise UserError(
                f"--metrics {self.metrics}: unknown {', '.join(unknown) or 'nothing'}; use {', '.join(METRICS)}"
            )
        others = [name for name in names if METRICS[name].kind != feature_kind(self.features)]
        if others:
            here = ", ".join(name for name, spec in METRICS.items() if spec.kind == feature_kind(self.features))
            raise UserError(
                f"--metrics {','.join(others)}: not defined on --features {self.features}, which has {here}; "
                f"use those, or other --features"
            )
        return tuple(metric for metric in METRICS if metric in names)
