"""The processes and devices of a run, through Accelerate; every choice is returned with its reason."""

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.runtime.devices import Precision, choose_device, default_precision, set_tf32
from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import keep_freed_memory
from train.options import HardwareOptions

AUTOCAST = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense 16-bit peak in TFLOP/s by what the device's name contains, longest match first (vendors' data sheets).
_PEAKS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
}
# What another launcher asked Accelerate for, and what to say instead.
_FOREIGN = {
    "ACCELERATE_USE_FSDP": "its own FSDP (which on a CPU is silently plain DDP); take it out and pass --sharding fsdp",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed, which this command does not drive; use --sharding fsdp instead",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM, which this command does not drive; use --sharding fsdp instead",
}
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """This process's place, device and precision, and the few things that processes do together."""

    accelerator: Any
    device: torch.device
    precision: Precision
    reason: str
    """Device and precision with why, for people to read."""
    rank: int
    processes: int
    hosts: Any
    """Process group for numbers on the hosts, so that agreeing on a stop never waits for a GPU; None when alone."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the device, in place."""
        if self.processes > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, number: int) -> int:
        """The largest of all processes' numbers, agreed between the hosts."""
        if self.processes == 1:
            return number
        box = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.hosts)
        return int(box)

    def broadcast(self, value: Any) -> Any:
        """The main process's value on every process."""
        box = [value]
        if self.processes > 1:
            dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Do something on the main process alone and give its result to all; an error is raised on all of them."""
        result: Any = None
        if self.is_main:
            try:
                result = action()
            except UserError as error:
                result = error
        result = self.broadcast(result)
        if isinstance(result, UserError):
            if not self.is_main:
                raise SystemExit(2)  # the main process says it for all
            raise result
        return result

    def barrier(self) -> None:
        """Until every process is here."""
        if self.processes > 1:
            dist.barrier(group=self.hosts)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def peak_flops(self) -> float | None:
        """Known peak of this device in FLOP/s at 16 bits, or None."""
        if self.device.type != "cuda" or self.precision == "no":
            return None
        name = torch.cuda.get_device_name(self.device)
        known = sorted((part for part in _PEAKS if part in name), key=len)
        return _PEAKS[known[-1]] * 1e12 if known else None

    def memory_bytes(self) -> int:
        """The most memory this process has held: of the device on a GPU, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident_bytes()


def start(
    options: HardwareOptions, environment: Mapping[str, str] = os.environ, *, trackers: Sequence[str] = ()
) -> Hardware:
    """Join the processes that the launcher started and take a device; `trackers` are Accelerate's, by name.

    Raises:
        UserError: the launcher asked for something this command does not do, or the processes do not see each other.
    """
    _refuse_foreign_wishes(environment)
    if "MASTER_ADDR" not in environment:  # then nothing tells processes where to meet
        refuse_lonely_ranks(environment, 1)
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    cpu = options.device == "cpu" or not torch.accelerator.is_available()
    precision, why = _precision(options, cpu, environment)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=list(trackers) or None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(minutes=30)),
        ],
    )
    refuse_lonely_ranks(environment, accelerator.num_processes)
    device = accelerator.device
    if device.type == "cpu":
        keep_freed_memory()
    set_tf32(device, options.tf32)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return Hardware(
        accelerator=accelerator,
        device=device,
        precision=precision,
        reason=f"{name} ({'--device cpu' if options.device == 'cpu' else 'found'}), precision {precision} ({why})",
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        hosts=dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None,
    )


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error says that another process went away in the middle of what all do together."""
    text = str(error)
    return any(words in text for words in ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError"))


def peak_resident_bytes() -> int:
    """The most main memory this process has held; Linux's own count, which does not begin at the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def refuse_lonely_ranks(environment: Mapping[str, str], processes: int) -> None:
    """Refuse to train in several processes that each believe they are alone, and would overwrite each other.

    Raises:
        UserError: the launcher started another number of processes than take part.
    """
    for name in _SIZES:
        wanted = environment.get(name, "1")
        if wanted.isdigit() and int(wanted) > 1 and int(wanted) != processes:
            raise UserError(
                f"the launcher started {wanted} processes ({name}={wanted}), but this one sees {processes}: each "
                f"would train alone and overwrite the others; start them with accelerate launch or torchrun, on a CPU "
                f"with ACCELERATE_USE_CPU=true set"
            )


def _refuse_foreign_wishes(environment: Mapping[str, str]) -> None:
    for name, instead in _FOREIGN.items():
        if environment.get(name, "false").lower() in {"1", "true", "yes"}:
            raise UserError(f"the launcher's configuration ({name}) asks Accelerate for {instead}")


def _precision(options: HardwareOptions, cpu: bool, environment: Mapping[str, str]) -> tuple[Precision, str]:
    if options.mixed_precision == "fp16" and cpu:
        raise UserError("--mixed-precision fp16 needs a GPU; on a CPU use no (or bf16, which is slow there)")
    if options.mixed_precision is not None:
        return options.mixed_precision, "--mixed-precision"
    wish = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if wish == "bf16" or (wish == "fp16" and not cpu):
        return wish, "the launcher's configuration"  # type: ignore[return-value]
    return default_precision(torch.device("cpu") if cpu else choose_device("auto")[0])
