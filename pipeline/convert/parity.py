"""How far two implementations of the same network are apart: the largest difference of their outputs."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from pipeline import randomness
from pipeline.dit import DiT, DiTConfig

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

TOLERANCE: Final = 1e-5
"""Largest difference that float32 rounding may make, in the outputs' own units or, above 1, of the largest one."""

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Difference(NamedTuple):
    """How far two networks' outputs are apart on the same inputs."""

    largest: float
    """The largest absolute difference."""
    greatest_output: float
    """The largest absolute output, beside which the difference is to be seen."""


class DiffusersDifference(NamedTuple):
    """diffusers' own class against ours on the same weights."""

    as_is: Difference
    """As `from_pretrained` gives it."""
    fixed: Difference
    """With the release's timestep frequencies and norms (`fix`)."""


def forward_difference(ours: DiT, theirs: Forward) -> Difference:
    """The difference of the outputs on a fixed batch of noise, over early and late timesteps."""
    x, t, y = _batch(ours.config)
    with torch.no_grad():
        output = ours(x, t, y)
        return Difference(float((output - theirs(x, t, y)).abs().max()), float(output.abs().max()))


def _batch(config: DiTConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps, and the first, last and null label."""
    labels = [0, config.label_rows - 1, max(config.num_classes - 1, 0), 0]
    x = randomness.normal((4, *config.state_shape), 0, "parity")
    return x, torch.tensor([0, 1, 500, 999]), torch.tensor(labels)


def diffusers_difference(ours: DiT, folder: Path) -> DiffusersDifference:
    """diffusers' network in a transformer folder against ours, as a user gets it and fixed."""
    from diffusers import DiTTransformer2DModel

    safe = any(folder.glob("*.safetensors*"))
    network = DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False, use_safetensors=safe)
    network = network.float().eval()

    def theirs(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return network(x, timestep=t, class_labels=y).sample

    as_is = forward_difference(ours, theirs)
    fix(network)
    return DiffusersDifference(as_is, forward_difference(ours, theirs))


def fix(network: "DiTTransformer2DModel") -> None:
    """Give diffusers' DiT the release's timestep frequencies, 10000^(-i/128) and not ^(-i/127), and its norms' 1e-6."""
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
