"""A small store that the demo VAE decodes, and a run on it with two checkpoints, previews and snapshots of averages."""

import pytest

from pipeline.vae import load_vae
from tests.train.runs import make_store, train
from view.given import find_given
from view.options import ViewOptions


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """50 samples of 4 classes, both views, two shards."""
    return make_store(tmp_path_factory.mktemp("view") / "latents", vae=load_vae("demo").describe())


@pytest.fixture(scope="session")
def run(store, tmp_path_factory):
    """Four steps, saved and drawn after two and after four."""
    folder = tmp_path_factory.mktemp("view") / "run"
    every = ["--save-every", "2", "--sample-every", "2", "--ema-snapshot-every", "2", "--ema-sigma", "0.05,0.10"]
    assert train(store, folder, *every, "--preview-steps", "2", "--preview-rows", "1", steps=4, depth=None) == 0
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="session")
def flow_run(tmp_path_factory):
    """One step of a flow without classes, with a middle head."""
    work = tmp_path_factory.mktemp("view")
    latents = make_store(work / "unlabelled", classes=0, vae=load_vae("demo").describe())
    assert train(latents, work / "flow", "--objective", "flow", "--middle-head", steps=1) == 0
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return work / "flow"


@pytest.fixture(scope="session")
def options(run, store):
    """The command line that names both."""
    return ViewOptions(checkpoint=(str(run),), latents=(str(store),), device="cpu")


@pytest.fixture(scope="session")
def given(options):
    """What it may show."""
    return find_given(options)
