"""The wide head: it changes nothing where it is off, and what it adds is told the deep network's tokens one by one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.checkpoint.release import unlike_the_release
from pipeline.dit import DiT, DiTConfig, compile_blocks, count_macs, count_parameters
from pipeline.dit.blocks import Block
from pipeline.dit.config import BLOCKS
from pipeline.dit.matrices import logical_matrices
from pipeline.dit.memory import activation_bytes
from tests.pipeline.dit.test_model import DESIGNS, gradients, inputs, lively, tiny
from train.init_from import fit_weights

HEAD = {"head_width": 64}


def test_the_deep_network_starts_as_without_it_and_all_of_the_head_that_writes_starts_at_0():
    plain, wide = DiT(tiny()).state_dict(), DiT(tiny(**HEAD)).state_dict()
    own = [name for name in wide if name.startswith(("head.", "final_layer."))]
    assert all(torch.equal(tensor, wide[name]) for name, tensor in plain.items() if name not in own)
    assert set(wide) - set(plain) == {name for name in own if name.startswith("head.")}
    assert not any(wide[name].any() for name in own if "adaLN" in name or name.startswith("final_layer.linear"))
    assert wide["final_layer.linear.weight"].shape == (32, 64)


def test_a_config_json_names_it_only_where_it_is_there():
    assert "head_width" not in tiny().to_json() and "head_depth" not in tiny().to_json()
    config = tiny(**HEAD, head_depth=3)
    assert DiTConfig.from_json(config.to_json()) == config
    assert "it has a wide head" in unlike_the_release(config)
    assert (config.head.hidden_size, config.head.depth, config.head.head) == (64, 3, None)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    "fields", [{"in_channels": 16, "input_size": (4, 12)}, {**BLOCKS["modern"], "middle_head": True, "num_classes": 0}]
)
def test_with_every_design_each_weight_takes_part(design, fields):
    model = lively(tiny(**HEAD, conditioning=design, **fields))
    x, t, y = inputs(model.config)
    made = model(x, t, y, middle=True)
    assert made.final.shape == (3, model.config.out_channels, *x.shape[2:])
    (made.final.square().mean() + (0 if made.middle is None else made.middle.square().mean())).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_condition_that_is_the_same_at_every_token_is_the_conditions_one_vector():
    block = Block(tiny())
    draws = torch.Generator().manual_seed(3)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=draws)
    x, condition = torch.randn(2, 16, 32, generator=draws), torch.randn(2, 32, generator=draws)
    torch.testing.assert_close(block(x, condition[:, None].expand(-1, 16, -1)), block(x, condition))


def test_a_token_of_the_head_is_told_what_the_deep_network_found_there_and_nothing_else():
    model = lively(tiny(**HEAD))
    with torch.no_grad():
        for block in model.head.blocks:
            block.attn.proj.weight.zero_()  # no token looks at another one behind the deep network
    x, t, y = inputs(model.config)
    moved = []

    def move_one_token(_module, _arguments, output):
        output = output.clone()
        output[:, 5] += 1
        moved.append(True)
        return output

    with torch.no_grad():
        before = model(x, t, y)
        handle = model.blocks[-1].register_forward_hook(move_one_token)
        change = (model(x, t, y) - before).abs().amax((0, 1))  # [8, 8] in patches of 2
    handle.remove()
    cells = torch.zeros(8, 8, dtype=torch.bool)
    cells[2:4, 2:4] = True  # token 5 of 4 × 4
    assert moved and change[cells].min() > 0 and change[~cells].max() == 0


# dynamo looks for .grad on every input and hides the warning when it is shown, which is too late for "error"
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_its_blocks_compile_and_are_computed_again_as_the_others(checkpointing):
    config = tiny(**HEAD, **BLOCKS["modern"])
    plain, compiled = lively(config), compile_blocks(lively(config), backend="aot_eager", fullgraph=True)
    compiled.gradient_checkpointing = checkpointing
    (output, wanted), (ours, found) = (gradients(model, inputs(config)) for model in (plain, compiled))
    torch.testing.assert_close(ours, output)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_under_autocast_it_is_within_2_percent_of_float32(relative_error):
    model = lively(tiny(**HEAD, in_channels=16))
    with torch.no_grad():
        full = model(*inputs(model.config))
        with torch.autocast("cpu", torch.bfloat16):
            half = model(*inputs(model.config))
    assert relative_error(half.float(), full) < 2e-2


def test_it_is_counted_in_parameters_operations_matrices_and_memory():
    config = DiTConfig.from_preset("DiT-Ti/2", input_size=(8, 4), in_channels=64, head_width=256, head_depth=3)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = DiT(config)
        model(torch.zeros(1, 64, 8, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert count_macs(config) == counter.get_total_flops() // 2
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    found = logical_matrices({name: tuple(weight.shape) for name, weight in model.named_parameters()})
    assert found["head.blocks.2.attn.qkv.weight"] == 3 and len(found) == 4 * (6 + 3)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    real = DiT(config)
    weights = {weight.untyped_storage().data_ptr() for weight in real.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real(torch.zeros(64, 64, 8, 4), torch.zeros(64), torch.zeros(64, dtype=torch.long)).sum()
    held = sum(size for place, size in kept.items() if place not in weights)
    assert held == pytest.approx(64 * activation_bytes(config, precision="no", checkpointing=False), rel=0.2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_width": 30}, "head_width 30 does not divide among num_heads 4; head_width 30 is no multiple of 4"),
        ({"head_width": 24, "rotary": True}, "a head of 6 channels is no multiple of 4, which rotary needs"),
        ({"head_width": -4}, "head_width is -4 but must lie in 0"),
        ({"head_width": 64, "head_depth": 0}, "head_depth is 0 but must be at least 1"),
    ],
)
def test_a_head_that_cannot_be_built_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


def test_weights_of_a_network_without_it_start_the_deep_network_and_leave_the_last_layer_new():
    source, target = lively(tiny()), DiT(tiny(**HEAD))
    fresh = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    report = fit_weights(source.state_dict(), target, source_config=source.config)
    assert report.new["final_layer.linear.weight"] == "of width 64 instead of 32"
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.equal(target.final_layer.linear.weight, fresh["final_layer.linear.weight"])
