"""DiT with adaLN-Zero as one writes it down straight from the paper: the opponent of `benchmarks.network`.

Nothing is fused or reordered by hand: `nn.Linear`, `scaled_dot_product_attention`, and modulation as the formula says.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.dit import DiTConfig


class PlainAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.out(mixed.transpose(1, 2).reshape(n, tokens, width))


class PlainBlock(nn.Module):
    """One block with adaLN-Zero."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = PlainAttention(width, config.num_heads)
        inner = int(width * config.mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        h = self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1)
        x = x + gate1.unsqueeze(1) * self.attention(h)
        h = self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
        return x + gate2.unsqueeze(1) * self.mlp(h)


class PlainDiT(nn.Module):
    """The whole network; the same computation as `pipeline.dit.DiT` with the default design."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patches = nn.Conv2d(config.in_channels, width, config.patch_size, config.patch_size)
        self.position = nn.Parameter(torch.zeros(1, config.tokens, width), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(config.label_rows, width)
        self.blocks = nn.ModuleList([PlainBlock(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, config.patch_size**2 * config.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        c = self.time(torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)) + self.label(y)
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        x = self.out(self.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        (rows, columns), p = self.config.grid, self.config.patch_size
        x = x.reshape(len(x), rows, columns, p, p, self.config.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, rows * p, columns * p)
