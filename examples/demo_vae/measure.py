"""Measures a VAE: `python -m examples.demo_vae.measure` prints the figures of the demo VAE's card.

PSNR in dB (10 · log10(255² / mean squared error), averaged over images) of decode(mean of encode(image)) on digits
that training has not seen, on the two photographs that come with scikit-learn, and on drawings of its own kind; and
how the normalised latents of digits are spread, which is what a network has to learn.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from examples.demo_vae.drawings import draw_canvas
from examples.demo_vae.train import SEEN_DIGITS, digit_pixels
from pipeline.image_grid import pairs, save_png
from pipeline.images import center_crop, to_pixels
from pipeline.randomness import derive_seed
from pipeline.runtime.console import run_command
from pipeline.vae import Vae, load_vae, normalize

Images = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to measure."""

    vae: str = "demo"
    """A VAE as every command takes it."""
    picture: Path | None = None
    """PNG to draw: originals beside reconstructions."""


def photographs(size: int) -> Images:
    """scikit-learn's two photographs, a pagoda and a dahlia, cropped as for training."""
    from sklearn.datasets import load_sample_images

    return np.stack([center_crop(Image.fromarray(photo), size) for photo in load_sample_images().images])


def drawings(count: int) -> Images:
    """Drawings whose seeds training did not use, 128 pixels wide."""
    draw = np.random.default_rng(derive_seed(0, "demo-vae measurement"))
    return np.stack([draw_canvas(draw) for _ in range(count)])


def moments_of(vae: Vae, images: Images) -> torch.Tensor:
    """Moments in float32 on the CPU, encoded 32 images at a time."""
    return torch.cat([vae.encode(torch.from_numpy(to_pixels(part))).cpu() for part in _batches(images)])


def reconstructed(vae: Vae, images: Images) -> Images:
    """The images after encoding and decoding the posterior's mean."""
    means = moments_of(vae, images)[:, : vae.channels]
    return np.concatenate([vae.decode(part).numpy() for part in means.split(32)])


def psnr(images: Images, others: Images) -> NDArray[np.float64]:
    """PSNR in dB of every image."""
    error = np.square(images.astype(np.float64) - others).mean(axis=(1, 2, 3))
    return np.asarray(10 * np.log10(255**2 / error))


def _batches(images: Images) -> list[Images]:
    return [images[start : start + 32] for start in range(0, len(images), 32)]


def measure(options: Options) -> None:
    """Print the table, and draw the picture if one is asked for."""
    vae = load_vae(options.vae)
    sets = {
        "digits not seen (64 px)": digit_pixels(SEEN_DIGITS, None),
        "photographs (64 px)": photographs(64),
        "photographs (256 px)": photographs(256),
        "drawings (128 px)": drawings(64),
    }
    print(f"{vae.name} {vae.class_name} {vae.sha256}")
    for name, images in sets.items():
        values = psnr(images, reconstructed(vae, images))
        print(f"{name:<26} {len(images):4d} images   PSNR {values.mean():5.2f} dB   least {values.min():5.2f}")
    moments = moments_of(vae, sets["digits not seen (64 px)"])
    latents = normalize(moments[:, : vae.channels], vae.scaling_factor, vae.shift_factor)
    print("normalised latents of digits, per channel: mean", _row(latents.mean(dim=(0, 2, 3))))
    print("                                standard deviation", _row(latents.std(dim=(0, 2, 3))))
    if options.picture:
        shown = np.concatenate([photographs(128), sets["drawings (128 px)"][:6]])
        copies = reconstructed(vae, shown)
        captions = [f"{value:.1f} dB" for value in psnr(shown, copies)]
        save_png(options.picture, pairs(shown, copies, captions, title=f"VAE {vae.name}: originals, reconstructions"))


def _row(values: torch.Tensor) -> str:
    return " ".join(f"{float(value):6.3f}" for value in values)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(Options, measure, prog="examples.demo_vae.measure", description=__doc__ or "", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
