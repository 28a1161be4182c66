"""What `--blocks modern` adds, each by the identity that it must keep."""

import pytest
import torch

from pipeline.dit import DiT, DiTConfig, compile_blocks, count_macs, count_parameters
from pipeline.dit.blocks import RMSNorm
from pipeline.dit.config import BLOCKS, PRESETS
from pipeline.dit.embeddings import rotary_table, rotate
from tests.pipeline.dit.test_model import DESIGNS, gradients, inputs, lively, tiny

MODERN = BLOCKS["modern"]


@pytest.fixture
def draws():
    return torch.Generator().manual_seed(4)


def test_the_releases_config_json_names_no_new_field():
    assert list(tiny().to_json())[-2:] == ["conditioning", "qk_norm"]
    config = tiny(**MODERN)
    assert {name: config.to_json()[name] for name in MODERN} == MODERN
    assert DiTConfig.from_json(config.to_json()) == config


def test_a_networks_names_and_start_are_the_releases_unless_something_is_switched_on():
    plain = DiT(tiny()).state_dict()
    for switch in ({"rotary": True}, {"norm": "rms"}):  # these have no weights of their own beside a modulation
        other = DiT(tiny(**switch)).state_dict()
        assert {name: tensor.tolist() for name, tensor in plain.items()} == {
            name: tensor.tolist() for name, tensor in other.items()
        }


@pytest.mark.parametrize("model", PRESETS)
def test_modern_blocks_have_as_many_parameters_within_1_percent_and_operations_within_1(model):
    plain, modern = (DiTConfig.from_preset(model, **BLOCKS[blocks]) for blocks in ("release", "modern"))
    assert count_parameters(modern) == pytest.approx(count_parameters(plain), rel=0.01)
    assert count_macs(modern) == pytest.approx(count_macs(plain), rel=0.01)


@pytest.mark.parametrize("width", [384, 768, 1152])
def test_swiglu_where_two_thirds_are_whole_has_exactly_gelus_weights(width):
    gelu, swiglu = (
        DiT(tiny(hidden_size=width, depth=1, mlp=mlp), seed=None).blocks[0].mlp for mlp in ("gelu", "swiglu")
    )
    weights = [sum(p.numel() for p in mlp.parameters() if p.ndim == 2) for mlp in (gelu, swiglu)]
    assert weights[0] == weights[1] == 8 * width**2
    assert all(parameter.ndim == 2 for parameter in swiglu.parameters())


def test_swiglu_is_the_gates_silu_times_the_rest(draws):
    mlp = lively(tiny(mlp="swiglu")).blocks[0].mlp
    x = torch.randn(2, 3, 32, generator=draws)
    gate, up = mlp.fc1.weight.chunk(2)
    wanted = (torch.sigmoid(x @ gate.T) * (x @ gate.T) * (x @ up.T)) @ mlp.fc2.weight.T
    torch.testing.assert_close(mlp(x), wanted)


def test_rms_norm_is_its_formula_and_rounds_once(draws):
    x = torch.randn(2, 5, 16, generator=draws) * 30
    norm = RMSNorm(16, eps=1e-6)
    torch.nn.init.uniform_(norm.weight, generator=draws)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), wanted)
    half = x.bfloat16()
    assert torch.equal(norm(half), norm(half.float()).bfloat16())


def test_rotary_scores_depend_on_differences_of_row_and_column_alone_and_norms_stay(draws):
    rows, columns, size = 5, 7, 12
    table = rotary_table(rows, columns, size)
    q, k = torch.randn(2, 1, 1, 1, size, generator=draws).expand(-1, 1, 1, rows * columns, size)
    turned_q, turned_k = rotate(q, table), rotate(k, table)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = (turned_q @ turned_k.mT).view(rows, columns, rows, columns)
    torch.testing.assert_close(scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2])
    assert (scores[0, 0, 1, 0] - scores[0, 0, 0, 1]).abs() > 1e-3, "a row is not a column"


def test_half_of_a_heads_channels_turn_with_the_row_and_half_with_the_column():
    cos, sin = rotary_table(3, 3, 8)
    first_column, first_row = [0, 3, 6], [0, 1, 2]
    assert torch.equal(sin[first_row, :2], torch.zeros(3, 2)) and torch.equal(sin[first_column, 2:], torch.zeros(3, 2))
    torch.testing.assert_close(
        sin[first_row, 2:], torch.tensor([0.0, 1, 2])[:, None].mul(torch.tensor([1.0, 0.01])).sin()
    )
    torch.testing.assert_close(sin[first_column, :2], sin[first_row, 2:])
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(9, 4))


def test_rotary_weights_load_on_another_grid_as_they_are():
    model = lively(tiny(input_size=8, **MODERN))
    other = DiT(tiny(input_size=(12, 4), **MODERN))
    other.load_state_dict(model.state_dict())
    assert "rotary" not in model.state_dict()
    assert other.rotary.shape == (2, 12, 4)
    with torch.no_grad():
        assert other(*inputs(other.config)).isfinite().all()


def test_a_value_residual_of_share_zero_is_none_and_of_share_one_is_the_first_blocks(draws):
    plain = lively(tiny(depth=3))
    mixed = DiT(tiny(depth=3, value_residual=True))
    mixed.load_state_dict(plain.state_dict(), strict=False)
    arguments = inputs(plain.config)
    shares = [parameter for name, parameter in mixed.named_parameters() if name.endswith("value_lambda")]
    assert [float(share.detach()) for share in shares] == [0.5, 0.5]
    with torch.no_grad():
        assert not torch.equal(mixed(*arguments), plain(*arguments))
        for share in shares:
            share.zero_()
        assert torch.equal(mixed(*arguments), plain(*arguments))
        for share in shares:
            share.fill_(1)
        for block in mixed.blocks[1:]:  # their own values count for nothing
            block.attn.qkv.weight[64:] += torch.randn(32, 32, generator=draws)
        same = mixed(*arguments)
        for block in mixed.blocks[1:]:
            block.attn.qkv.weight[64:] = 0
        torch.testing.assert_close(mixed(*arguments), same)


@pytest.mark.parametrize("design", DESIGNS)
def test_modern_blocks_work_in_every_design_and_checkpointing_changes_no_bit(design):
    config = tiny(conditioning=design, depth=3, **MODERN)
    arguments = inputs(config)
    model = lively(config)
    output, plain = gradients(model, arguments)
    model.gradient_checkpointing = True
    again, recomputed = gradients(model, arguments)
    assert torch.equal(output, again)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert all(gradient.abs().max() > 0 for name, gradient in plain.items() if not name.endswith("k_norm.bias"))


def test_without_rotary_or_table_added_tokens_are_not_turned():
    assert torch.equal(rotary_table(2, 2, 8, 2)[0, 4:], torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_modern_blocks_are_within_2_percent_of_float32(dtype, relative_error):
    model = lively(tiny(depth=2, **MODERN))
    arguments = inputs(model.config)
    with torch.no_grad():
        full = model(*arguments)
        with torch.autocast("cpu", dtype):
            half = model(*arguments)
    assert relative_error(half.float(), full) < 2e-2


# The tracer itself looks at gradients of intermediate tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_modern_blocks_compile_one_by_one(checkpointing):
    config = tiny(depth=3, **MODERN)
    plain, compiled = lively(config), compile_blocks(lively(config), backend="aot_eager", fullgraph=True)
    plain.gradient_checkpointing = compiled.gradient_checkpointing = checkpointing
    (output, wanted), (ours, found) = (gradients(model, inputs(config)) for model in (plain, compiled))
    torch.testing.assert_close(ours, output)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_heads_that_rotary_positions_cannot_halve_twice_are_refused():
    with pytest.raises(ValueError, match="a head of 6 channels is no multiple of 4, which rotary needs"):
        tiny(hidden_size=24, num_heads=4, rotary=True)
