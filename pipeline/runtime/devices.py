"""On which device a command computes, how precisely, and what it says when memory ends: one answer for all commands."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch

from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import Launch, launch

Precision = Literal["no", "bf16", "fp16"]
_TRIED = {"cpu", "cuda"}
# Dense 16-bit peak in TFLOP/s by the device's whole name without its maker (vendors' data sheets): a part of a name is
# also a part of a slower card's, or of a slice of the card.
_PEAKS: dict[str, float] = {
    "B200": 2250,
    "H200": 989,
    "H200 NVL": 835,
    "GH200 480GB": 989,
    "H100 80GB HBM3": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    **dict.fromkeys(("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe"), 312),
    **dict.fromkeys(("A800-SXM4-80GB", "A800 80GB PCIe"), 312),
    "A40": 150,
    "A10": 125,
    "A10G": 70,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "GeForce RTX 4090": 165,
    "GeForce RTX 3090": 71,
    **dict.fromkeys(("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"), 125),
    **dict.fromkeys(("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"), 112),
    "Tesla T4": 65,
}
# What libraries say when memory ends, besides raising torch.OutOfMemoryError.
_NO_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed", "failed to allocate", "cannot allocate memory")


def wants_cpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Accelerate's launcher was told to stay on the CPU."""
    return environment.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}


def choose_device(wanted: str, place: Launch | None = None) -> tuple[torch.device, str]:
    """The device of this process and the reason for it; with several devices and processes, each takes its own.

    Raises:
        UserError: there is no such device.
    """
    place = place or launch()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if wanted == "auto" and wants_cpu():
        return torch.device("cpu"), "the launcher asks for the CPU"
    if wanted == "auto" and accelerator is None:
        return torch.device("cpu"), "no CUDA GPU was found"
    if wanted == "auto":
        wanted = accelerator.type if accelerator is not None else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"--device {wanted} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device, "--device"
    return _own_one(device, place)


def _own_one(device: torch.device, place: Launch) -> tuple[torch.device, str]:
    """One of an accelerator's devices: the one asked for, or this process's."""
    try:
        module = torch.get_device_module(device.type)
        count = int(module.device_count()) if module.is_available() else 0
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"--device {device} is not supported; use auto, cpu, cuda or cuda:N") from error
    name = "CUDA GPUs" if device.type == "cuda" else f"{device.type.upper()} devices"
    if not count or (device.index or 0) >= count:
        raise UserError(f"--device {device}: there are {count} {name} here; use auto or cpu")
    if device.type not in _TRIED:
        warn(f"this program was never tried on {name}; please tell how it went")
    if ":" in str(device):
        return device, "--device"
    index = place.local_rank % count
    return torch.device(device.type, index), f"local process {place.local_rank}, {count} GPUs"


def default_precision(device: torch.device) -> tuple[Precision, str]:
    """The precision of matrix products when none is asked for, and why: bf16 where the GPU has units for it.

    `torch.cuda.is_bf16_supported()` counts emulation, which is slower than float32: what counts is the capability.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16", "the GPU has it"
    return "no", "default here"


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """The peak of matrix products at 16 bits in FLOP/s; None if unknown, or if they are computed in float32."""
    if device.type != "cuda" or precision == "no":
        return None
    peak = _PEAKS.get(torch.cuda.get_device_name(device).removeprefix("NVIDIA "))
    return peak and peak * 1e12


@contextmanager
def float32_products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Let matrix products and convolutions in float32 use TF32, or neither of them, while the block runs."""
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_tf32(device, tf32)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions


def set_tf32(device: torch.device, on: bool) -> None:
    """The same for the rest of the process; on a CPU there is nothing to set."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if on else "highest")
        torch.backends.cudnn.allow_tf32 = on


def machine_bytes() -> int:
    """The memory of this machine, or what a container may take of it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with suppress(OSError, ValueError):  # of another system; without a limit it says "max"
            found.append(int(limit.read_bytes()))
    return min(found)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on a GPU or on the host, in whichever library."""
    text = str(error).lower()
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY))


@contextmanager
def memory_explained(sentence: Callable[[], str]) -> Iterator[None]:
    """Turn running out of memory inside the block into a `UserError` with that sentence: what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(sentence()) from error


class PinnedStaging:
    """Page-locked main memory that every snapshot of a GPU is copied into: taken by the first, used by all others.

    torch rounds each piece of such memory up to a power of two and keeps it: tensor by tensor that makes 14.2 of
    XL/2's 10.8 GB. So it is taken in slabs of a power of two, and tensors are laid into them one after the other.
    """

    SLAB_BYTES, ALIGNED_TO = 1 << 28, 64

    def __init__(self, *, device: str = "cpu", pin: bool = True) -> None:
        self.slabs: list[torch.Tensor] = []
        self._device, self._pin = device, pin
        self._slab, self._used = 0, 0

    def rewind(self) -> None:
        """Begin again with the first slab: what lies there is overwritten."""
        self._slab, self._used = 0, 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Room for a tensor, in its shape and type."""
        size = like.numel() * like.element_size()
        while self._slab < len(self.slabs) and self._used + size > len(self.slabs[self._slab]):
            self._slab, self._used = self._slab + 1, 0
        if self._slab == len(self.slabs):
            length = max(self.SLAB_BYTES, 1 << max(size - 1, 0).bit_length())
            self.slabs.append(torch.empty(length, dtype=torch.uint8, device=self._device, pin_memory=self._pin))
        room = self.slabs[self._slab][self._used : self._used + size]
        self._used += -(-size // self.ALIGNED_TO) * self.ALIGNED_TO
        return room.view(like.dtype).view(like.shape)
