"""Will it fit? What a process of a run holds on its GPU, said before the first step, with the settings that fit."""

import dataclasses
from collections.abc import Iterator

import torch

from pipeline.dit import DiTConfig
from pipeline.dit.memory import CONTEXT_BYTES, StepSettings, step_memory
from pipeline.runtime.console import refuse_unless
from pipeline.runtime.units import size
from train.distributed import Hardware
from train.options import PreviewOptions, TrainOptions
from train.parallel import shard_processes

CARDS_GB = (16, 24, 48, 80, 141)
"""Memory of GPUs that people have, in 10⁹ bytes."""

_PRECISIONS = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}


def settings_of(options: TrainOptions, machine: Hardware) -> StepSettings:
    """What decides about memory; away from a GPU it is asked what one would hold, in bf16 unless told otherwise."""
    on_gpu = machine.device.type == "cuda"
    share = options.optimizer.batch_size // machine.processes
    return StepSettings(
        images=-(-share // options.hardware.grad_accumulation),
        precision=machine.precision if on_gpu else options.hardware.mixed_precision or "bf16",
        accumulation=options.hardware.grad_accumulation,
        checkpointing=options.model.gradient_checkpointing,
        averages=options.average.count,
        muon=options.optimizer.optimizer == "muon",
        processes=machine.processes,
        shards=shard_processes(options.hardware, machine.processes),
        previews=_previews(options.preview, machine.processes),
    )


def _previews(options: PreviewOptions, processes: int) -> int:
    return -(-options.preview_classes * options.preview_rows // processes) if options.sample_every else 0


def needed_bytes(config: DiTConfig, settings: StepSettings) -> int:
    """All that a GPU must have."""
    return sum(step_memory(config, settings).values()) + CONTEXT_BYTES


def describe(config: DiTConfig, settings: StepSettings) -> dict[str, str]:
    """{name: text} for people: the terms, the cards that they fit on, and what other settings make of them."""
    terms, needed = step_memory(config, settings), needed_bytes(config, settings)
    fits = [f"{gb} GB" for gb in CARDS_GB if needed <= gb * 1e9]
    others, least = [], needed
    for words, other in _ways(settings):
        if (less := needed_bytes(config, other)) < 0.9 * least:
            others.append(f"{words}: {size(less)}")
            least = less
    return {
        "memory": f"{size(needed)} a GPU at {settings.images} samples at a time, {_PRECISIONS[settings.precision]}: "
        + ", ".join(f"{name} {size(term)}" for name, term in terms.items())
        + f", context and workspaces about {size(CONTEXT_BYTES)}",
        "fits": f"cards of {', '.join(fits)}" if fits else f"no card of up to {CARDS_GB[-1]} GB",
        "instead": "; ".join(others),
    }


def refuse_too_small_a_card(
    config: DiTConfig, settings: StepSettings, memory_bytes: int | None, *, allowed: bool
) -> None:
    """Say, before anything is made, that a GPU is too small, and which settings fit.

    Args:
        config: the network.
        settings: what is asked for.
        memory_bytes: what the GPU has; None where that is not known (a CPU).
        allowed: whether to go on all the same, with a warning.

    Raises:
        UserError: it does not fit.
    """
    if memory_bytes is None or (needed := needed_bytes(config, settings)) <= memory_bytes:
        return
    fitting = [words for words, other in _ways(settings) if needed_bytes(config, other) <= memory_bytes]
    way = f"{fitting[0]} would fit" if fitting else "no setting of these makes it fit; take a smaller --model"
    sentence = f"this run needs about {size(needed)} on each GPU, which has {size(memory_bytes)}; {way}"
    refuse_unless(allowed, sentence, " (or pass --anyway to try all the same)")


def device_bytes(device: torch.device) -> int | None:
    """The memory of a CUDA GPU, or None."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _ways(settings: StepSettings) -> Iterator[tuple[str, StepSettings]]:
    """Settings that need less, with their flags: those that cost least time first."""
    kinds = [("", settings)]
    if not settings.checkpointing:
        kinds.append((" --gradient-checkpointing", dataclasses.replace(settings, checkpointing=True)))
    if settings.processes > settings.shards:
        kinds += [
            (f" --sharding fsdp{words}", dataclasses.replace(kind, shards=kind.processes)) for words, kind in kinds
        ]
    share = settings.images * settings.accumulation
    for words, kind in kinds:
        if words:
            yield words.strip(), kind
        parts = settings.accumulation
        while share % (parts * 2) == 0 and parts < 64:
            parts *= 2
            fewer = dataclasses.replace(kind, accumulation=parts, images=share // parts)
            yield f"--grad-accumulation {parts}{words}", fewer
