"""What this machine is for these commands, and what a disk of it can do: a first look, and what a bug report needs."""

import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

from pipeline.inspect.tables import facts
from pipeline.runtime.devices import Precision, choose_device, default_precision, peak_flops
from pipeline.runtime.errors import UserError
from pipeline.runtime.publish import EXCHANGE, renameat2
from pipeline.runtime.units import size
from pipeline.runtime.work_queue import exclusive

PACKAGES = ("torch", "torchvision", "numpy", "accelerate", "diffusers", "safetensors", "huggingface-hub", "pillow")
_DTYPES: dict[Precision, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FLUSHES = 5


def describe_machine(path: str | None) -> list[str]:
    """Device, precision, attention, memory and versions; of the path's disk, what processes and kills rest on.

    Raises:
        UserError: the path is not on a disk of this machine, or may not be written to.
    """
    device, reason = choose_device("auto")
    precision, why = default_precision(device)
    lines = facts(
        {
            "device": f"{device} ({reason})",
            **_describe_device(device, precision),
            "precision": f"{precision} ({why})",
            "attention": _attention_kernel(device, _DTYPES[precision]),
            "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores of {os.cpu_count()}",
            "threads": f"{torch.get_num_threads()}, {_how_threads_wait()}",
            "memory": f"{size(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}, {_available()} available",
            "open files": f"at most {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} per process",
            "system": f"{platform.platform()}, Python {platform.python_version()}",
            "PyTorch for": f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip or "CPU",
            "versions": ", ".join(f"{name} {version}" for name in PACKAGES if (version := package_version(name))),
        }
    )
    return lines if path is None else [*lines, "", *_describe_disk(path)]


def _describe_device(device: torch.device, precision: Precision) -> dict[str, str]:
    if device.type != "cuda":
        return {}
    about = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    peak = peak_flops(device, precision)
    return {
        "name": f"{about.name}, capability {about.major}.{about.minor}, {torch.cuda.device_count()} here",
        "peak": "unknown" if peak is None else f"{peak / 1e12:,.0f} TFLOP/s at 16 bits, dense",
        "device memory": f"{size(total)}, {size(free)} free",
    }


def _attention_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that PyTorch takes for the tokens of DiT-XL/2 at 256 pixels."""
    q = torch.zeros(1, 16, 256, 72, device=device, dtype=dtype)
    kernel = SDPBackend(torch._fused_sdp_choice(q, q, q))
    return f"{kernel.name.lower().replace('_', ' ')} ({str(dtype).removeprefix('torch.')}, 256 tokens of 16 × 72)"


def _how_threads_wait() -> str:
    found = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    return ", ".join(f"{name}={value}" for name, value in found.items() if value) or "waiting as OpenMP does"


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _available() -> str:
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((size(int(line.split()[1]) * 1024) for line in lines if line.startswith("MemAvailable")), "unknown")


def package_version(name: str) -> str | None:
    """The installed package's version, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_disk(path: str) -> list[str]:
    """What of a disk publishing and sharing work rest on, tried in a folder that goes again."""
    if "://" in path:
        raise UserError(f"--machine looks at disks, and {path} is a URL; give a folder")
    folder = Path(path).expanduser().resolve()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    inodes = os.statvfs(folder)
    known: dict[str, object] = {
        "disk of": folder,
        "file system": _file_system(folder),
        "free space": f"{size(usage.free)} of {size(usage.total)}",
        "free files": f"{inodes.f_favail:,}" if inodes.f_files else "no limit",
    }
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".dit-inspect-") as probe:
            known["locks"] = _locks(Path(probe))
            known["exchange"] = _exchange(Path(probe))
            known["fsync"] = _flush_seconds(Path(probe))
    except PermissionError:
        known["locks"] = known["exchange"] = known["fsync"] = "not tried: there is no permission to write there"
    return facts(known)


def _file_system(folder: Path) -> str:
    """Type and source of the mount that the folder lies on."""
    mounts = Path("/proc/self/mounts")
    lines = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    above = [line for line in lines if folder.is_relative_to(line[1].replace("\\040", " "))]
    best = max(above, key=lambda line: len(line[1]), default=None)
    return "unknown" if best is None else f"{best[2]} ({best[0]} at {best[1]})"


def _locks(probe: Path) -> str:
    try:
        with exclusive(probe / "lock"):
            return "yes"
    except UserError as error:
        return f"no ({error})"


def _exchange(probe: Path) -> str:
    first, second = probe / "first", probe / "second"
    first.mkdir()
    second.mkdir()
    return "yes" if renameat2(first, second, EXCHANGE) else "no: --overwrite of a folder takes two renames"


def _flush_seconds(probe: Path) -> str:
    """How long flushing 4 kB and a folder's names takes: the middle and the worst of some."""
    block = os.urandom(4096)

    def write() -> None:
        descriptor = os.open(probe / "flushed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            os.write(descriptor, block)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    took = sorted(_seconds(write) for _ in range(_FLUSHES))
    return f"{1000 * took[_FLUSHES // 2]:.1f} ms for 4 kB, at worst {1000 * took[-1]:.1f} ms"


def _seconds(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
