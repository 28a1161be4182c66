"""How far half precision moves a VAE's latents and pictures: `python -m benchmarks.vae_precision`.

Latents are compared in units of the normalised latent (posterior mean, root mean square over all values), pictures in
bytes; both against float32 on the same device. Inputs are drawings of the kind that `examples/demo_vae` makes.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch

from examples.demo_vae.drawings import draw_canvas
from pipeline.images import to_pixels
from pipeline.randomness import derive_seed
from pipeline.runtime.console import run_command
from pipeline.vae import Vae, load_vae, normalize


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to measure, where."""

    vae: str = "demo"
    """A VAE as every command takes it."""
    images: int = 32
    """Number of drawings, 128 pixels wide."""
    device: str = "cpu"
    """Where to run it."""


def latents_of(vae: Vae, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised posterior means (or points), on the CPU."""
    latents = torch.cat([vae.encode(part)[:, : vae.channels].cpu() for part in pixels.split(8)])
    return normalize(latents, vae.scaling_factor, vae.shift_factor)


def pictures_of(vae: Vae, unscaled: torch.Tensor) -> torch.Tensor:
    """Decoded bytes as float."""
    return torch.cat([vae.decode(part) for part in unscaled.split(8)]).float()


def measure(options: Options) -> None:
    """Print one line per precision."""
    draw = np.random.default_rng(derive_seed(0, "vae-precision"))
    pixels = torch.from_numpy(to_pixels(np.stack([draw_canvas(draw) for _ in range(options.images)])))
    exact = load_vae(options.vae, device=options.device)
    latents = latents_of(exact, pixels)
    unscaled = torch.cat([exact.encode(part)[:, : exact.channels].cpu() for part in pixels.split(8)])
    pictures = pictures_of(exact, unscaled)
    print(f"{options.vae} on {options.device}, {options.images} images of 128 px; against float32")
    print("precision   encode: rms   greatest   decode: mean |byte|   greatest")
    for dtype in (torch.bfloat16, torch.float16):
        vae = load_vae(options.vae, device=options.device, dtype=dtype)
        moved = latents_of(vae, pixels) - latents
        changed = (pictures_of(vae, unscaled) - pictures).abs()
        print(
            f"{str(dtype)[6:]:<11} {moved.square().mean().sqrt():11.5f} {moved.abs().max():10.4f}"
            f" {changed.mean():21.3f} {changed.max():10.0f}"
        )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(Options, measure, prog="benchmarks.vae_precision", description=__doc__ or "", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
