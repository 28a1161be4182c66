"""Parameters and multiply-adds of a network, counted on tensors that hold no numbers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.dit.config import BLOCKS, PRESETS, Conditioning, DiTConfig
from pipeline.dit.model import on_meta


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelRow:
    """One row of the paper's table 4, counted and as printed there."""

    model: str
    """The preset's name."""
    conditioning: Conditioning
    """The design of the blocks."""
    input: str
    """Shape of the latent."""
    parameters: int
    """Trainable parameters; the position table is fixed and left out."""
    gflops: float
    """10⁹ multiply-adds of one forward pass of one sample."""
    paper_gflops: float
    """The paper's "Flops (G)"."""
    paper_parameters_millions: int
    """The paper's "Params (M)"."""


# Peebles & Xie 2023, table 4: (GFLOPs, millions of parameters).
_PAPER: dict[tuple[str, Conditioning, int], tuple[float, int]] = {
    ("DiT-S/8", "adaln-zero", 32): (0.36, 33),
    ("DiT-S/4", "adaln-zero", 32): (1.41, 33),
    ("DiT-S/2", "adaln-zero", 32): (6.06, 33),
    ("DiT-B/8", "adaln-zero", 32): (1.42, 131),
    ("DiT-B/4", "adaln-zero", 32): (5.56, 130),
    ("DiT-B/2", "adaln-zero", 32): (23.01, 130),
    ("DiT-L/8", "adaln-zero", 32): (5.01, 459),
    ("DiT-L/4", "adaln-zero", 32): (19.70, 458),
    ("DiT-L/2", "adaln-zero", 32): (80.71, 458),
    ("DiT-XL/8", "adaln-zero", 32): (7.39, 676),
    ("DiT-XL/4", "adaln-zero", 32): (29.05, 675),
    ("DiT-XL/2", "in-context", 32): (119.37, 449),
    ("DiT-XL/2", "cross-attention", 32): (137.62, 598),
    ("DiT-XL/2", "adaln", 32): (118.56, 600),
    ("DiT-XL/2", "adaln-zero", 32): (118.64, 675),
    ("DiT-XL/2", "adaln-zero", 64): (524.60, 675),
}


@functools.lru_cache
def count_parameters(config: DiTConfig) -> int:
    """Trainable parameters."""
    return _at_depth(config, lambda network: sum(parameter.numel() for parameter in on_meta(network).parameters()))


@functools.lru_cache
def count_macs(config: DiTConfig) -> int:
    """Multiply-adds of one forward pass of one sample, as torch's own counter finds them (it counts each as two)."""
    return _at_depth(config, _counted)


def _at_depth(config: DiTConfig, count: Callable[[DiTConfig], int]) -> int:
    """A count for any depth: every block but the first is like the others, so networks of one and two blocks tell."""
    one, two = (count(dataclasses.replace(config, depth=depth)) for depth in (1, 2))
    return one + (config.depth - 1) * (two - one)


def _counted(config: DiTConfig) -> int:
    x = torch.empty(1, *config.state_shape, device="meta")
    t, y = torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    model = on_meta(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y)
    return counter.get_total_flops() // 2


def models_table() -> list[ModelRow]:
    """Every network of the paper's table 4 with our counts beside the paper's."""
    rows = []
    for (model, conditioning, size), (paper_gflops, paper_parameters) in _PAPER.items():
        config = DiTConfig.from_preset(model, input_size=size, conditioning=conditioning)
        row = ModelRow(
            model=model,
            conditioning=conditioning,
            input=f"{config.in_channels}×{size}×{size}",
            parameters=count_parameters(config),
            gflops=count_macs(config) / 1e9,
            paper_gflops=paper_gflops,
            paper_parameters_millions=paper_parameters,
        )
        rows.append(row)
    return rows


class ModernRow(NamedTuple):
    """A network with the blocks of `--blocks modern`, beside which no paper prints figures."""

    model: str
    input: str
    parameters: int
    gflops: float
    """10⁹ multiply-adds of one forward pass of one sample."""


def modern_table() -> list[ModernRow]:
    """The presets of patch 2 with modern blocks at 256 pixels, and XL/2 at 512."""
    networks = [*((model, 32) for model in PRESETS if model.endswith("/2")), ("DiT-XL/2", 64)]
    configs = [(model, DiTConfig.from_preset(model, input_size=side, **BLOCKS["modern"])) for model, side in networks]
    return [
        ModernRow(model, f"{config.in_channels}×{config.height}×{config.width}", count_parameters(config), macs / 1e9)
        for model, config in configs
        for macs in [count_macs(config)]
    ]


def modern_markdown(rows: list[ModernRow]) -> str:
    """The rows as a Markdown table, one line each under two lines of heading."""
    lines = [["model", "input", "parameters", "GFLOPs"], ["---"] * 2 + ["---:"] * 2]
    lines += [[row.model, row.input, f"{row.parameters:,}", f"{row.gflops:.6f}"] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def models_markdown(rows: list[ModelRow]) -> str:
    """The rows as a Markdown table, one line each under two lines of heading."""
    heading = ["model", "conditioning", "input", "parameters", "paper", "GFLOPs", "paper"]
    lines = [heading, ["---"] * 3 + ["---:"] * 4]
    for row in rows:
        counted = [f"{row.parameters:,}", f"{row.paper_parameters_millions} M"]
        lines.append([row.model, row.conditioning, row.input, *counted, f"{row.gflops:.6f}", f"{row.paper_gflops:.2f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
