"""The transformer block and the final layer, in the four conditioning designs of the paper (section 3.2).

A block is always attention, then an MLP, each on a normalised copy of the tokens and added back to them.
The designs differ in three places only:

    design            the norms                            each branch's sum       condition given to a block
    adaln-zero        shift and scale from the condition   times a learned gate    [batch, hidden]
    adaln             shift and scale from the condition   plain                   [batch, hidden]
    cross-attention   own weights                          plain, a third branch   [batch, 2, hidden]
    in-context        own weights                          plain                   none: it is two of the tokens

What is newer than the paper is off unless `BlockOptions` says so: SwiGLU (Shazeer 2020, arXiv 2002.05202), RMSNorm
(Zhang & Sennrich 2019, arXiv 1910.07467), normalised queries and keys, rotary positions (`embeddings.rotate`), and the
value residual (Zhou et al. 2024, arXiv 2410.17897).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pipeline.dit.config import Design, DiTConfig
from pipeline.dit.embeddings import PatchEmbedder, position_table, rotary_table, rotate

Tokens = Float[Tensor, "batch token hidden"]
NORM_EPSILON = 1e-6


class Modulation(NamedTuple):
    """What the condition does to one branch; each is [batch, 1 or token, hidden], or None where the design has none."""

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


def modulation_of(layer: nn.Module, condition: Tensor | None, x: Tokens) -> Tensor:
    """What the layer regresses from the condition, [batch, 1, …], or [batch, token, …] of a condition at every token.

    Under autocast the tokens stay float32; so must 1 + scale and the gated sum, or each block would round.
    """
    assert condition is not None, "given wherever a block has such a layer"
    vectors: Tensor = layer(condition).to(x.dtype)
    return vectors[:, None] if condition.ndim == 2 else vectors


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


class RMSNorm(nn.RMSNorm):
    """x / √(mean x² + ε), times a gain if it has one; computed in float32 at least, given back in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:  # heads before tokens: in the order they lie in memory, so that attention's output does, too
            return self._normalized(x.transpose(1, 2)).transpose(1, 2)
        return self._normalized(x)

    def _normalized(self, x: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(precise)
        return functional.rms_norm(x.to(precise), self.normalized_shape, weight, self.eps).to(x.dtype)


def _norm_of(config: DiTConfig, size: int, *, affine: bool) -> nn.Module:
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(size, eps=NORM_EPSILON, elementwise_affine=affine)


def _norm(config: DiTConfig) -> nn.Module:
    """The norm before a branch; it has weights of its own only where the condition does not give them."""
    return _norm_of(config, config.hidden_size, affine=not config.design.modulation_vectors)


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
    """Every token looks at every token.

    The value residual: v ← v + λ (v₁ - v), where v₁ are the first block's values and λ is learned, from 0.5 on.
    """

    def __init__(self, config: DiTConfig, *, first: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        head_size = config.hidden_size // config.num_heads
        self.q_norm = _norm_of(config, head_size, affine=True) if config.qk_norm else nn.Identity()
        self.k_norm = _norm_of(config, head_size, affine=True) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.value_lambda = nn.Parameter(torch.empty(1)) if config.value_residual and not first else None

    def forward(
        self, x: Tokens, rotary: Tensor | None = None, first_values: Tensor | None = None
    ) -> tuple[Tokens, Tensor]:
        """What is added to the tokens, and the values [batch, head, token, channel] it is made of."""
        q, k, v = _split_heads(self.qkv(x), 3, self.num_heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if self.value_lambda is not None:
            assert first_values is not None, "the first block's values are given to every other one"
            v = torch.lerp(v, first_values, self.value_lambda.to(v.dtype))
        return self.proj(_join_heads(functional.scaled_dot_product_attention(q, k, v))), v


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
    """Two linear layers with the tanh form of GELU between them, or SwiGLU: W₂ (silu(W_g x) · W_u x), without biases.

    SwiGLU's two inner matrices are one layer, `fc1`: its first half of rows is the gate W_g, its second half W_u.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        inner = config.mlp_size
        self.fc1 = nn.Linear(config.hidden_size, 2 * inner if self.gated else inner, bias=not self.gated)
        self.fc2 = nn.Linear(inner, config.hidden_size, bias=not self.gated)

    def forward(self, x: Tokens) -> Tokens:
        inner = self.fc1(x)
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            return self.fc2(functional.silu(gate) * up)
        return self.fc2(functional.gelu(inner, approximate="tanh"))


class Block(nn.Module):
    """One transformer block, told the condition by the configuration's design (see the module's table).

    The first block of a network with a value residual gives its attention values beside the tokens; the others are
    given them. Both are plain arguments and results, so that each block compiles and is checkpointed alone.
    """

    def __init__(self, config: DiTConfig, *, first: bool = False) -> None:
        super().__init__()
        self.gives_values = config.value_residual and first
        self.norm1 = _norm(config)
        self.attn = SelfAttention(config, first=first)
        self.norm2 = _norm(config)
        self.mlp = Mlp(config)
        self.crosses = config.design.crosses
        if self.crosses:
            self.norm_cross = _norm(config)
            self.cross_attn = CrossAttention(config)
        self.parts = config.design.modulation_vectors
        if self.parts:
            self.adaLN_modulation = modulation_layer(config.hidden_size, self.parts)

    def forward(
        self, x: Tokens, condition: Tensor | None, rotary: Tensor | None = None, first_values: Tensor | None = None
    ) -> Tokens | tuple[Tokens, Tensor]:
        for_attention, for_mlp = self._modulations(x, condition)
        branch, values = self.attn(modulate(self.norm1(x), for_attention), rotary, first_values)
        x = add_branch(x, for_attention, branch)
        if self.crosses:
            x = x + self.cross_attn(self.norm_cross(x), condition)
        x = add_branch(x, for_mlp, self.mlp(modulate(self.norm2(x), for_mlp)))
        return (x, values) if self.gives_values else x

    def _modulations(self, x: Tokens, condition: Tensor | None) -> tuple[Modulation, Modulation]:
        if not self.parts:
            return Modulation(), Modulation()
        parts = modulation_of(self.adaLN_modulation, condition, x).chunk(self.parts, dim=-1)
        return Modulation(*parts[: self.parts // 2]), Modulation(*parts[self.parts // 2 :])


class FinalLayer(nn.Module):
    """Tokens as patches of the output, flattened in the order (row, column, channel); the last may be a class token."""

    def __init__(self, config: DiTConfig, *, class_token: int = 0) -> None:
        """`class_token` numbers, and variances where they are learned, are made of a last token that is no patch."""
        super().__init__()
        self.norm_final = _norm(config)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.modulated = config.design.modulation_vectors > 0
        if self.modulated:
            self.adaLN_modulation = modulation_layer(config.hidden_size, 2)
        self.class_token = nn.Linear(config.hidden_size, config.output_parts * class_token) if class_token else None

    def forward(
        self, x: Tokens, condition: Tensor | None
    ) -> Float[Tensor, "batch token patch"] | tuple[Float[Tensor, "batch token patch"], Float[Tensor, "batch dim"]]:
        x = self.norm_final(x)
        if self.modulated:
            x = modulate(x, Modulation(*modulation_of(self.adaLN_modulation, condition, x).chunk(2, dim=-1)))
        if self.class_token is not None:
            return self.linear(x[:, :-1]), self.class_token(x[:, -1])
        return self.linear(x)


class WideHead(nn.Module):
    """A wide, shallow network behind the deep one, for latents of more numbers to a token than the deep one is wide.

    What predicts noise, or has to pass it by, needs a token as wide as its patch: through fewer numbers the rest is
    lost (Zheng et al. 2025, arXiv 2510.11690). Widening all blocks costs the square of it; so a few wide ones read the
    noisy latent once more, and are told at every token what the deep network found there (DDT: Wang et al. 2025, arXiv
    2504.05741): their adaLN-Zero has the condition W silu(s + t), s the deep network's token, t its timestep's vector.
    """

    pos_embed: Tensor
    rotary: Tensor | None

    def __init__(self, config: DiTConfig) -> None:
        """Blocks as the deep network's, but for their width; `config` is the whole network's and has a head."""
        super().__init__()
        own = config.head
        assert own is not None, "made only where the configuration has a head"
        self.x_embedder = PatchEmbedder(own.patch_size, own.in_channels, own.hidden_size)
        self.condition = nn.Linear(config.hidden_size, own.hidden_size)
        self.blocks = nn.ModuleList([Block(own) for _ in range(own.depth)])

    def begin(
        self, x: Float[Tensor, "batch channel height width"], found: Tokens, t: Float[Tensor, "batch hidden"]
    ) -> tuple[Tokens, Tokens]:
        """The tokens before the first block, and the condition [batch, token, width] of all blocks."""
        return self.x_embedder(x) + self.pos_embed, self.condition(functional.silu(found + t[:, None]))


def register_tables(module: nn.Module, config: DiTConfig) -> None:
    """Give a network its tables of positions: computed from the grid, and in no state dict."""
    head_size = config.hidden_size // config.num_heads
    added = config.design.added_tokens + bool(config.class_token)
    rotary = rotary_table(*config.grid, head_size, added) if config.rotary else None
    module.register_buffer("pos_embed", position_table(*config.grid, config.hidden_size), persistent=False)
    module.register_buffer("rotary", rotary, persistent=False)


class Aligner(nn.Module):
    """Tokens of the middle as patches of the clean latent, flattened as `FinalLayer`'s, by two layers and a SiLU."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.patch_size**2 * config.in_channels)

    def forward(self, x: Tokens) -> Float[Tensor, "batch token patch"]:
        return self.fc2(functional.silu(self.fc1(x)))


class Projector(nn.Module):
    """Tokens of the middle as an encoder's features, by three layers with SiLU (REPA, arXiv 2410.06940)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.projector_size)
        self.fc2 = nn.Linear(config.projector_size, config.projector_size)
        self.fc3 = nn.Linear(config.projector_size, config.align_features)

    def forward(self, x: Tokens) -> Float[Tensor, "batch token feature"]:
        return self.fc3(functional.silu(self.fc2(functional.silu(self.fc1(x)))))
