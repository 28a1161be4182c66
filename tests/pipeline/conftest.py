"""The reference numbers of the public release, and the network that made them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.dit import DiT, DiTConfig

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


@pytest.fixture(scope="session")
def golden():
    """Inputs and outputs by name; the file beside it says what each is."""
    return load_file(GOLDEN / "dit.safetensors")


@pytest.fixture(scope="session")
def golden_facts():
    """The network's configuration, and the order of the recorded gradients."""
    return json.loads((GOLDEN / "dit.json").read_text())


@pytest.fixture
def state(golden):
    """A state dict in the release's own names; a new mapping for every test."""
    return {name.removeprefix("state."): tensor for name, tensor in golden.items() if name.startswith("state.")}


@pytest.fixture
def golden_network(state, golden_facts):
    """Our network with the reference's weights, loaded under the reference's names."""
    model = DiT(DiTConfig.from_json(golden_facts["config"]), seed=None).eval()
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="session")
def relative_error():
    """(found, wanted) → L2 norm of the difference, relative to the wanted tensor's, in float64."""

    def measure(found, wanted):
        found, wanted = found.detach().double(), wanted.double()
        assert found.shape == wanted.shape
        return ((found - wanted).norm() / wanted.norm()).item()

    return measure
