"""Trains a tiny vision encoder on the digits, and measures what fewer numbers for a patch lose of it.

The encoder is a ViT of transformers (Dosovitskiy et al. 2020) with patches of 4 on 32 pixels: 8 × 8 patches of 64
numbers, three blocks, trained to tell the digits apart. It is written as save_pretrained writes it, for `dit-extract
--features`. It stands in for an encoder of photographs: how many numbers one of those needs, it cannot tell.

Of the digits, the first half in a keyed order train the encoder, the directions and the probe; the others are measured:

- kept: the share of the patches' variance along the directions;
- cosine: between a patch as the encoder gives it and as K numbers give it back, mean over all patches, of half
  precision and of int8;
- probe: the share of digits that a logistic regression names right, from the mean of their patches.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from examples.digits.make_images import enlarge
from pipeline.features.encoder import VisionEncoder, find_encoder, load_encoder
from pipeline.features.pca import Covariance
from pipeline.features.writer import scale_of, to_int8
from pipeline.images import center_crop, to_pixels
from pipeline.randomness import Permutation
from pipeline.runtime.console import run_command, say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import publish_folder, remove_folder
from studies.judge import BATCH, begun, fit, write_encoder

PX, PATCH, WIDTH, DEPTH, HEADS = 32, 4, 64, 3, 4
DIMS = (2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Where the encoder goes."""

    out: Path
    """Folder to make; one that is there is only measured."""
    epochs: Annotated[int, Meta(ge=0, le=1000)] = 30
    """Passes over the training half; 0 leaves the weights random."""
    seed: int = 0
    """Of the weights and of the order."""


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(Options, run, prog="encoder.py", description=__doc__ or "", argv=argv)


def run(options: Options) -> None:
    """Make the encoder unless it is there, then print the table."""
    pixels, labels = digits()
    if not options.out.exists():
        publish(options, pixels, labels)
    encoder = load_encoder(find_encoder(str(options.out)), device=torch.device("cpu"), dtype=torch.float32)
    for line in table(measure(encoder, pixels, labels)):
        say(line)


def digits() -> tuple[Tensor, NDArray[np.int64]]:
    """(pixels [N, 3, 32, 32] in [−1, 1], labels) of all digits as `dit-extract` would show them, in a keyed order."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    order = Permutation(len(loaded.images), 0, "digits of the encoder")[np.arange(len(loaded.images))]
    images = [center_crop(enlarge(loaded.images[number]).convert("RGB"), PX) for number in order]
    return torch.from_numpy(to_pixels(np.stack(images))), loaded.target[order].astype(np.int64)


def publish(options: Options, pixels: Tensor, labels: NDArray[np.int64]) -> None:
    """Train the encoder and put its folder in place."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        image_size=PX,
        patch_size=PATCH,
        num_labels=10,
    )
    model, half = begun(lambda: ViTForImageClassification(config), seed=options.seed), len(pixels) // 2
    for epoch, loss in enumerate(fit(model, pixels[:half], labels[:half], epochs=options.epochs, seed=options.seed), 1):
        say(f"epoch {epoch}: loss {loss:.3f}")
    partial = options.out.with_name(f".{options.out.name}.partial")
    remove_folder(partial)
    write_encoder(model.vit, partial, px=PX)
    publish_folder(partial, options.out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What K numbers for a patch keep."""

    dim: int
    kept: float
    cosine: float
    cosine_int8: float
    probe: float


def measure(encoder: VisionEncoder, pixels: Tensor, labels: NDArray[np.int64]) -> list[Figures]:
    """Figures of each number of directions, and of all of them last."""
    if encoder.about.resolution != pixels.shape[-1]:
        raise UserError(f"--out holds an encoder of {encoder.about.resolution} pixels, not of {pixels.shape[-1]}")
    patches = torch.cat([encoder.tokens(part)[0] for part in pixels.split(BATCH)])
    half = len(patches) // 2
    sums = Covariance(encoder.about.width)
    sums.add(patches[:half].flatten(0, 1))
    figures = []
    for dim in (*DIMS, encoder.about.width):
        projection, variances = sums.principal(dim)
        stored = projection.forth(patches).half().float()
        scale = scale_of(stored[half:])  # of a shard's own largest numbers
        given_back, in_steps = projection.back(stored), projection.back(to_int8(stored[half:], scale) * scale)
        cosine = functional.cosine_similarity(given_back[half:], patches[half:], dim=-1).mean()
        cosine_int8 = functional.cosine_similarity(in_steps, patches[half:], dim=-1).mean()
        kept = float(variances[:dim].sum() / variances.sum())
        probe = _probe(given_back.mean(1).numpy(), labels, half)
        figures.append(Figures(dim=dim, kept=kept, cosine=float(cosine), cosine_int8=float(cosine_int8), probe=probe))
    return figures


def _probe(values: NDArray[np.float32], labels: NDArray[np.int64], half: int) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(values[:half], labels[:half])
    return float(probe.score(values[half:], labels[half:]))


def table(figures: list[Figures]) -> list[str]:
    """The figures as a Markdown table."""
    rows = [
        f"| {each.dim} | {each.kept:.1%} | {each.cosine:.4f} | {each.cosine_int8:.4f} | {each.probe:.1%} |"
        for each in figures
    ]
    return ["| numbers of a patch | kept variance | cosine | cosine, int8 | probe |", "|---|---|---|---|---|", *rows]


if __name__ == "__main__":
    sys.exit(main())
