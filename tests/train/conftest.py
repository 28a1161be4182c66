"""One store for all tests of training, and a fresh start for each."""

import pytest

from tests.train.runs import make_store, poison


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """50 samples of 4 classes, both views, two shards; 50 is no multiple of the batch of 8."""
    return make_store(tmp_path_factory.mktemp("store") / "latents")


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory):
    """A store with one sample that makes its batch's loss NaN, and a single shard for all processes."""
    folder = make_store(tmp_path_factory.mktemp("poisoned") / "latents", shards=1)
    poison(folder, [3])
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate remembers the first precision of a process; every run in here starts anew."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
