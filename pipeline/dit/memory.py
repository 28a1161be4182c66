"""What a training step holds on a GPU, by formula: what stays from step to step, and what a micro-batch adds.

The constants were read off steps traced storage by storage (`tests/fake_cuda`), and a test there holds the formula to
5 % of the traced peak. Fragmentation, workspaces and the CUDA context come on top: about a GB on a real card.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pipeline.dit.config import PRESETS, DiTConfig
from pipeline.dit.macs import count_parameters
from pipeline.runtime.devices import Precision

CONTEXT_BYTES: Final = 10**9
"""For the context, workspaces and what the allocator cannot use; an allowance, not a measurement."""
_HALF: Final = (52.2, 25.0, 62.0)
_PER_TOKEN: Final[dict[Precision, tuple[float, float, float]]] = {
    "bf16": _HALF,
    "fp16": _HALF,
    "no": (79.3, 36.0, 97.0),
}
"""Bytes per token and channel that a block, and all that is no block, keep for the backward pass; and those of the one
block that is computed again, or whose gradients are being made."""
_PER_IMAGE: Final = 60.0
"""Bytes per channel and block of an image: the modulation by timestep and class."""
_CONDITIONING: Final = {
    "adaln-zero": (1.0, 1.0),
    "adaln": (0.842, 0.895),
    "cross-attention": (0.869, 0.993),
    "in-context": (0.675, 0.790),
}
"""What a block keeps at 16 bits and in float32, as a share of adaLN-Zero's."""
_QK_NORM: Final = (1.268, 1.101)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """What decides, beside the network, about the memory of a training step."""

    images: int
    """Samples that one process computes at a time: the batch over processes and accumulation."""
    precision: Precision = "bf16"
    accumulation: int = 1
    """Parts of a process's share of the batch; from two on the gradients stand beside the next part's activations."""
    checkpointing: bool = False
    averages: int = 1
    processes: int = 1
    sharded: bool = False
    """FSDP2 over the processes; else every one holds the whole network (DDP)."""


def step_memory(config: DiTConfig, settings: StepSettings) -> dict[str, int]:
    """The terms of a process's memory in bytes, by name; their sum is the peak."""
    parameters = count_parameters(config)
    share = settings.processes if settings.sharded else 1
    several = settings.processes > 1
    kept = settings.images * activation_bytes(
        config, precision=settings.precision, checkpointing=settings.checkpointing
    )
    last = settings.images * int(tokens(config) * config.hidden_size * _PER_TOKEN[settings.precision][2])
    by_block = settings.sharded or settings.checkpointing
    gradients = 4 * parameters // share
    terms = {
        "weights": 4 * parameters // share,
        "averages": 4 * parameters * settings.averages // share,
        "AdamW": 8 * parameters // share,
        "casts": 0 if settings.precision == "no" else 2 * parameters // (config.depth if by_block else 1),
    }
    if settings.sharded and several:  # a block is gathered while the one before it is computed
        terms["gathered blocks"] = 2 * 4 * parameters // config.depth
    if settings.accumulation > 1 or several:
        terms["gradients"] = gradients  # in DDP's buckets, or added up over the parts
        terms["activations"] = kept
    else:  # activations go as gradients come
        terms["activations, then gradients"] = max(kept, gradients + last)
    return terms


def standing_bytes(config: DiTConfig) -> int:
    """Weights, one average and AdamW's two moments, which stay from step to step on a GPU that holds them whole."""
    terms = step_memory(config, StepSettings(images=1))
    return terms["weights"] + terms["averages"] + terms["AdamW"]


def tabled_networks() -> Iterator[tuple[str, DiTConfig]]:
    """The networks that tables of memory are about: every preset at 256 pixels, and XL/2 at 512."""
    for model, side in [*((model, 32) for model in PRESETS), ("DiT-XL/2", 64)]:
        yield model, DiTConfig.from_preset(model, input_size=side)


def activation_bytes(config: DiTConfig, *, precision: Precision, checkpointing: bool) -> int:
    """What one image keeps for the backward pass, in bytes."""
    block, rest, recomputed = _PER_TOKEN[precision]
    full = precision == "no"
    block *= _CONDITIONING[config.conditioning][full] * (_QK_NORM[full] if config.qk_norm else 1.0)
    per_token = 4 * config.depth + recomputed if checkpointing else block * config.depth + rest
    return int(config.hidden_size * (tokens(config) * per_token + _PER_IMAGE * config.depth))


def tokens(config: DiTConfig) -> int:
    """Tokens of one image in a block."""
    return config.height * config.width // config.patch_size**2 + config.design.added_tokens
