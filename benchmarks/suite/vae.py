"""Encoding and decoding alone, with a VAE of Stable Diffusion's size and random weights.

Ours is the VAE as the commands run it, on a GPU channels_last with the encoder compiled; the plain one is diffusers'
model as it loads, in float32 (TF32 on a GPU). bfloat16 and eager variants stand beside it on a GPU.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.extract import VAES, make_vae
from benchmarks.report import Row
from benchmarks.suite.setting import Setting
from benchmarks.timing import device_seconds_of, interleaved, rates, ratios, release
from pipeline.vae import load_vae

CPU_BOUND = 0.95


def measure(setting: Setting) -> list[Row]:
    """Encode and decode in float32, and on a GPU in bfloat16 too."""
    folder = make_vae(setting.folder / "vae", "small" if setting.quick else "sd")
    side, batch = (256, 32) if setting.on_gpu else (64, 2) if setting.quick else (96, 2)
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        dtypes = (torch.float32, torch.bfloat16) if setting.on_gpu else (torch.float32,)
        return [row for dtype in dtypes for row in _compare(str(folder), dtype, side, batch, setting)]
    finally:
        torch.set_float32_matmul_precision(kept)


def _compare(folder: str, dtype: torch.dtype, side: int, batch: int, setting: Setting) -> list[Row]:
    from diffusers import AutoencoderKL

    ours = load_vae(folder, device=setting.device, dtype=dtype)
    plain = AutoencoderKL.from_pretrained(folder).eval().to(setting.device)
    if setting.on_gpu:
        ours.model.encode = torch.compile(ours.model.encode)
    draws = torch.Generator().manual_seed(0)
    pixels = (torch.rand(batch, 3, side, side, generator=draws) * 2 - 1).to(setting.device)
    latents = torch.randn(batch, 4, side // 8, side // 8, generator=draws).to(setting.device)
    names = {torch.float32: "tf32" if setting.on_gpu else "fp32", torch.bfloat16: "bf16"}
    rows = []
    for name, work, plainly, given in (
        ("encode", ours.encode, lambda x: plain.encode(x).latent_dist.parameters, pixels),
        ("decode", ours.decode_values, lambda z: plain.decode(z).sample, latents),
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
                what=f"{name} {side} px, batch {batch}, {names[dtype]}",
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
