"""What training and sampling hold on a GPU, by formula: what stays from step to step, and what a micro-batch adds.

The constants were read off steps traced storage by storage (`tests/fake_cuda`), and a test there holds the formula to
5 % of the traced peak. Fragmentation, workspaces and the CUDA context come on top: about a GB on a real card.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pipeline.dit.config import PRESETS, DiTConfig
from pipeline.dit.macs import count_parameters
from pipeline.dit.matrices import count_in_matrices, most_of_a_shape
from pipeline.runtime.devices import Precision
from pipeline.vae_lanes import PARAMETERS, PREVIEWED_PX, decoder_bytes

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
_PER_MOVED: Final = 16
"""Bytes per parameter that Muon moves at once: gradient, momentum's direction, its orthogonal, and the step."""
_PER_IMAGE: Final = 60.0
"""Bytes per channel and block of an image: the modulation by timestep and class."""
_BY_TOKEN: Final = ((34.5, 63.0), (37.5, 63.0))
"""Bytes per token and channel, at 16 bits and in float32, of a wide head's modulation, which each token has of its own:
of every block, and of the one that is computed again."""
_CONDITIONING: Final = {
    "adaln-zero": (1.0, 1.0),
    "adaln": (0.842, 0.895),
    "cross-attention": (0.869, 0.993),
    "in-context": (0.675, 0.790),
}
"""What a block keeps at 16 bits and in float32, as a share of adaLN-Zero's."""
_QK_NORM: Final = (1.268, 1.101)
"""The same of normalised queries and keys, by LayerNorm."""
_ADDED: Final = {
    "swiglu": ((6.0, 14.0), (25.5, 54.5)),
    "rms of queries and keys": ((20.1, 16.1), (20.1, 16.1)),
    "rotary": ((4.0, 8.0), (4.0, 8.0)),
    "value residual": ((2.0, 4.0), (8.0, 17.7)),
}
"""Bytes per token and channel at 16 bits and in float32: what a block keeps more, and the one computed again."""
_FORWARD: Final[dict[Precision, float]] = {"bf16": 42.0, "fp16": 42.0, "no": 68.0}
"""Bytes per token and channel that stand at the peak of a pass without gradients."""
_FORWARD_ADDED: Final = {"swiglu": (3.33, 6.67), "value residual": (2.0, 4.0)}
"""The same, at 16 bits and in float32, of blocks that are not the release's."""
_FORWARD_HEAD: Final[dict[Precision, float]] = {"bf16": 65.7, "fp16": 65.7, "no": 95.1}
_FORWARD_BESIDE: Final = 7.7
"""The same of a wide head's channels, and of the network's own meanwhile."""
_SAMPLED: Final = 10
"""Latents in float32 that a sampler and its guidance hold of an image."""


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
    muon: bool = False
    """Whether the blocks' matrices are Muon's, which keeps one tensor of each where AdamW keeps two."""
    processes: int = 1
    shards: int = 1
    """Processes that divide one copy of the network among them (FSDP2, HSDP); 1 where each holds it whole (DDP)."""
    previews: int = 0
    """Images of a preview that one process samples, and the main one decodes beside all that stays; 0 draws none."""


def step_memory(config: DiTConfig, settings: StepSettings) -> dict[str, int]:
    """The terms of a process's memory in bytes, by name; their sum is the peak."""
    parameters = count_parameters(config)
    share = settings.shards
    by_muon = count_in_matrices(config) if settings.muon else 0
    several = settings.processes > 1
    kept = settings.images * activation_bytes(
        config, precision=settings.precision, checkpointing=settings.checkpointing
    )
    backward = _PER_TOKEN[settings.precision][2] + _added(config, settings.precision)[1]
    last = settings.images * int(tokens(config) * config.hidden_size * backward)
    by_block = share > 1 or settings.checkpointing
    gradients = 4 * parameters // share
    terms = {
        "weights": 4 * parameters // share,
        "averages": 4 * parameters * settings.averages // share,
        "AdamW": 8 * (parameters - by_muon) // share,
        **({"Muon": 4 * by_muon // share} if by_muon else {}),
        "casts": 0 if settings.precision == "no" else 2 * parameters // (config.depth if by_block else 1),
    }
    if share > 1:  # a block is gathered while the one before it is computed
        terms["gathered blocks"] = 2 * 4 * parameters // config.depth
    # Muon computes all matrices of a shape at once, after the casts are gone.
    moved = max(0, _PER_MOVED * most_of_a_shape(config) // share - terms["casts"]) if by_muon else 0
    drawn = 0
    if settings.previews:
        terms["VAE of previews"] = 4 * PARAMETERS
        drawn = _preview_bytes(config, settings) - terms["casts"]
    if settings.accumulation > 1 or several:
        terms["gradients"] = gradients  # in DDP's buckets, or added up over the parts
        terms["activations"] = max(kept, moved, drawn)
    else:  # activations go as gradients come
        terms["activations, then gradients"] = max(kept, gradients + max(last, moved), drawn)
    return terms


def _preview_bytes(config: DiTConfig, settings: StepSettings) -> int:
    """A preview's sampling, in which the weights' casts stand too, or its decoding, whichever is larger."""
    casts = 0 if settings.precision == "no" or settings.shards > 1 else 2 * count_parameters(config)
    sampled = forward_bytes(config, settings.previews, precision=settings.precision)
    return max(casts + sampled, decoder_bytes(max(PREVIEWED_PX, image_px(config))))


def sampling_memory(config: DiTConfig, images: int, *, precision: Precision = "bf16") -> dict[str, int]:
    """The terms of sampling so many images at a time, guided by the class, in bytes; a VAE's come on top."""
    embedded = config.label_rows * config.hidden_size  # which stay in float32, as no product is made with them
    return {
        "weights": (4 if precision == "no" else 2) * count_parameters(config) + (precision != "no") * 2 * embedded,
        "activations": forward_bytes(config, images, precision=precision),
    }


def forward_bytes(config: DiTConfig, images: int, *, precision: Precision) -> int:
    """What a guided pass without gradients holds beside the weights: twice the batch, and the sampler's latents."""
    full = precision == "no"
    said = {"swiglu": config.mlp == "swiglu", "value residual": config.value_residual}
    value = _FORWARD[precision] + sum(_FORWARD_ADDED[name][full] for name in said if said[name])
    per_token = config.hidden_size * value
    if config.head is not None:
        in_head = config.hidden_size * _FORWARD_BESIDE + config.head_width * _FORWARD_HEAD[precision]
        per_token = max(per_token, in_head)
    latent = 4 * math.prod(config.state_shape)
    return images * int(2 * tokens(config) * per_token + _SAMPLED * latent)


def image_px(config: DiTConfig) -> int:
    """Pixels of an image whose latent's cells are 8 × 8 of them."""
    return 64 * config.height * config.width


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
    by_layer_norm = config.qk_norm and config.norm == "layer"
    block *= _CONDITIONING[config.conditioning][full] * (_QK_NORM[full] if by_layer_norm else 1.0)
    kept, again = _added(config, precision)
    block, recomputed = block + kept, recomputed + again
    per_token = 4 * config.depth + recomputed if checkpointing else block * config.depth + rest
    own = int(config.hidden_size * (tokens(config) * per_token + _PER_IMAGE * config.depth))
    if config.head is None:
        return own
    kept, again = _BY_TOKEN[full]
    by_token = config.head_width * config.tokens * (again if checkpointing else kept * config.head_depth)
    return own + int(by_token) + activation_bytes(config.head, precision=precision, checkpointing=checkpointing)


def _added(config: DiTConfig, precision: Precision) -> tuple[float, float]:
    """What blocks that are not the release's keep more, per token and channel, and the one that is computed again."""
    rms = config.qk_norm and config.norm == "rms"
    said = {
        "swiglu": config.mlp == "swiglu",
        "rms of queries and keys": rms,
        "rotary": config.rotary and not config.qk_norm,  # normalised ones are copies already
        "value residual": config.value_residual,
    }
    kept, again = (sum(_ADDED[name][part][precision == "no"] for name in said if said[name]) for part in (0, 1))
    return kept, again


def tokens(config: DiTConfig) -> int:
    """Tokens of one image in a block."""
    return config.tokens + bool(config.class_token) + config.design.added_tokens
