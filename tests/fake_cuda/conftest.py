import pytest

from tests.fake_cuda.runs import build_guard


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    return build_guard(tmp_path_factory.mktemp("guard") / "libguard.so")
