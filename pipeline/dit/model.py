"""The Diffusion Transformer (Peebles & Xie 2023, arXiv 2212.09748), under the public release's parameter names."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline import randomness
from pipeline.dit.blocks import Aligner, Block, FinalLayer, Projector, WideHead, introduce, register_tables
from pipeline.dit.config import ConfigError, DiTConfig
from pipeline.dit.embeddings import LabelEmbedder, PatchEmbedder, TimestepEmbedder, joined, parted
from pipeline.runtime.devices import machine_bytes

_MOST_BYTES: Final = 10**16
"""Of a network that is only counted, or lies elsewhere than in this machine's memory."""
# Drawn from a normal of this spread in the release; every other weight matrix is Xavier uniform.
_NORMAL_WEIGHTS = {
    "y_embedder.embedding_table.weight": 0.02,
    "t_embedder.mlp.0.weight": 0.02,
    "t_embedder.mlp.2.weight": 0.02,
}


class Outputs(NamedTuple):
    """What one forward pass gives where its middle is looked at; each [batch, …, height, width]."""

    final: Tensor
    """The network's output; with a class token that of the whole state."""
    middle: Tensor | None = None
    """The same from the middle head (internal guidance, Zhou et al. 2025, arXiv 2512.24176)."""
    aligned: Tensor | None = None
    """The clean latent from the middle's tokens (SRA 2, arXiv 2601.17830)."""
    features: Tensor | None = None
    """An encoder's features from the middle's tokens, [batch, token, feature] (REPA, arXiv 2410.06940)."""


class DiT(nn.Module):
    """A latent, its timestep and its class in, the prediction (and the variance channels) out.

    `gradient_checkpointing = True` keeps only each block's input and computes the block again on the way back.
    Labels are not dropped in here: training passes `config.null_class` in place of a label.
    """

    pos_embed: Tensor
    rotary: Tensor | None

    def __init__(self, config: DiTConfig, *, seed: int | None = 0) -> None:
        """Weights at their start for training, a function of the seed alone; None leaves them unset, for loading.

        Raises:
            ConfigError: this machine's memory does not hold them.
        """
        super().__init__()
        device = torch.get_default_device()
        _check_memory(config, machine_bytes(), is_here=device.type == "cpu")
        self.config = config
        self.gradient_checkpointing = False
        with torch.device("meta"):  # PyTorch's own start would cost time and draws from its global generator
            self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, config.hidden_size)
            self.t_embedder = TimestepEmbedder(config.hidden_size)
            self.y_embedder = LabelEmbedder(config.label_rows, config.hidden_size)
            self.blocks = nn.ModuleList([Block(config, first=number == 0) for number in range(config.depth)])
            self.final_layer = FinalLayer(config.head or config, class_token=config.class_token)
            # last, so that the others' starting weights are drawn as without them
            self.middle_layer = FinalLayer(config) if config.middle_head else None
            self.aligner = Aligner(config) if config.align_latent else None
            self.projector = Projector(config) if config.align_features else None
            self.head = WideHead(config) if config.head else None
            self.class_embedder = nn.Linear(config.class_token, config.hidden_size) if config.class_token else None
        self.to_empty(device=device)
        self.register_tables()
        if seed is not None and device.type != "meta":
            initialize(self, seed)

    def register_tables(self) -> None:
        """Compute the tables of positions, here and in a wide head."""
        register_tables(self, self.config)
        if self.head is not None and self.config.head is not None:
            register_tables(self.head, self.config.head)

    @property
    def all_blocks(self) -> list[nn.Module]:
        """The blocks, and then those of a wide head."""
        return [*self.blocks, *(self.head.blocks if self.head is not None else ())]

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DiT":
        """The network of that name, for example "DiT-XL/2", with some of the configuration's fields replaced.

        Raises:
            ConfigError: there is no such preset or field, or the fields do not fit together.
        """
        return cls(DiTConfig.from_preset(name, **overrides))

    def forward(
        self,
        x: Float[Tensor, "batch channel height width"],
        t: Tensor,
        y: Int[Tensor, " batch"] | None = None,
        *,
        middle: bool = False,
    ) -> Float[Tensor, "batch out height width"] | Outputs:
        """The network's output on noisy latents: C predicted channels, then C variance channels if it learns them.

        Args:
            x: noisy, normalised latents; with a class token the state of both, as the output is (`class_token`).
            t: one timestep per sample in the original process's units, 0 (data) to 1000 (noise), whole or not.
            y: one label per sample, `config.null_class` for none; None only where the network has no classes.
            middle: give what the middle says, too, as `Outputs`; else its layers cost nothing.

        Raises:
            ValueError: a shape or a label that this network does not take.
        """
        y = self._checked(x, t, y)
        image_tokens, own_tokens = self.config.tokens, self.config.tokens + bool(self.config.class_token)
        latent, class_token = self._parted(x) if self.class_embedder is not None else (x, None)
        tokens, time = self.x_embedder(latent) + self.pos_embed, self.t_embedder(t)
        if self.class_embedder is not None:
            tokens = torch.cat([tokens, self.class_embedder(class_token)[:, None]], dim=1)
        tokens, condition = introduce(self.config.design, tokens, time, self.y_embedder(y))
        values, seen = None, None
        for number, block in enumerate(self.blocks, 1):
            made = self._run(block, tokens, condition, self.rotary, values)
            tokens, values = made if block.gives_values else (made, values)
            if number == self.config.middle_block:
                seen = tokens[:, :image_tokens]
        tokens, last = tokens[:, :own_tokens], condition
        if self.head is not None:
            tokens, last = self.head.begin(x, tokens, time)
            for block in self.head.blocks:
                tokens = self._run(block, tokens, last, self.head.rotary)
        made = self.final_layer(tokens, last)
        patches, class_token = made if self.class_embedder is not None else (made, None)
        final = self._unpatchify(patches, self.config.out_channels)
        if class_token is not None:
            final = joined(final, class_token, self.config.output_parts)
        return self._with_middle(final, seen, condition) if middle else final

    def forward_with_middle(
        self, x: Tensor, t: Tensor, y: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch out height width"], Float[Tensor, "batch out height width"]]:
        """(the output, the middle head's) from one forward pass; the arguments are `forward`'s.

        Of a class token the middle says what the output does, so that guidance leaves it alone.

        Raises:
            ValueError: the network has no middle head.
        """
        if self.middle_layer is None:
            raise ValueError("this network has no middle head")
        made = self(x, t, y, middle=True)
        if not self.config.class_token:
            return made.final, made.middle
        return made.final, joined(made.middle, self._parted(made.final)[1], self.config.output_parts)

    def _with_middle(self, final: Tensor, tokens: Tensor | None, condition: Tensor | None) -> Outputs:
        said = aligned = features = None
        if self.middle_layer is not None:
            said = self._unpatchify(self.middle_layer(tokens, condition), self.config.out_channels)
        if self.aligner is not None:
            aligned = self._unpatchify(self.aligner(tokens), self.config.in_channels)
        if self.projector is not None:
            features = self.projector(tokens)
        return Outputs(final, said, aligned, features)

    def _parted(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return parted(state, self.config.in_channels, self.config.class_token)

    def _run(self, block: nn.Module, *arguments: Tensor | None) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(*arguments)

    def _unpatchify(self, patches: Float[Tensor, "batch token patch"], channels: int) -> Tensor:
        rows, columns = self.config.grid
        side = self.config.patch_size
        grid = patches.view(-1, rows, columns, side, side, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * side, columns * side)

    def _checked(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The labels, null where there are none, once all shapes are found right."""
        config = self.config
        wanted = config.state_shape
        if x.ndim != 4 or x.shape[1:] != wanted:
            raise ValueError(f"x has shape {list(x.shape)}, but this network takes [batch, {str(wanted)[1:-1]}]")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has shape {list(t.shape)}, but a batch of {len(x)} takes [{len(x)}]")
        if y is None:
            if config.num_classes:
                raise ValueError(
                    f"y is missing: this network takes one label of 0 … {config.label_rows - 1} per sample"
                )
            return torch.full_like(t, config.null_class, dtype=torch.long)
        if y.shape != x.shape[:1]:
            raise ValueError(f"y has shape {list(y.shape)}, but a batch of {len(x)} takes [{len(x)}]")
        if y.device.type == "cpu" and not torch.compiler.is_compiling() and len(y):  # elsewhere it would synchronise
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= config.label_rows:
                raise ValueError(f"y holds labels {low} … {high}, but this network takes 0 … {config.label_rows - 1}")
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Accept the release's `pos_embed`, of any grid: ours is computed for this network's own."""
        state_dict.pop(f"{prefix}pos_embed", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _check_memory(config: DiTConfig, there: int, *, is_here: bool) -> None:
    """Raise ConfigError for a network that is larger than memory, before a module is made for it.

    Args:
        there: bytes of this machine's memory.
        is_here: whether weights are to lie in it; the table of positions does in any case.
    """
    count, positions = config.least_parameters, math.prod(config.grid) * config.hidden_size
    held = 4 * (positions + (count if is_here else 0))
    if held > there or 4 * count > _MOST_BYTES:
        raise ConfigError(
            f"a network of at least {count:.3g} parameters (depth {config.depth:,}, hidden_size "
            f"{config.hidden_size:,}, {math.prod(config.grid):,} tokens) takes {4e-9 * (positions + count):,.1f} GB, "
            f"but this machine has {there / 1e9:,.1f} GB of memory; take a smaller one"
        )


def on_meta(config: DiTConfig) -> DiT:
    """The network with its shapes but without memory for its weights."""
    with torch.device("meta"):
        return DiT(config, seed=None)


def initialize(model: DiT, seed: int) -> None:
    """Set every weight as the release does, as a function of the seed alone.

    Weight matrices are Xavier uniform (the patch embedding as a matrix too), biases 0, norms the identity; the
    tables and the timestep MLP normal with deviation 0.02; the final layers 0. With adaln-zero the modulation
    layers are 0, so every block begins as the identity. The shares of a value residual are 0.5.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), starting_weights(shapes, model.config, seed), strict=True):
            parameter.copy_(weight)


def starting_weights(shapes: Mapping[str, tuple[int, ...]], config: DiTConfig, seed: int) -> Iterator[Tensor]:
    """What `initialize` sets the parameters of these names and shapes to, one after the other."""
    draws = randomness.generator(seed, "network weights")
    for name, shape in shapes.items():
        if _starts_at_zero(name, config):
            yield torch.zeros(shape)
        elif name.endswith("value_lambda"):
            yield torch.full(shape, 0.5)
        elif len(shape) == 1:
            yield torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
        elif name in _NORMAL_WEIGHTS:
            yield torch.randn(shape, generator=draws) * _NORMAL_WEIGHTS[name]
        else:
            bound = math.sqrt(6 / (shape[0] + math.prod(shape[1:])))
            yield (torch.rand(shape, generator=draws) * 2 - 1) * bound


def _starts_at_zero(name: str, config: DiTConfig) -> bool:
    design = config.design
    if config.head is not None and name.startswith(("head.", "final_layer.")):
        design = config.head.design
    is_modulation = "adaLN_modulation" in name and design.zero_start
    is_output = name.startswith(("final_layer.linear", "final_layer.class_token", "middle_layer.linear"))
    return is_modulation or is_output or name.endswith("bias")


def compile_blocks(model: DiT, **options: Any) -> DiT:
    """The same network with every block compiled in place (options are `torch.compile`'s), state-dict names unchanged.

    Blocks share their code, so one compilation serves all of them and start-up takes seconds, not minutes.
    """
    for block in model.all_blocks:
        block.compile(**options)
    return model
