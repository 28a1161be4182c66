"""Trains the tiny autoencoder that ships with the project as `--vae demo`: `python -m examples.demo_vae.train`.

An AutoencoderKL as Stable Diffusion's (Rombach et al. 2022, arXiv 2112.10752): 8 times smaller sides, 4 latent
channels, a KL term; but 0.8 million parameters, no attention, no perceptual or adversarial loss, and pictures that
`drawings.py` makes. One batch in four is scikit-learn's handwritten digits, of which it sees the first half only.
The same seed, number of steps, threads and libraries give the same weights.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from examples.demo_vae.drawings import draw_canvas
from examples.digits.make_images import SIDE_PX, enlarge
from pipeline.randomness import derive_seed, generator
from pipeline.runtime.console import progress, run_command, say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import publish_folder, read_json, write_json
from pipeline.vae import draw_posterior

SEEN_DIGITS = 898
CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (16, 32, 48, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
    "sample_size": SIDE_PX,
    "force_upcast": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How long to train, and what for."""

    out: Path
    """Folder to make, in diffusers' layout."""
    steps: int = 2000
    """Steps of the learning rate's whole cosine."""
    seconds: float = math.inf
    """Seconds after which it ends in any case; the cosine is shortened to fit (no longer reproducible then)."""
    canvases: int = 3
    """Drawn pictures per batch."""
    crops: int = 5
    """Crops of each drawn picture."""
    small_share: float = 0.8
    """Share of the steps on crops of 32 pixels, which cost a quarter, before those of 64."""
    digits: int = 2
    """Crops of handwritten digits per batch."""
    lr: float = 1.2e-3
    """Largest learning rate of AdamW."""
    kl_weight: float = 3e-4
    """Weight of the KL divergence per latent value against the reconstruction error per colour value."""
    seed: int = 0
    """Seed of the first weights, the drawings and the posterior's noise."""


def digit_pixels(first: int, last: int | None) -> NDArray[np.uint8]:
    """Some of the digits as the demo writes them: 64 × 64, grey, [N, 64, 64, 3]."""
    from sklearn.datasets import load_digits

    greys = [np.asarray(enlarge(grey)) for grey in load_digits().images[first:last]]
    return np.stack(greys)[..., None].repeat(3, axis=-1)


def batch_at(step: int, side: int, options: Options, digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pictures of one step, [N, side, side, 3], the same whenever it is asked for: crops of drawings and digits."""
    draw = np.random.default_rng(derive_seed(options.seed, "demo-vae drawings", step))
    crops = []
    for number in range(options.canvases + options.digits):
        drawn = number < options.canvases
        picture = draw_canvas(draw) if drawn else digits[draw.integers(len(digits))]
        for _ in range(options.crops if drawn else 1):
            y, x = draw.integers(0, len(picture) - side + 1, 2)
            crops.append(picture[y : y + side, x : x + side])
    return np.stack(crops)


def to_signed(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Bytes [N, H, W, 3] as [N, 3, H, W] in [-1, 1], channels last in memory."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(
        memory_format=torch.channels_last
    )


def losses(model: Any, pixels: torch.Tensor, step: int, options: Options) -> tuple[torch.Tensor, float]:
    """(the loss, the mean posterior spread): |error| + 4 · error² + |error of a cell's mean| + weight · KL."""
    moments = model.encode(pixels).latent_dist.parameters
    mean, logvar = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator(options.seed, "demo-vae posterior", step))
    error = model.decode(draw_posterior(moments, noise)).sample - pixels
    cells = torch.nn.functional.avg_pool2d(error, 8)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = error.abs().mean() + 4 * error.square().mean() + cells.abs().mean() + options.kl_weight * divergence
    return loss, float((0.5 * logvar.detach()).exp().mean())


@torch.no_grad()
def new_model(seed: int) -> Any:
    """An autoencoder that already knows colours: it begins as the mean of every 8 × 8 pixels, three latent channels.

    From random weights it spends all four channels on brightness for thousands of steps. So red, green and blue and a
    constant, which keeps GroupNorm from dividing the contrast away, go straight through in channels 0 to 3: residual
    branches begin at zero, the convolutions between them as the identity, halving as a mean. SiLU is nearly linear
    around 4, where the last two layers are put. The posterior begins narrow (exp(−6 / 2)), not drowned in noise.
    """
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "demo-vae weights"))
        model = AutoencoderKL(**CONFIG)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and name.endswith("conv2"):
            layer.weight.zero_()
        elif isinstance(layer, torch.nn.Conv2d) and not name.endswith("conv1"):
            kernel = torch.nn.init.dirac_(torch.empty_like(layer.weight))
            if "downsamplers" in name:
                kernel = torch.zeros_like(kernel)
                kernel[range(4), range(4), :2, :2] = 0.25
            layer.weight[:4] = kernel[:4]
            if layer.bias is not None:
                layer.bias[:4] = 0
    for half in (model.encoder, model.decoder):
        half.conv_in.bias[3] = 4
        half.conv_norm_out.weight.mul_(0.5)
        half.conv_norm_out.bias.fill_(4)
        half.conv_out.bias[:3] = -4
        half.conv_out.weight[3:] *= 0.1
    model.quant_conv.weight[4:] = 0
    model.quant_conv.bias[4:] = -6
    return model.to(memory_format=torch.channels_last)


def fit(model: Any, options: Options) -> None:
    """Train in place: AdamW, linear warm-up over 100 steps, then a cosine to zero; gradients clipped to norm 1."""
    digits = digit_pixels(0, SEEN_DIGITS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    bar = progress(options.steps, unit="steps", description="demo VAE")
    start, done = time.monotonic(), 0.0
    for step in range(options.steps):
        done = max(step / options.steps, (time.monotonic() - start) / options.seconds)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = options.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
        side = SIDE_PX // 2 if done < options.small_share else SIDE_PX
        loss, spread = losses(model, to_signed(batch_at(step, side, options, digits)), step, options)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.4f}", posterior_std=f"{spread:.3f}")
        bar.update()
    bar.close()


@torch.no_grad()
def latent_statistics(model: Any, options: Options) -> tuple[float, float]:
    """(mean, standard deviation) of drawn latents over every channel and 32 batches that training did not see."""
    digits = digit_pixels(0, SEEN_DIGITS)
    drawn = []
    for step in range(options.steps, options.steps + 32):
        moments = model.encode(to_signed(batch_at(step, SIDE_PX, options, digits))).latent_dist.parameters
        noise = torch.randn(moments[:, :4].shape, generator=generator(options.seed, "demo-vae posterior", step))
        drawn.append(draw_posterior(moments, noise).double())
    latents = torch.cat(drawn)
    return float(latents.mean()), float(latents.std())


def train(options: Options) -> None:
    """Make the whole folder: weights rounded to float16, and a configuration with the measured scale and shift."""
    if options.out.exists():
        raise UserError(f"--out {options.out} is already there; choose another folder or remove it")
    model = new_model(options.seed)
    fit(model.train(), options)
    model.eval().half().float()
    mean, std = latent_statistics(model, options)
    partial = options.out.with_name(f".{options.out.name}.partial")
    model.half().to(memory_format=torch.contiguous_format).save_pretrained(partial, safe_serialization=True)
    config = read_json(partial / "config.json")
    config |= {"scaling_factor": round(1 / std, 5), "shift_factor": round(mean, 5)}
    write_json(partial / "config.json", config)
    publish_folder(partial, options.out)
    say(f"latents: mean {mean:.4f}, standard deviation {std:.4f}; wrote {options.out}")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(Options, train, prog="examples.demo_vae.train", description=__doc__ or "", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
