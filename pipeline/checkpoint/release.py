"""A bare state dict in the names of the public DiT release: its configuration read off the tensors' shapes."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from pipeline.checkpoint.folder import FORMAT, VERSION
from pipeline.checkpoint.info import CheckpointInfo, make_info
from pipeline.checkpoint.tensor_files import block_numbers, join_names
from pipeline.dit.config import PRESETS, BlockOptions, ConfigError, DiTConfig
from pipeline.dit.embeddings import position_table
from pipeline.dit.model import on_meta
from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.vae import STABLE_DIFFUSION

KNOWN_HEADS: Final = {sizes["hidden_size"]: sizes["num_heads"] for sizes in PRESETS.values()}
"""Hidden width -> heads of the published sizes; shapes do not tell the number of heads."""

DEFAULT_GRID: Final = 32
"""Latent cells per side where a file has no position table: 256 pixels."""

_SAID: Final = {
    "qk_norm": "its queries and keys are normalised",
    "mlp": "its MLP is SwiGLU",
    "norm": "its norms are RMSNorm",
    "rotary": "its positions are rotary",
    "value_residual": "its blocks mix in the first block's values",
}
_BARE: Final = ("conditioning", "qk_norm")
"""Block options that a bare state dict is searched for; others leave no tensor, or are nobody's bare file."""

# The tensors whose shapes tell the configuration, and how many axes they have.
_TELLING = {
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}


def infer_config(state: Mapping[str, Tensor], *, num_heads: int | None, origin: object) -> DiTConfig:
    """The configuration that gives tensors of these names and shapes.

    Heads come from the known widths unless given; the grid from `pos_embed` (square if that fits no better, 32×32
    cells where there is none); the last row of the label table is the null class.

    Raises:
        UserError: telling tensors are missing or of the wrong rank, or the heads are not known.
    """
    missing = [name for name in _TELLING if name not in state]
    if missing:
        raise UserError(
            f"{origin} is not a DiT's state dict: it lacks {join_names(missing)}; its {len(state)} tensors begin with "
            f"{', '.join(sorted(state)[:5])}"
        )
    strange = [
        f"{name} is {list(state[name].shape)}"
        for name, axes in _TELLING.items()
        if state[name].ndim != axes or not state[name].numel()
    ]
    if strange:
        raise UserError(f"{origin} is not a DiT's state dict: {'; '.join(strange)}")
    patches = state["x_embedder.proj.weight"]
    if patches.shape[2] != patches.shape[3]:
        raise UserError(f"{origin}: x_embedder.proj.weight is {list(patches.shape)}, not [hidden, channels, p, p]")
    hidden_size, in_channels, patch_size, _ = patches.shape
    outputs = len(state["final_layer.linear.weight"]) / patch_size**2
    if outputs not in {in_channels, 2 * in_channels}:
        raise UserError(
            f"{origin}: the final layer gives {outputs:g} channels, but {in_channels} (or {2 * in_channels} with a "
            f"learned variance) fit the input"
        )
    try:
        usual = DiTConfig(
            input_size=_grid(state, hidden_size, patch_size, origin),
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=1 + max(block_numbers(state)),
            num_heads=_heads(hidden_size, num_heads, origin),
            mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / hidden_size,
            num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
            learn_sigma=outputs == 2 * in_channels,
        )
        return dataclasses.replace(usual, **_block_options(state, usual))
    except ConfigError as error:
        raise UserError(f"{origin}: {error}") from error


def unlike_the_release(config: DiTConfig) -> list[str]:
    """What of a network the public release does not have, and so neither its format nor diffusers' class."""
    usual = BlockOptions()
    reasons = {
        name: f"its {name} is {value}, not {getattr(usual, name)}"
        for name in BlockOptions.choices()
        if (value := getattr(config, name)) != getattr(usual, name)
    }
    reasons |= {name: said for name, said in _SAID.items() if name in reasons}
    if config.middle_head:
        reasons["middle_head"] = "it has a middle head"
    if config.class_token:
        reasons |= {"class_token": "it denoises a class token along with the latent"}
    if config.head_width:
        reasons["head_width"] = "it has a wide head"
    if config.height != config.width:
        reasons["input_size"] = f"its latent is {config.height}×{config.width}, not square"
    return list(reasons.values())


def default_info(
    config: DiTConfig,
    *,
    vae: Mapping[str, Any] = STABLE_DIFFUSION,
    diffusion: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    class_ids: Sequence[str] | None = None,
    downsample: int = 8,
) -> CheckpointInfo:
    """What a checkpoint's config.json would say of a network that came without one: the release's facts."""
    from pipeline.diffusion import make_process

    if diffusion is None:
        variance = "learned-range" if config.learn_sigma else "fixed-large"
        diffusion = {"objective": "ddpm", "variance": variance}
    known_classes, known_ids = _imagenet(config.num_classes)
    values = {
        "format": FORMAT,
        "version": VERSION,
        "step": 0,
        "model": config.to_json(),
        "diffusion": make_process(dict(diffusion)).to_json(),
        "classes": list(known_classes if classes is None else classes),
        "class_ids": list(known_ids if class_ids is None else class_ids),
        "latent": {
            "kind": "moments",
            "channels": config.in_channels,
            "height": config.height,
            "width": config.width,
            "downsample": downsample,
        },
        "vae": dict(vae),
        "image": {"size": config.height * downsample, "crop": "adm-center"},
        "training": {},
    }
    return make_info(values)


def _imagenet(count: int) -> tuple[list[str], list[str]]:
    """(names, ids): ImageNet's for 1000 classes, else bare labels, because nothing else is known."""
    if count == 1000:
        from pipeline.classes import imagenet_classes

        return [row.names for row in imagenet_classes()], [row.synset for row in imagenet_classes()]
    labels = [str(label) for label in range(count)]
    return labels, labels


def _heads(hidden_size: int, num_heads: int | None, origin: object) -> int:
    heads = num_heads or KNOWN_HEADS.get(hidden_size)
    if heads is None:
        known = ", ".join(f"{width} ({count})" for width, count in KNOWN_HEADS.items())
        raise UserError(
            f"{origin}: shapes do not tell the number of attention heads, and width {hidden_size} is none of the "
            f"published ones, {known}; give --num-heads (for dit-train convert it first, with dit-convert --num-heads)"
        )
    if hidden_size % heads:
        raise UserError(f"--num-heads {heads} does not divide {origin}'s width of {hidden_size}")
    return heads


def _block_options(state: Mapping[str, Tensor], usual: DiTConfig) -> dict[str, Any]:
    """How the blocks are built: the options whose network has this state's tensors, or the fewest others.

    Every choice of every option is tried in a network of one block that holds no numbers; of those that fit alike the
    first counts.
    """
    found = _one_block({name: tensor for name, tensor in state.items() if name != "pos_embed"})
    choices = {name: values for name, values in BlockOptions.choices().items() if name in _BARE}
    candidates = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]

    def differing(options: dict[str, Any]) -> int:
        return len(found ^ _one_block(on_meta(dataclasses.replace(usual, depth=1, **options)).state_dict()))

    return min(candidates, key=differing)


def _one_block(tensors: Mapping[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, the blocks laid one on another."""
    return {(re.sub(r"^blocks\.\d+\.", "blocks.0.", name), tuple(tensor.shape)) for name, tensor in tensors.items()}


def _grid(state: Mapping[str, Tensor], hidden_size: int, patch_size: int, origin: object) -> int | tuple[int, int]:
    """Latent cells (per side, or height and width) from the position table, whose values tell rows from columns."""
    table = state.get("pos_embed")
    if table is None:
        warn(f"{origin} has no position table; taking {DEFAULT_GRID}×{DEFAULT_GRID} latent cells")
        return DEFAULT_GRID
    tokens = table.numel() // hidden_size
    if not tokens or list(table.shape) not in ([1, tokens, hidden_size], [tokens, hidden_size]):
        raise UserError(f"{origin}: pos_embed is {list(table.shape)}, not [1, tokens, {hidden_size}]")
    side = math.isqrt(tokens)
    shapes = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    shapes.sort(key=lambda shape: abs(shape[0] - shape[1]))
    table = table.float().reshape(1, tokens, hidden_size)
    for rows, columns in shapes:
        if torch.allclose(position_table(rows, columns, hidden_size), table, atol=5e-3):
            return rows * patch_size if rows == columns else (rows * patch_size, columns * patch_size)
    if side * side != tokens:
        raise UserError(
            f"{origin}: pos_embed has {tokens} tokens, which is no square grid, and its values are not the sine and "
            f"cosine table of any grid; remove pos_embed from the file or convert it with its configuration"
        )
    warn(f"{origin}: pos_embed is not the sine and cosine table of {side}×{side} tokens; the table is used instead")
    return side * patch_size
