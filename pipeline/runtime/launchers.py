"""What `accelerate launch` was asked for besides processes: each wish is followed, translated, or said not to be."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import Launch

_NOTHING = {"", "no", "none", "false", "0"}
_DYNAMO = {"MODE": "mode", "USE_FULLGRAPH": "fullgraph", "USE_DYNAMIC": "dynamic shapes"}
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
    dynamo_settings: tuple[str, ...]
    """What else is asked of torch.compile, in words: a mode, one whole graph, shapes that change."""
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
        dynamo_settings=tuple(
            f"{what} {value}" if name.endswith("MODE") else what
            for name, what in _DYNAMO.items()
            if (value := word(f"ACCELERATE_DYNAMO_{name}")) not in {None, "default"}
        ),
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


def part_of_job(place: Launch, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(which, of how many) parts of the work is this process's: by its rank, and by its task of a job array.

    Arrays: Slurm's without gaps, and Kubernetes' Indexed jobs whose count is told by JOB_COMPLETIONS.

    Raises:
        UserError: the variables contradict each other, or tell too little.
    """
    task, tasks = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, last = (int(environment.get(f"SLURM_ARRAY_TASK_{end}", "0")) for end in ("MIN", "MAX"))
        task, tasks = int(environment["SLURM_ARRAY_TASK_ID"]) - first, last - first + 1
        if int(environment.get("SLURM_ARRAY_TASK_COUNT", "0")) != tasks:
            raise UserError("the work is divided by the numbers of the array's tasks, so they must have no gaps: 0-7")
    elif "JOB_COMPLETION_INDEX" in environment:
        if not environment.get("JOB_COMPLETIONS", "").isdigit():
            raise UserError("an Indexed job does not tell its size; set JOB_COMPLETIONS to its completions, as in 8")
        task, tasks = int(environment["JOB_COMPLETION_INDEX"]), int(environment["JOB_COMPLETIONS"])
    if not 0 <= task < tasks:
        raise UserError(f"this is task {task} of {tasks}; let the job's variables agree")
    return task * place.world_size + place.rank, tasks * place.world_size
