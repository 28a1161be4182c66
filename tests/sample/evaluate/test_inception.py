"""The FID network: its names, its outputs against reference numbers, and what it computes when less is wanted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sample.evaluate.inception import FEATURE_WIDTHS, FIDInception, resize_bilinear

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
ALL = tuple(FEATURE_WIDTHS)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "inception.safetensors")


@pytest.fixture(scope="module")
def features(network, golden):
    with torch.inference_mode():
        return network(golden["images"], ALL)


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_names_and_shapes_are_those_of_the_public_weight_file():
    names = json.loads((GOLDEN / "inception.json").read_text())["keys"]
    state = FIDInception().state_dict()
    ours = {name: list(tensor.shape) for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert ours == names


def test_resize_is_tensorflow_1s(golden):
    resized = resize_bilinear(golden["images"], height=299, width=299)
    assert relative_error(resized[..., ::23, ::23], golden["resized"]) < 1e-6


def test_resize_is_anchored_at_the_top_left_and_averages_nothing():
    row = torch.tensor([[[[0.0, 10.0, 20.0, 30.0]]]])
    assert resize_bilinear(row, height=1, width=8).flatten().tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert resize_bilinear(row, height=1, width=2).flatten().tolist() == [0, 20]


@pytest.mark.parametrize("name", [name for name in ALL if name != "spatial"])
def test_features_meet_the_reference(features, golden, name):
    assert relative_error(features[name], golden[name]) < 1e-4
    assert features[name].shape == (2, FEATURE_WIDTHS[name])


def test_spatial_features_meet_the_reference_with_channels_last(features, golden):
    expected = golden["spatial"].permute(0, 2, 3, 1).flatten(1)
    assert relative_error(features["spatial"], expected) < 1e-4
    assert features["spatial"].shape == (2, 2023)


def test_the_layout_that_a_cpu_likes_meets_the_reference_too(rule_weights, golden):
    network = FIDInception()
    network.load_state_dict(rule_weights)
    network = network.eval().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        found = network(golden["images"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), ALL)
    for name in ("features_2048", "logits_unbiased"):
        assert relative_error(found[name], golden[name]) < 1e-4
    assert relative_error(found["spatial"], golden["spatial"].permute(0, 2, 3, 1).flatten(1)) < 1e-4


def test_spatial_features_alone_do_not_run_the_rest(network, features, golden):
    ran = []
    handles = [block.register_forward_hook(lambda module, *_: ran.append(module)) for block in network.children()]
    with torch.inference_mode():
        alone = network(golden["images"], ("spatial",))
    for handle in handles:
        handle.remove()
    assert torch.equal(alone["spatial"], features["spatial"])
    assert network.Mixed_6e not in ran
    assert network.Mixed_7c not in ran
