"""The transformer block and the final layer, in the four conditioning designs of the paper (section 3.2).

A block is always attention, then an MLP, each on a normalised copy of the tokens and added back to them.
The designs differ in three places only:

    design            the norms                            each branch's sum       condition given to a block
    adaln-zero        shift and scale from the condition   times a learned gate    [batch, hidden]
    adaln             shift and scale from the condition   plain                   [batch, hidden]
    cross-attention   own weights                          plain, a third branch   [batch, 2, hidden]
    in-context        own weights                          plain                   none: it is two of the tokens
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pipeline.dit.config import Design, DiTConfig

Tokens = Float[Tensor, "batch token hidden"]
NORM_EPSILON = 1e-6


class Modulation(NamedTuple):
    """What the condition does to one branch; each is [batch, 1, hidden], or None where the design has none."""

    shift: Tensor | None = None
    scale: Tensor | None = None
    gate: Tensor | None = None


def introduce(design: Design, tokens: Tokens, t: Tensor, y: Tensor) -> tuple[Tokens, Tensor | None]:
    """The tokens and what every block is given besides, from the timestep's and the label's vectors [batch, hidden]."""
    if design.added_tokens:
        return torch.cat([tokens, t[:, None], y[:, None]], dim=1), None
    if design.crosses:
        return tokens, torch.stack([t, y], dim=1)
    return tokens, t + y


def modulation_layer(hidden_size: int, parts: int) -> nn.Sequential:
    """A layer that regresses `parts` vectors of the network's width from the condition."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))


def modulate(x: Tokens, modulation: Modulation) -> Tokens:
    """(1 + scale) · x + shift in one pass over the tokens; x itself where the design has no modulation."""
    if modulation.shift is None or modulation.scale is None:
        return x
    return torch.addcmul(modulation.shift, x, 1 + modulation.scale)


def add_branch(x: Tokens, modulation: Modulation, branch: Tokens) -> Tokens:
    """Tokens + gate · branch in one pass over the tokens; their plain sum where the design has no gate."""
    if modulation.gate is None:
        return x + branch
    return torch.addcmul(x, modulation.gate, branch)


def _norm(config: DiTConfig) -> nn.LayerNorm:
    """The norm before a branch; it has weights of its own only where the condition does not give them."""
    return nn.LayerNorm(config.hidden_size, eps=NORM_EPSILON, elementwise_affine=not config.design.modulation_vectors)


def _split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[batch, token, parts · hidden] as `parts` tensors [batch, head, token, hidden / heads].

    Parts first, then heads: on the way back the parts' gradients are written straight into the layer's layout.
    """
    batch, tokens, width = x.shape
    split = x.view(batch, tokens, parts, heads, width // (parts * heads)).unbind(2)
    return tuple(part.transpose(1, 2) for part in split)


def _join_heads(x: Float[Tensor, "batch head token channel"]) -> Tokens:
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Every token looks at every token."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        head_size = config.hidden_size // config.num_heads
        self.q_norm = nn.LayerNorm(head_size, eps=NORM_EPSILON) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_size, eps=NORM_EPSILON) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tokens) -> Tokens:
        q, k, v = _split_heads(self.qkv(x), 3, self.num_heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.proj(_join_heads(functional.scaled_dot_product_attention(q, k, v)))


class CrossAttention(nn.Module):
    """Every token looks at the condition's two vectors."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tokens, condition: Float[Tensor, "batch 2 hidden"]) -> Tokens:
        (q,) = _split_heads(self.q(x), 1, self.num_heads)
        k, v = _split_heads(self.kv(condition), 2, self.num_heads)
        return self.proj(_join_heads(functional.scaled_dot_product_attention(q, k, v)))


class Mlp(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tokens) -> Tokens:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """One transformer block, told the condition by the configuration's design (see the module's table)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = _norm(config)
        self.attn = SelfAttention(config)
        self.norm2 = _norm(config)
        self.mlp = Mlp(config.hidden_size, int(config.hidden_size * config.mlp_ratio))
        self.crosses = config.design.crosses
        if self.crosses:
            self.norm_cross = _norm(config)
            self.cross_attn = CrossAttention(config)
        self.parts = config.design.modulation_vectors
        if self.parts:
            self.adaLN_modulation = modulation_layer(config.hidden_size, self.parts)

    def forward(self, x: Tokens, condition: Tensor | None) -> Tokens:
        for_attention, for_mlp = self._modulations(x, condition)
        x = add_branch(x, for_attention, self.attn(modulate(self.norm1(x), for_attention)))
        if self.crosses:
            x = x + self.cross_attn(self.norm_cross(x), condition)
        return add_branch(x, for_mlp, self.mlp(modulate(self.norm2(x), for_mlp)))

    def _modulations(self, x: Tokens, condition: Tensor | None) -> tuple[Modulation, Modulation]:
        if not self.parts:
            return Modulation(), Modulation()
        # Under autocast the tokens stay float32; so must 1 + scale and the gated sum, or each block would round.
        parts = self.adaLN_modulation(condition).to(x.dtype)[:, None].chunk(self.parts, dim=-1)
        return Modulation(*parts[: self.parts // 2]), Modulation(*parts[self.parts // 2 :])


class FinalLayer(nn.Module):
    """Tokens as patches of the output, flattened in the order (row, column, channel)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = _norm(config)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.modulated = config.design.modulation_vectors > 0
        if self.modulated:
            self.adaLN_modulation = modulation_layer(config.hidden_size, 2)

    def forward(self, x: Tokens, condition: Tensor | None) -> Float[Tensor, "batch token patch"]:
        x = self.norm_final(x)
        if self.modulated:
            x = modulate(x, Modulation(*self.adaLN_modulation(condition).to(x.dtype)[:, None].chunk(2, dim=-1)))
        return self.linear(x)
