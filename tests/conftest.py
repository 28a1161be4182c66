"""What every test runs under: shapes checked, no network, two threads at most, tiny things only."""

import collections
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tyro
from jaxtyping import install_import_hook

from pipeline.runtime.processes import bound_spinning

bound_spinning()  # before torch is loaded
# Not pipeline.dit: torch.compile cannot trace functions that the checker wraps.
CHECKED = ("pipeline.diffusion", "pipeline.features", "pipeline.latents", "pipeline.vae", "pipeline.images")
install_import_hook(CHECKED, "beartype.beartype")
# tyro forgets after every command what it found out about its options' types; these stay, and so may that.
tyro._unsafe_cache.clear_cache = lambda: None

# Of few tests, and long: begun last, they would leave a worker without work.
BEGUN_FIRST = ("tests/test_long_runs", "tests/test_shared_disks", "tests/studies/", "tests/crash_points/")
BEGUN_FIRST += ("tests/examples/", "tests/fake_cuda/", "tests/docs/", "tests/train/test_processes")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files of long tests come first and then those of many, as workers take them (make test, make slow)."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    tests = collections.Counter(item.path for item in items)

    def place(item):
        first = [number for number, name in enumerate(BEGUN_FIRST) if item.nodeid.startswith(name)]
        return (*first, len(BEGUN_FIRST))[0], -tests[item.path], item.path

    items.sort(key=place)


def pytest_collection_finish():
    """What is loaded by now stays: the collector need not walk it again and again, nor copy its pages in every fork."""
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)


def pytest_sessionfinish():
    """What is garbage by now is told of, once: pytest's own looks find nothing more to walk."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def object_store():
    """One S3 server for all tests of this process."""
    from tests.object_store import ObjectStore

    server = ObjectStore()
    yield server
    server.close()


@pytest.fixture
def quick_urls(monkeypatch, tmp_path):
    """What lies behind a URL is asked for again after short waits, and copied into a cache of this test's own."""
    monkeypatch.setattr("pipeline.runtime.remote_files._FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("DIT_LATENTS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def s3(object_store, monkeypatch):
    """The server with a bucket of this test's own and no faults (`tests/object_store.py`)."""
    import fsspec

    from tests.object_store import clear_instances, use

    # An upload that is cut off may leave its sender waiting for as long as s3fs waits for an answer.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 3}})
    yield use(object_store, monkeypatch)
    clear_instances()
