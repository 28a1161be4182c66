"""One store for all tests of training, and a fresh start for each."""

import pytest

from tests.train.runs import make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """50 samples of 4 classes, both views, two shards; 50 is no multiple of the batch of 8."""
    return make_store(tmp_path_factory.mktemp("store") / "latents")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate remembers the first precision of a process; every run in here starts anew."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
