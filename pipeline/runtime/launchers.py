"""What `accelerate launch` was asked for besides processes: each wish is followed, translated, or said not to be."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError

_NOTHING = {"", "no", "none", "false", "0"}
_FOREIGN = {
    "ACCELERATE_USE_FSDP": "its own FSDP (which on a CPU is silently plain DDP); take it out and pass --sharding fsdp",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed, which this command does not drive; use --sharding fsdp instead",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM, which this command does not drive; use --sharding fsdp instead",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism, which this command does not do; take it out "
    "and pass --sharding fsdp",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the launcher's flags and configuration file ask for, as far as it tells the processes it starts."""

    precision: str | None
    """bf16, fp16 or fp8; None for "no", which is also what it says when nothing was asked for."""
    dynamo: str | None
    """The backend that torch.compile is to use, in lower case."""
    accumulation: int | None
    """Parts of a batch, if more than one."""
    lonely: bool
    """Whether several processes were asked for, and this one was started alone."""


def wishes(environment: Mapping[str, str] = os.environ) -> Wishes:
    """What the launcher of this process was asked for.

    Raises:
        UserError: a wish makes no sense.
    """

    def word(name: str) -> str | None:
        value = environment.get(name, "").lower()
        return None if value in _NOTHING else value

    parts = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if parts not in {"", "auto"} and not parts.isdigit():
        raise UserError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={parts} must be a whole number; unset it")
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    return Wishes(
        precision=word("ACCELERATE_MIXED_PRECISION"),
        dynamo=word("ACCELERATE_DYNAMO_BACKEND"),
        accumulation=int(parts) if parts.isdigit() and int(parts) > 1 else None,
        lonely=launched and "MASTER_ADDR" in environment and "RANK" not in environment,
    )


def refuse_foreign_wishes(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if the launcher is to divide the network in a way that training does not."""
    for name, instead in _FOREIGN.items():
        if environment.get(name, "false").lower() in {"1", "true", "yes"}:
            raise UserError(f"the launcher's configuration ({name}) asks Accelerate for {instead}")


def warn_if_lonely(environment: Mapping[str, str] = os.environ) -> None:
    """A warning where several processes were asked for and one was started: Accelerate does that on a CPU."""
    if wishes(environment).lonely:
        warn(
            "accelerate launch was asked for several processes and has started one; on a CPU it starts N with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )


def say_unfollowed(flags: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> None:
    """A line for the wishes that a command leaves to its own flags, and the warning of a lonely process.

    Args:
        flags: {"precision" or "dynamo": the command's flag for it}.
    """
    asked = wishes(environment)
    found = {"precision": asked.precision, "dynamo": asked.dynamo}
    left = [f"{name} {value} ({flags[name]} sets it)" for name, value in found.items() if value and name in flags]
    if left:
        say(f"note: the launcher's {' and '.join(left)} is for training, and is not followed here")
    warn_if_lonely(environment)
