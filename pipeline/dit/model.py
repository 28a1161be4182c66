"""The Diffusion Transformer (Peebles & Xie 2023, arXiv 2212.09748), under the public release's parameter names."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline import randomness
from pipeline.dit.blocks import Block, FinalLayer, introduce
from pipeline.dit.config import DiTConfig
from pipeline.dit.embeddings import LabelEmbedder, PatchEmbedder, TimestepEmbedder, position_table

# Drawn from a normal of this spread in the release; every other weight matrix is Xavier uniform.
_NORMAL_WEIGHTS = {
    "y_embedder.embedding_table.weight": 0.02,
    "t_embedder.mlp.0.weight": 0.02,
    "t_embedder.mlp.2.weight": 0.02,
}


class DiT(nn.Module):
    """A latent, its timestep and its class in, the prediction (and the variance channels) out.

    `gradient_checkpointing = True` keeps only each block's input and computes the block again on the way back.
    Labels are not dropped in here: training passes `config.null_class` in place of a label.
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig, *, seed: int | None = 0) -> None:
        """Weights at their start for training, a function of the seed alone; None leaves them unset, for loading."""
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        device = torch.get_default_device()
        with torch.device("meta"):  # PyTorch's own start would cost time and draws from its global generator
            self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, config.hidden_size)
            self.t_embedder = TimestepEmbedder(config.hidden_size)
            self.y_embedder = LabelEmbedder(config.label_rows, config.hidden_size)
            self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
            self.final_layer = FinalLayer(config)
        self.to_empty(device=device)
        self.register_buffer("pos_embed", position_table(*config.grid, config.hidden_size), persistent=False)
        if seed is not None and device.type != "meta":
            initialize(self, seed)

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
    ) -> Float[Tensor, "batch out height width"]:
        """The network's output on noisy latents: C predicted channels, then C variance channels if it learns them.

        Args:
            x: noisy, normalised latents.
            t: one timestep per sample in the original process's units, 0 (data) to 1000 (noise), whole or not.
            y: one label per sample, `config.null_class` for none; None only where the network has no classes.

        Raises:
            ValueError: a shape or a label that this network does not take.
        """
        y = self._checked(x, t, y)
        tokens = self.x_embedder(x) + self.pos_embed
        tokens, condition = introduce(self.config.design, tokens, self.t_embedder(t), self.y_embedder(y))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, condition)
        tokens = tokens[:, : self.config.tokens]
        return self._unpatchify(self.final_layer(tokens, condition))

    def _unpatchify(self, patches: Float[Tensor, "batch token patch"]) -> Tensor:
        rows, columns = self.config.grid
        side, channels = self.config.patch_size, self.config.out_channels
        grid = patches.view(-1, rows, columns, side, side, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * side, columns * side)

    def _checked(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The labels, null where there are none, once all shapes are found right."""
        config = self.config
        wanted = (config.in_channels, config.height, config.width)
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


def on_meta(config: DiTConfig) -> DiT:
    """The network with its shapes but without memory for its weights."""
    with torch.device("meta"):
        return DiT(config, seed=None)


def initialize(model: DiT, seed: int) -> None:
    """Set every weight as the release does, as a function of the seed alone.

    Weight matrices are Xavier uniform (the patch embedding as a matrix too), biases 0, norms the identity; the
    tables and the timestep MLP normal with deviation 0.02; the final layer 0. With adaln-zero the modulation
    layers are 0, so every block begins as the identity.
    """
    draws = randomness.generator(seed, "network weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _starts_at_zero(name, model.config):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name in _NORMAL_WEIGHTS:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * _NORMAL_WEIGHTS[name])
            else:
                rows, columns = parameter.flatten(1).shape
                bound = math.sqrt(6 / (rows + columns))
                parameter.copy_((torch.rand(parameter.shape, generator=draws) * 2 - 1) * bound)


def _starts_at_zero(name: str, config: DiTConfig) -> bool:
    is_modulation = "adaLN_modulation" in name and config.design.zero_start
    return is_modulation or name.startswith("final_layer.linear") or name.endswith("bias")


def compile_blocks(model: DiT, **options: Any) -> DiT:
    """The same network with every block compiled in place (options are `torch.compile`'s), state-dict names unchanged.

    Blocks share their code, so one compilation serves all of them and start-up takes seconds, not minutes.
    """
    for block in model.blocks:
        block.compile(**options)
    return model
