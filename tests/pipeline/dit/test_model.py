import itertools

import pytest
import torch

from pipeline.dit import DiT, DiTConfig, compile_blocks

DESIGNS = ("adaln-zero", "adaln", "cross-attention", "in-context")


def tiny(**fields):
    return DiTConfig(**{"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 5, **fields})


def lively(config):
    """A network none of whose parameters is zero, so that nothing hides."""
    model = DiT(config)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.1)
    return model


def inputs(config, count=3):
    draws = torch.Generator().manual_seed(2)
    x = torch.randn(count, config.in_channels, config.height, config.width, generator=draws)
    return (
        x,
        torch.randint(1000, (count,), generator=draws),
        torch.randint(config.label_rows, (count,), generator=draws),
    )


def between_blocks():
    draws = torch.Generator().manual_seed(3)
    return torch.randn(2, 16, 32, generator=draws), torch.randn(2, 32, generator=draws)


def gradients(model, arguments):
    model.zero_grad()
    output = model(*arguments)
    output.square().mean().backward()
    return output.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_output_and_everything_on_the_way_are_the_references(golden, golden_network, relative_error):
    seen = {}
    for i, block in enumerate(golden_network.blocks):
        block.register_forward_hook(lambda _, arguments, output, i=i: seen.update({i: (*arguments[:2], output)}))
    output = golden_network(golden["forward.x"], golden["forward.t"], golden["forward.y"])
    assert relative_error(output, golden["forward.out"]) < 1e-5
    assert relative_error(output, golden["forward.out_f64"]) < 1e-5
    assert relative_error(seen[0][0], golden["forward.tokens"]) < 1e-6
    assert relative_error(seen[0][1], golden["forward.c"]) < 1e-5  # exp rounds by the CPU, see the next test
    for i in range(3):
        assert relative_error(seen[i][2], golden[f"forward.block{i}"]) < 1e-5


def test_in_float64_and_with_the_references_features_the_output_is_the_references(
    golden, golden_network, relative_error, monkeypatch
):
    """The features' frequencies are float32 on purpose, and the last place of their exp is the CPU's."""
    monkeypatch.setattr("pipeline.dit.embeddings.timestep_features", lambda t: golden["forward.t_freq"])
    output = golden_network.double()(golden["forward.x"].double(), golden["forward.t"], golden["forward.y"])
    assert output.dtype == torch.float64
    assert relative_error(output, golden["forward.out_f64"]) < 1e-7


def test_parameter_names_and_shapes_are_the_releases(golden, golden_facts, golden_network):
    shapes = {name: tuple(value.shape) for name, value in golden_network.state_dict().items()}
    release = {name[6:]: tuple(value.shape) for name, value in golden.items() if name.startswith("state.")}
    release.pop("pos_embed")
    assert shapes == release
    assert [name for name, _ in golden_network.named_parameters()] == golden_facts["grad_names"]


def test_a_checkpoint_loads_on_another_grid_and_its_position_table_is_left_out(golden, golden_facts):
    state = {name[6:]: value for name, value in golden.items() if name.startswith("state.")}
    model = DiT(DiTConfig.from_json({**golden_facts["config"], "input_size": [16, 8]}))
    model.load_state_dict(state)
    assert "pos_embed" in state
    assert "pos_embed" not in model.state_dict()
    assert model.pos_embed.shape == (1, 32, 64)
    assert model(torch.zeros(1, 4, 16, 8), torch.tensor([5]), torch.tensor([0])).shape == (1, 8, 16, 8)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    "fields",
    [
        {"in_channels": 3, "input_size": (4, 12)},
        {"in_channels": 16, "patch_size": 4, "learn_sigma": False},
        {"num_classes": 0, "patch_size": 8},
    ],
)
def test_any_channels_any_grid_any_classes(design, fields):
    config = tiny(conditioning=design, **fields)
    x, t, y = inputs(config)
    output, grads = gradients(lively(config), (x, t, y if config.num_classes else None))
    assert output.shape == (3, config.out_channels, config.height, config.width)
    assert all(grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_hears_the_timestep_and_the_class(design):
    model = lively(tiny(conditioning=design))
    x, t, y = inputs(model.config)
    output = model(x, t, y)
    assert (model(x, t + 300, y) - output).abs().amax((1, 2, 3)).min() > 1e-3
    assert (model(x, t, (y + 1) % 6) - output).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("design", DESIGNS)
def test_a_sample_does_not_depend_on_its_neighbours(design):
    model = lively(tiny(conditioning=design)).double()
    x, t, y = inputs(model.config)
    torch.testing.assert_close(model(x, t, y)[1:2], model(x[1:2], t[1:2], y[1:2]), rtol=1e-10, atol=1e-10)


def test_a_fresh_network_gives_zero_and_its_adaln_zero_blocks_are_the_identity():
    model = DiT(tiny())
    tokens, condition = between_blocks()
    assert torch.equal(model.blocks[0](tokens, condition), tokens)
    assert model(*inputs(model.config)).abs().max() == 0


def test_fresh_adaln_blocks_modulate_and_have_no_gate():
    block = DiT(tiny(conditioning="adaln")).blocks[0]
    assert block.adaLN_modulation[1].weight.shape == (4 * 32, 32)
    assert block.adaLN_modulation[1].weight.abs().max() > 0
    tokens, condition = between_blocks()
    assert not torch.equal(block(tokens, condition), block(tokens, 2 * condition))


def test_initial_weights_follow_the_release():
    weights = dict(DiT(tiny(hidden_size=128)).named_parameters())
    for name, weight in weights.items():
        if name.endswith("bias") or "adaLN" in name or "final_layer" in name:
            assert weight.abs().max() == 0, name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert abs(weight.std().item() - 0.02) < 0.003, name
        else:
            bound = (6 / sum(weight.flatten(1).shape)) ** 0.5
            assert 0.97 * bound < weight.abs().max() <= bound, name
    plain = dict(DiT(tiny(conditioning="in-context")).named_parameters())
    assert plain["blocks.0.norm1.weight"].eq(1).all()


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_generator_be():
    before = torch.random.get_rng_state()
    first, same, other = DiT(tiny(), seed=3), DiT(tiny(), seed=3), DiT(tiny(), seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(first.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.blocks[0].mlp.fc1.weight, other.blocks[0].mlp.fc1.weight)


def test_an_unconditional_network_takes_no_labels_or_null_ones():
    model = lively(tiny(num_classes=0))
    x, t, _ = inputs(model.config)
    assert torch.equal(model(x, t), model(x, t, torch.zeros(3, dtype=torch.long)))
    flowing = t.float() + 0.25  # as a flow's times come
    assert torch.equal(model(x, flowing), model(x, flowing, torch.zeros(3, dtype=torch.long)))


def test_timesteps_need_not_be_whole():
    model = lively(tiny())
    x, t, y = inputs(model.config)
    torch.testing.assert_close(model(x, t.float(), y), model(x, t, y))
    assert not torch.allclose(model(x, t + 0.5, y), model(x, t, y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 8, 10)}, r"x has shape \[3, 4, 8, 10\], but this network takes \[batch, 4, 8, 8\]"),
        ({"x": torch.zeros(3, 3, 8, 8)}, r"x has shape \[3, 3, 8, 8\], but this network takes \[batch, 4, 8, 8\]"),
        ({"x": torch.zeros(4, 8, 8)}, r"x has shape \[4, 8, 8\], but this network takes \[batch, 4, 8, 8\]"),
        ({"t": torch.zeros(1)}, r"t has shape \[1\], but a batch of 3 takes \[3\]"),
        ({"t": torch.tensor(7)}, r"t has shape \[\], but a batch of 3 takes \[3\]"),
        ({"y": torch.zeros(2, dtype=torch.long)}, r"y has shape \[2\], but a batch of 3 takes \[3\]"),
        ({"y": torch.tensor([0, 6, -1])}, r"y holds labels -1 … 6, but this network takes 0 … 5"),
        ({"y": None}, r"y is missing: this network takes one label of 0 … 5 per sample"),
    ],
)
def test_a_wrong_input_gets_one_sentence_with_what_was_given_and_what_is_wanted(change, message):
    model = DiT(tiny())
    x, t, y = inputs(model.config)
    with pytest.raises(ValueError, match=message):
        model(**{"x": x, "t": t, "y": y, **change})


@pytest.mark.parametrize("design", DESIGNS)
def test_gradient_checkpointing_changes_no_bit(design):
    model = lively(tiny(conditioning=design))
    arguments = inputs(model.config)
    output, grads = gradients(model, arguments)
    model.gradient_checkpointing = True
    again, grads_again = gradients(model, arguments)
    assert torch.equal(output, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


# dynamo looks for .grad on every input and hides the warning when it is shown, which is too late for "error"
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_result_under_the_same_names(checkpointing):
    model = lively(tiny())
    arguments, names = inputs(model.config), list(model.state_dict())
    output, grads = gradients(model, arguments)
    model.gradient_checkpointing = checkpointing
    assert compile_blocks(model, backend="aot_eager") is model
    assert list(model.state_dict()) == names
    again, grads_again = gradients(model, arguments)
    torch.testing.assert_close(again, output, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_queries_and_keys_are_normalised_on_request():
    model = lively(tiny(qk_norm=True))
    plain = lively(tiny())
    added = set(model.state_dict()) - set(plain.state_dict())
    parts = itertools.product(range(2), "qk", ("weight", "bias"))
    assert added == {f"blocks.{i}.attn.{part}_norm.{kind}" for i, part, kind in parts}
    arguments = inputs(model.config)
    assert torch.isfinite(model(*arguments)).all()


def test_from_preset_replaces_fields():
    with torch.device("meta"):
        model = DiT.from_preset("DiT-XL/2", input_size=64, num_classes=10)
    assert model.config.grid == (32, 32)
    assert model.y_embedder.embedding_table.weight.shape == (11, 1152)
    assert len(model.blocks) == 28
