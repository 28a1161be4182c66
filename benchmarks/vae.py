"""Encoding and decoding alone, with a VAE of Stable Diffusion's size and random weights; half precision's price.

Ours is the VAE as the commands run it, on a GPU with the encoder compiled; the plain one is diffusers' model as it
loads, in float32 (TF32 on a GPU). On a GPU bfloat16 stands beside it, and both ways with the weights in channels_last.
How far half precision moves what the demo VAE gives is measured on drawings of the kind that `examples/demo_vae` makes:
latents in units of the normalised latent (posterior mean, root mean square over all values), pictures in bytes; both
against float32 on the same device.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.extract import VAES, make_vae
from benchmarks.machine import Setting
from benchmarks.report import Pieces, Row
from benchmarks.timing import device_seconds_of, interleaved, rates, ratios, release, spread
from examples.demo_vae.drawings import draw_canvas
from pipeline.images import to_pixels
from pipeline.randomness import derive_seed
from pipeline.runtime.devices import float32_products
from pipeline.vae import Vae, load_vae, normalize

CPU_BOUND = 0.95


def pieces(setting: Setting) -> Pieces:
    """Encode and decode in float32, and on a GPU in bfloat16 too; how far half precision moves the results."""
    dtypes = (torch.float32, torch.bfloat16) if setting.on_gpu else (torch.float32,)
    orders = (False, True) if setting.on_gpu else (False,)
    speed = {
        f"speed in {str(dtype)[6:]}{', channels_last' if last else ''}": partial(_speed, dtype, last, setting)
        for last in orders
        for dtype in dtypes
    }
    return {**speed, "precision": partial(precision_rows, setting)}


def _speed(dtype: torch.dtype, last: bool, setting: Setting) -> list[Row]:
    folder = make_vae(setting.folder / "vae", "small" if setting.quick else "sd")
    side, batch = (256, 32) if setting.on_gpu else (64, 2) if setting.quick else (96, 2)
    with float32_products(setting.device, tf32=True):
        return _compare(str(folder), dtype, last, side, batch, setting)


def _compare(folder: str, dtype: torch.dtype, last: bool, side: int, batch: int, setting: Setting) -> list[Row]:
    from diffusers import AutoencoderKL

    ours = load_vae(folder, device=setting.device, dtype=dtype)
    plain = AutoencoderKL.from_pretrained(folder).eval().to(setting.device)
    if last:
        ours.model.to(memory_format=torch.channels_last)
    elif setting.on_gpu:
        ours.model.encode = torch.compile(ours.model.encode)
    draws = torch.Generator().manual_seed(0)
    pixels = (torch.rand(batch, 3, side, side, generator=draws) * 2 - 1).to(setting.device)
    latents = torch.randn(batch, 4, side // 8, side // 8, generator=draws).to(setting.device)
    names = {torch.float32: "tf32" if setting.on_gpu else "fp32", torch.bfloat16: "bf16"}
    rows = []
    for name, work, plainly, given in (
        ("encode", ours.encode, lambda x: plain.encode(x).latent_dist.parameters, pixels),  # noqa: F821 (deleted after the loop)
        ("decode", ours.decode_values, lambda z: plain.decode(z).sample, latents),  # noqa: F821
    ):
        times = interleaved(
            {"plain": partial(without_gradients, plainly, given), "ours": partial(work, given)},
            rounds=setting.rounds(5),
            device=setting.device,
            calls=4 if setting.on_gpu else 1,
            warm_ups=2 if setting.on_gpu else 1,
            clock=device_seconds_of,
        )
        rows.append(
            Row(
                what=f"{name} {side} px, batch {batch}, {names[dtype]}{', channels_last' if last else ''}",
                unit="images/s",
                ours=rates(times["ours"], batch),
                plain=rates(times["plain"], batch),
                ratio=ratios(times),
                limit=None
                if setting.quick
                else setting.ceilings.matmul(names[dtype]) / (2.0 * count_vae(name, VAES["sd"], side)),
                limit_name=f"{names[dtype]} matmul",
                wanted_ratio=None if setting.on_gpu or setting.quick else CPU_BOUND,
            )
        )
    del ours, plain
    release(setting.device)
    return rows


def without_gradients(work: Callable[[Tensor], object], given: Tensor) -> None:
    """Call it as people do who only want the result."""
    with torch.no_grad():
        work(given)


def count_vae(direction: str, sizes: dict[str, object], side: int) -> int:
    """Multiply-adds of encoding or decoding one image, counted on tensors without memory."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"), contextlib.ExitStack() as stack:
        model = AutoencoderKL(**blocks, **sizes, latent_channels=4)
        counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(torch.no_grad())
        if direction == "encode":
            model.encode(torch.empty(1, 3, side, side))
        else:
            model.decode(torch.empty(1, 4, side // 8, side // 8))
    return int(counter.get_total_flops()) // 2


def precision_rows(setting: Setting) -> list[Row]:
    """How far bfloat16 and float16 move the demo VAE's latents and pictures."""
    images = 2 if setting.quick else 32 if setting.on_gpu else 8
    draw = np.random.default_rng(derive_seed(0, "vae-precision"))
    pixels = torch.from_numpy(to_pixels(np.stack([draw_canvas(draw) for _ in range(images)])))
    exact = load_vae("demo", device=setting.device)
    latents = latents_of(exact, pixels)
    unscaled = torch.cat([exact.encode(part)[:, : exact.channels].cpu() for part in pixels.split(8)])
    pictures = pictures_of(exact, unscaled)
    rows = []
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        vae = load_vae("demo", device=setting.device, dtype=dtype)
        moved = latents_of(vae, pixels) - latents
        changed = (pictures_of(vae, unscaled) - pictures).abs()
        what = f"demo VAE in {name} against float32, {images} images of 128 px"
        rms, greatest = float(moved.square().mean().sqrt()), float(moved.abs().max())
        rows += [
            Row(what=f"{what}: latents move by (rms)", unit="", ours=spread([rms]), note=f"at most {greatest:.4f}"),
            Row(
                what=f"{what}: bytes of decoded pictures move by (mean)",
                unit="",
                ours=spread([float(changed.mean())]),
                note=f"at most {float(changed.max()):.0f}",
            ),
        ]
    return rows


def latents_of(vae: Vae, pixels: Tensor) -> Tensor:
    """Normalised posterior means (or points), on the CPU."""
    latents = torch.cat([vae.encode(part)[:, : vae.channels].cpu() for part in pixels.split(8)])
    return normalize(latents, vae.scaling_factor, vae.shift_factor)


def pictures_of(vae: Vae, unscaled: Tensor) -> Tensor:
    """Decoded bytes as float."""
    return torch.cat([vae.decode(part) for part in unscaled.split(8)]).float()
