"""The processes and devices of a run, through Accelerate; every choice is returned with its reason."""

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.runtime.devices import Precision, choose_device, default_precision, set_tf32
from pipeline.runtime.errors import UserError
from pipeline.runtime.launchers import refuse_foreign_wishes, warn_if_lonely, wishes
from pipeline.runtime.processes import keep_freed_memory, launch
from train.options import HardwareOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")

AUTOCAST = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What gloo and NCCL say of a process that is gone, and of one that does not come.
_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError"),
    *("communicator was aborted", "NCCL communicator aborted", "ncclSystemError", "Connection was likely closed"),
)
_TIMEOUTS = (
    *("Timed out waiting", "Application timeout caused pair closure", "imed out after", "imeout after"),
    *("Watchdog caught collective operation timeout", "collective operation timeout", "Socket Timeout"),
)
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """This process's place, device and precision, and the few things that processes do together."""

    accelerator: "Accelerator"
    device: torch.device
    precision: Precision
    reason: str
    """Device and precision with why, for people to read."""
    rank: int
    processes: int
    hosts: dist.ProcessGroup | None
    """Process group for numbers on the hosts, so that agreeing on a stop never waits for a GPU; None when alone."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the device, in place."""
        if self.processes > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Value) -> Value:
        """The main process's value on every process."""
        box = [value]
        if self.processes > 1:
            dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in the order of their ranks, on every process."""
        if self.processes == 1:
            return [value]
        values: list[Any] = [None] * self.processes
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def on_main(self, action: Callable[[], Value]) -> Value:
        """Do something on the main process alone and give its result to all; an error ends all of them."""
        result: Value | UserError | None = None
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
        return cast("Value", result)

    def together(self, action: Callable[[], Value]) -> list[Value]:
        """What each process's action gives, by rank, on every process; where one fails, all raise an error."""
        value: Value | None = None
        failed: Exception | None = None
        try:
            value = action()
        except Exception as error:  # noqa: BLE001 - raised again below, when the others know
            failed = error
        answers = self.gather((value, failed is None))
        if failed is not None:
            raise failed
        if not all(is_done for _, is_done in answers):
            raise UserError("another process of this run could not do its part, and says why; this one ends too")
        return [cast("Value", answer) for answer, _ in answers]

    def apart(self, timeout_minutes: float) -> "Hardware":
        """The same processes once more, for a thread of each; every process must call it."""
        return replace(self, hosts=dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes)))

    def barrier(self) -> None:
        """Until every process is here."""
        if self.processes > 1:
            dist.barrier(group=self.hosts)

    def close(self) -> None:
        """Leave the process group when all is done; after an error nobody waits (`processes.end_in_group`)."""
        if dist.is_initialized():
            dist.destroy_process_group()

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
    refuse_foreign_wishes(environment)
    if "MASTER_ADDR" not in environment:  # then nothing tells processes where to meet
        refuse_lonely_ranks(environment, 1)
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    wanted, found = choose_device(options.device, launch(environment))
    if wanted.type != "cpu":
        _take(wanted, options.device)
    precision, why = _precision(options, wanted, environment)
    patience = timedelta(minutes=options.process_timeout)
    accelerator = Accelerator(
        cpu=wanted.type == "cpu",
        mixed_precision=precision,
        log_with=list(trackers) or None,
        # Both are this command's own business (`follow_launcher`), whatever the launcher has told Accelerate.
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=patience),
        ],
    )
    refuse_lonely_ranks(environment, accelerator.num_processes)
    warn_if_lonely(environment)
    device = accelerator.device
    if device.type == "cpu":
        keep_freed_memory()
    set_tf32(device, options.tf32)
    found = found if options.device == "auto" else f"--device {options.device}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return Hardware(
        accelerator=accelerator,
        device=device,
        precision=precision,
        reason=f"{name} ({found}), precision {precision} ({why})",
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        hosts=dist.new_group(backend="gloo", timeout=patience) if accelerator.num_processes > 1 else None,
    )


def explain_lost_peer(error: BaseException, timeout_minutes: float) -> str | None:
    """A sentence, if the error says that another process went away or stood still in what all do together."""
    text = str(error)
    if any(words in text for words in _TIMEOUTS):
        return (
            f"the processes of this run waited {timeout_minutes:g} minutes in vain for one of them "
            "(--process-timeout), which stands still or was cut off; look for what it said, then run the same command "
            "again"
        )
    if any(words in text for words in _LOST):
        return "another process of this run has ended, and has said why; this one ends too"
    return None


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


def _take(device: torch.device, asked: str) -> None:
    """Make the device the one that Accelerate takes; with several processes it gives each its own, as we would."""
    found = torch.accelerator.current_accelerator()
    if found is None or found.type != device.type:
        raise UserError(f"--device {asked}: training runs on {found.type if found else 'cpu'} here; use auto or cpu")
    torch.accelerator.set_device_index(device.index or 0)


def _precision(options: HardwareOptions, device: torch.device, environment: Mapping[str, str]) -> tuple[Precision, str]:
    """The precision and why: the flag's, else the launcher's, else the device's own."""
    cpu = device.type == "cpu"
    wish = wishes(environment).precision
    if options.mixed_precision == "fp16" and cpu:
        raise UserError("--mixed-precision fp16 needs a GPU; on a CPU use no (or bf16, which is slow there)")
    if options.mixed_precision is not None:
        overridden = f", over the launcher's {wish}" if wish not in {None, options.mixed_precision} else ""
        return options.mixed_precision, f"--mixed-precision{overridden}"
    if wish == "bf16" or (wish == "fp16" and not cpu):
        return wish, "the launcher's configuration"  # type: ignore[return-value]
    precision, why = default_precision(device)
    if wish == "fp16":
        return precision, f"{why}; the launcher's fp16 needs a GPU"
    if wish is not None:
        raise UserError(
            f"the launcher's configuration asks for mixed precision {wish}, which this command does not do; take it "
            f"out, or pass --mixed-precision no, bf16 or fp16"
        )
    return precision, why
