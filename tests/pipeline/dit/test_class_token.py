"""A class token beside the latent: one more token, its own layers in and out, and one state that samplers know as before."""

import math
from dataclasses import replace

import pytest
import torch

from pipeline.dit import DiT, DiTConfig
from pipeline.dit.config import BLOCKS, ConfigError
from pipeline.dit.embeddings import joined, parted, state_noise
from pipeline.dit.macs import count_macs, count_parameters
from pipeline.randomness import normal
from tests.pipeline.dit.test_model import DESIGNS, lively, tiny

DIM = 70  # of 8 × 8 cells: two channels, the second of them mostly empty


def states(config, count=3):
    draws = torch.Generator().manual_seed(2)
    latent = torch.randn(count, config.in_channels, config.height, config.width, generator=draws)
    token = torch.randn(count, config.class_token, generator=draws)
    t = torch.randint(1000, (count,), generator=draws)
    return latent, token, t, torch.randint(config.label_rows, (count,), generator=draws)


@pytest.mark.parametrize("parts", [1, 2])
def test_latent_and_token_come_back_from_their_state_whose_rest_is_0(parts):
    latent, token = torch.randn(3, parts * 4, 8, 8), torch.randn(3, parts * DIM)
    state = joined(latent, token, parts)
    assert state.shape == (3, parts * 6, 8, 8)
    back = parted(state, 4, DIM)
    assert torch.equal(back[0], latent) and torch.equal(back[1], token)
    assert torch.equal(state[:, :4], latent[:, :4]), "the latent's prediction comes first"
    assert not state.unflatten(1, (parts, 6))[:, :, 4:].flatten(2)[:, :, DIM:].any()


def test_the_rest_of_the_network_starts_as_without_and_the_token_is_predicted_as_0():
    plain, ours = DiT(tiny()), DiT(tiny(class_token=DIM))
    own = [name for name in ours.state_dict() if name not in plain.state_dict()]
    assert own == [
        "final_layer.class_token.weight",
        "final_layer.class_token.bias",
        "class_embedder.weight",
        "class_embedder.bias",
    ]
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in plain.state_dict().items())
    latent, token, t, y = states(ours.config)
    assert not ours(joined(latent, token), t, y).any()


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(
    "fields", [*({"conditioning": name} for name in DESIGNS), {**BLOCKS["modern"]}, {"num_classes": 0}]
)
def test_it_is_one_more_token_of_every_block_and_goes_in_and_out_by_layers_of_its_own(fields, learn_sigma):
    """The whole pass once more, block by block."""
    model = lively(tiny(class_token=DIM, learn_sigma=learn_sigma, **fields))
    config = model.config
    latent, token, t, y = states(config)
    with torch.no_grad():
        made, said = parted(model(joined(latent, token), t, y if config.num_classes else None), 4, DIM)

        y = y if config.num_classes else torch.full_like(t, config.null_class)
        time, label = model.t_embedder(t), model.y_embedder(y)
        tokens = [model.x_embedder(latent) + model.pos_embed, model.class_embedder(token)[:, None]]
        condition = time + label
        if config.design.added_tokens:
            tokens += [time[:, None], label[:, None]]
            condition = None
        elif config.design.crosses:
            condition = torch.stack([time, label], 1)
        x, values = torch.cat(tokens, 1), None
        for block in model.blocks:
            x = block(x, condition, model.rotary, values)
            x, values = x if block.gives_values else (x, values)
        final = model.final_layer
        x = final.norm_final(x[:, :17])
        if config.design.modulation_vectors:
            shift, scale = final.adaLN_modulation(condition)[:, None].chunk(2, -1)
            x = x * (1 + scale) + shift
        torch.testing.assert_close(said, final.class_token(x[:, 16]))
        torch.testing.assert_close(made, model._unpatchify(final.linear(x[:, :16]), config.out_channels))


def test_through_a_layer_in_of_zeros_the_latent_hears_nothing_of_it_and_else_it_does():
    model = lively(tiny(class_token=DIM))
    latent, token, t, y = states(model.config)
    with torch.no_grad():
        heard = [parted(model(joined(latent, each), t, y), 4, DIM)[0] for each in (token, token + 1)]
        model.class_embedder.weight.zero_()
        deaf = [model(joined(latent, each), t, y) for each in (token, token + 1)]
    assert not torch.allclose(*heard) and torch.equal(*deaf)


def test_the_middle_says_of_the_token_what_the_output_does():
    model = lively(tiny(depth=3, class_token=DIM, middle_head=True))
    latent, token, t, y = states(model.config)
    with torch.no_grad():
        final, middle = (parted(each, 4, DIM) for each in model.forward_with_middle(joined(latent, token), t, y))
    assert torch.equal(final[1], middle[1]) and not torch.allclose(final[0], middle[0])


def test_noise_of_a_latent_is_as_without_a_token_whose_own_depends_on_every_part_of_the_key():
    config = tiny(class_token=DIM)
    latent, token = parted(state_noise(config, 3, "purpose", 5)[None], 4, DIM)
    assert torch.equal(latent[0], normal((4, 8, 8), 3, "purpose", 5))
    assert torch.equal(latent[0], state_noise(replace(config, class_token=0), 3, "purpose", 5))
    others = [(4, "purpose", 5), (3, "other", 5), (3, "purpose", 6), (3, "purpose", 5, 0)]
    assert all(not torch.equal(parted(state_noise(config, *key)[None], 4, DIM)[1], token) for key in others)
    assert abs(float(token.std()) - 1) < 0.3


def test_it_is_counted_and_named_only_where_it_is():
    plain = DiTConfig.from_preset("DiT-XL/2")
    config = replace(plain, class_token=768)
    assert count_parameters(config) - count_parameters(plain) == 768 * 1152 + 1152 + 2 * 768 * (1152 + 1)
    per_token = 28 * (12 * 1152**2 + 2 * 1152 * 257)  # linear layers, and attention to all tokens
    others = 28 * 256 * 2 * 1152  # attention of the other tokens to it
    assert count_macs(config) - count_macs(plain) == per_token + others + 768 * 1152 + 1152 * 2 * 768
    assert "class_token" not in plain.to_json() and DiTConfig.from_json(config.to_json()) == config
    assert config.state_shape == (5, 32, 32) and plain.state_shape == (4, 32, 32)
    assert math.prod(replace(config, input_size=16, in_channels=768).state_shape) == (768 + 3) * 256


def test_it_does_not_go_with_a_wide_head_and_has_a_width():
    with pytest.raises(ConfigError, match="class_token does not go with head_width"):
        tiny(class_token=8, head_width=64)
    with pytest.raises(ConfigError, match="class_token is -1 but must lie in"):
        tiny(class_token=-1)


def test_a_latent_alone_is_refused_by_its_shape():
    model = DiT(tiny(class_token=DIM))
    latent, _, t, y = states(model.config)
    with pytest.raises(ValueError, match=r"takes \[batch, 6, 8, 8\]"):
        model(latent, t, y)
