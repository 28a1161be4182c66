"""What a benchmark ran on, how fast that machine can be at best, and what every part of the benchmarks is given.

Ceilings are measured, not read from a data sheet: matrix products on random numbers (zeros run up to 13 % faster on
some GPUs), and copies larger than any cache.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Spread, device_seconds_of, rates
from pipeline.inspect.machine import package_version, processor

PACKAGES = ("torch", "numpy", "accelerate", "diffusers", "safetensors", "webdataset", "triton", "pillow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """The best rates of one device: FLOP/s of matrix products, bytes/s of copies (read and written)."""

    fp32: Spread
    tf32: Spread | None
    """None where there is no such arithmetic."""
    bf16: Spread
    copy: Spread
    upload: Spread | None
    """Bytes/s from pinned host memory to the device; None on a CPU."""

    def matmul(self, precision: str) -> float:
        """FLOP/s of "fp32", "tf32" or "bf16" products: the best seen, since a ceiling is no average."""
        found = getattr(self, precision)
        return (found or self.fp32).greatest


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where and how much to measure: what every part is given."""

    device: torch.device
    ceilings: Ceilings
    folder: Path
    """For files; removed at the end."""
    quick: bool
    """Only see that it runs: tiny sizes, whose figures mean nothing."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def rounds(self, usual: int) -> int:
        """Interleaved rounds."""
        return 2 if self.quick else usual


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {
        "device": device.type,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := package_version(name)) is not None},
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["gpu"] = about.name
        found["gpu_memory_gib"] = round(about.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def measure_ceilings(device: torch.device, *, quick: bool = False) -> Ceilings:
    """The device's ceilings."""
    on_gpu = device.type == "cuda"
    # A CPU without bfloat16 units is some 80 times slower in it, so its product is smaller.
    side = {"fp32": 8192, "bf16": 8192} if on_gpu else {"fp32": 2048, "bf16": 512}
    if quick:
        side = {name: value // 2 for name, value in side.items()}
    return Ceilings(
        fp32=matmul_rate(device, torch.float32, side["fp32"], tf32=False),
        tf32=matmul_rate(device, torch.float32, side["fp32"], tf32=True) if on_gpu else None,
        bf16=matmul_rate(device, torch.bfloat16, side["bf16"], tf32=False),
        copy=copy_rate(device, (4 if on_gpu else 0.25) * 2**30 / (8 if quick else 1)),
        upload=upload_rate(device, 2**30) if on_gpu else None,
    )


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int, *, tf32: bool) -> Spread:
    """FLOP/s of square products of random matrices."""
    draws = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=draws, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        return _rate(lambda: torch.mm(a, b, out=out), device, 2.0 * side**3)
    finally:
        torch.set_float32_matmul_precision(kept)


def copy_rate(device: torch.device, size: float) -> Spread:
    """Bytes/s, read and written, of a copy within the device's memory."""
    source = torch.full((int(size),), 7, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), device, 2.0 * source.numel())


def upload_rate(device: torch.device, size: int) -> Spread:
    """Bytes/s from pinned host memory to the device."""
    source = torch.full((size,), 7, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return _rate(lambda: target.copy_(source, non_blocking=True), device, float(size))


def _rate(work: Any, device: torch.device, amount: float) -> Spread:
    for _ in range(2):
        device_seconds_of(work, device)
    return rates([device_seconds_of(work, device, calls=3) for _ in range(5)], amount)
