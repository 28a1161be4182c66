"""Latents, timesteps and labels as vectors of the network's width, and a class token beside the latent.

An encoder's class token, D numbers, can be denoised along with the latent (REG: Wu et al. 2025, arXiv 2507.01467).
Samplers and guidance need not know: the state of a network with a token has the latent's C channels and then as many as
hold D numbers, the rest of them 0, and so has its output, where variance channels follow in the same order.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from pipeline.dit.config import DiTConfig
from pipeline.randomness import normal

TIMESTEP_FEATURES = 256
Latents = Float[Tensor, "batch channel height width"]
Token = Float[Tensor, "batch dim"]
DRAWN_FOR = "class token"


def timestep_features(t: Tensor, count: int = TIMESTEP_FEATURES) -> Float[Tensor, "batch {count}"]:
    """Cosines, then sines, of t · 10000^(-i / half) for i = 0 … half - 1, where half = count / 2.

    Always float32: at t = 999 half precision would be off by whole radians. (diffusers divides by half - 1,
    which is another set of frequencies.)
    """
    half = count // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(rows: int, columns: int, width: int) -> Float[Tensor, "1 tokens {width}"]:
    """Fixed features of every token's place, row by row: first half for the column, second half for the row.

    Each half holds sines, then cosines, of place · 10000^(-i / n) for i = 0 … n - 1, where n = width / 4. They are
    computed on the CPU, because not every device has float64, and moved to the default one.
    """
    n = width // 4
    frequencies, row, column = (torch.arange(count, dtype=torch.float64, device="cpu") for count in (n, rows, columns))
    frequencies = 10000.0 ** -(frequencies / n)
    places = torch.meshgrid(row, column, indexing="ij")[::-1]
    angles = [place.flatten()[:, None] * frequencies for place in places]  # [rows · columns, n]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[None]
    return table.float().to(torch.get_default_device())


def rotary_table(
    rows: int, columns: int, head_size: int, added_tokens: int = 0
) -> Float[Tensor, "2 tokens {head_size}/2"]:
    """Cosines and sines of the angles by which `rotate` turns a head's pairs of channels (2-D RoPE).

    The first half of the pairs turns with the row, the second with the column, by place · 10000^(-i / n) for
    i = 0 … n - 1 with n = head_size / 4 (Su et al. 2021, arXiv 2104.09864, equation 34, once per axis; as in EVA-02,
    arXiv 2303.11331). Tokens that are added behind the image's have no place: they are not turned.
    """
    n = head_size // 4
    frequencies, row, column = (torch.arange(count, dtype=torch.float64, device="cpu") for count in (n, rows, columns))
    places = torch.meshgrid(row, column, indexing="ij")
    angles = torch.cat([place.flatten()[:, None] * 10000.0 ** -(frequencies / n) for place in places], dim=1)
    angles = torch.cat([angles, angles.new_zeros(added_tokens, 2 * n)])
    return torch.stack([angles.cos(), angles.sin()]).float().to(torch.get_default_device())


def rotate(x: Float[Tensor, "batch head token channel"], table: Float[Tensor, "2 token half"]) -> Tensor:
    """Queries or keys with channel i and channel half + i turned by the token's angle i, in float32 at least.

    So a query's product with a key depends on the differences of their rows and columns alone, and norms stay.
    """
    cos, sin = table[:, :, None]
    first, second = x.transpose(1, 2).chunk(2, dim=-1)  # tokens before heads, as they lie in memory
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype).transpose(1, 2)


class PatchEmbedder(nn.Module):
    """One token per patch of the latent, row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch token hidden"]:
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """A timestep's sinusoidal features through a small MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Float[Tensor, "batch hidden"]:
        # The weight's dtype is asked for at run time: sharded training keeps another one between the steps.
        return self.mlp(timestep_features(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A label's row of a learned table; the last row is mostly the null class."""

    def __init__(self, label_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(label_rows, hidden_size)

    def forward(self, y: Int[Tensor, " batch"]) -> Float[Tensor, "batch hidden"]:
        return self.embedding_table(y)


def joined(latent: Latents, token: Token, parts: int = 1) -> Latents:
    """The state of a latent [N, parts · C, H, W] and a token [N, parts · D]; parts: 2 with variance, else 1."""
    _, _, height, width = latent.shape
    numbers = token.unflatten(1, (parts, -1))
    numbers = functional.pad(numbers, (0, -numbers.shape[2] % (height * width)))
    channels = numbers.unflatten(2, (-1, height, width))
    return torch.cat([latent.unflatten(1, (parts, -1)), channels], dim=2).flatten(1, 2)


def parted(state: Latents, channels: int, dim: int) -> tuple[Latents, Token]:
    """The inverse of `joined`, of the state or output for C channels and a token's D numbers."""
    each = channels + -(-dim // math.prod(state.shape[2:]))
    numbers = state.unflatten(1, (-1, each))
    latent, token = numbers[:, :, :channels], numbers[:, :, channels:]
    return latent.flatten(1, 2), token.flatten(2)[:, :, :dim].flatten(1)


def state_noise(config: DiTConfig, seed: int, purpose: str, *numbers: int) -> Float[Tensor, "channel height width"]:
    """Standard normals for one state: the latent's are those of a network without a token, the token's drawn apart."""
    latent = normal((config.in_channels, config.height, config.width), seed, purpose, *numbers)
    if not config.class_token:
        return latent
    token = normal((config.class_token,), seed, f"{DRAWN_FOR} {purpose}", *numbers)
    return joined(latent[None], token[None])[0]
