"""Half precision at the width of DiT-XL: two blocks, four tokens, weights of which none is zero."""

import copy

import pytest
import torch

from pipeline.dit import DiT, DiTConfig


@pytest.fixture(scope="module", params=["adaln-zero", "adaln", "cross-attention", "in-context"])
def network(request):
    model = DiT(DiTConfig(input_size=4, depth=2, num_classes=10, conditioning=request.param))
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.03)
    return model


@pytest.fixture(scope="module")
def inputs():
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([999, 3]), torch.tensor([1, 10])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_output_is_within_2_percent_of_float32(network, inputs, dtype, relative_error):
    with torch.no_grad():
        wanted = network(*inputs)
        with torch.autocast("cpu", dtype=dtype):
            found = network(*inputs)
    assert relative_error(found.float(), wanted) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_weights_in_half_precision_the_output_is_within_2_percent_of_float32(
    network, inputs, dtype, relative_error
):
    with torch.no_grad():
        wanted = network(*inputs)
        found = copy.deepcopy(network).to(dtype)(*inputs)
    assert found.dtype == dtype
    assert relative_error(found.float(), wanted) < 0.02


def test_under_autocast_the_tokens_between_blocks_stay_float32(network, inputs):
    seen = []
    handles = [block.register_forward_hook(lambda *call: seen.append(call[2].dtype)) for block in network.blocks]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        network(*inputs)
    for handle in handles:
        handle.remove()
    assert seen == [torch.float32, torch.float32]
