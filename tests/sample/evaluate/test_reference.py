"""Files of statistics: ours are equal byte for byte, ADM's are taken as they stand, others are refused."""

import numpy as np
import pytest

from pipeline.runtime.errors import UserError
from sample.evaluate.metrics import Gaussian
from sample.evaluate.reference import StatisticsFile, write_statistics


@pytest.fixture(scope="module")
def gaussians():
    def make(width):
        return Gaussian(mean=np.linspace(0, 1, width), covariance=np.diag(np.linspace(1, 2, width)))

    return {"features_2048": make(2048), "spatial": make(2023)}


def write(path, gaussians, **changes):
    settings = {"count": 5000, "features": None, "provenance": {"inception": {"sha256": "ab"}}, **changes}
    write_statistics(path, gaussians, **settings)
    return path


def test_what_is_written_is_read_again_and_plain_numpy_reads_it_too(tmp_path, gaussians):
    features = np.arange(3 * 2048, dtype=np.float32).reshape(3, 2048)
    path = write(tmp_path / "ref.npz", gaussians, features=features)
    statistics = StatisticsFile(path)
    assert statistics.count == 5000
    assert statistics.provenance["inception"] == {"sha256": "ab"}
    for feature, expected in gaussians.items():
        assert statistics.has_gaussian(feature)
        np.testing.assert_array_equal(statistics.gaussian(feature).mean, expected.mean)
        np.testing.assert_array_equal(statistics.gaussian(feature).covariance, expected.covariance)
    np.testing.assert_array_equal(statistics.features(), features)
    with np.load(path, allow_pickle=False) as archive:
        assert archive["mu"].dtype == archive["sigma_s"].dtype == np.float64
        assert archive["count"].shape == ()


def test_equal_numbers_give_equal_bytes(tmp_path, gaussians):
    assert write(tmp_path / "a.npz", gaussians).read_bytes() == write(tmp_path / "b.npz", gaussians).read_bytes()


def test_a_file_in_adms_form_is_taken_as_it_stands(tmp_path):
    mean, covariance = np.ones(2048, dtype=np.float32), np.eye(2048, dtype=np.float32)
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance)
    statistics = StatisticsFile(tmp_path / "adm.npz")
    assert statistics.count is None
    assert not statistics.has_gaussian("spatial")
    assert not statistics.has_features
    assert statistics.gaussian("features_2048").covariance.dtype == np.float64


def test_statistics_of_another_network_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(768), sigma=np.eye(768))
    with pytest.raises(UserError, match=r"mu of .* is float64\[768\], but numbers \[2048\] are needed"):
        StatisticsFile(tmp_path / "x.npz").gaussian("features_2048")


def test_statistics_that_are_not_finite_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    with pytest.raises(UserError, match="mu of .* holds NaN or infinity"):
        StatisticsFile(tmp_path / "x.npz").gaussian("features_2048")


def test_a_version_from_the_future_is_refused_by_name(tmp_path, gaussians):
    path = write(tmp_path / "x.npz", gaussians, provenance={"version": 2})
    with pytest.raises(UserError, match="reference of version 2, but version 1 is known"):
        StatisticsFile(path)


@pytest.mark.parametrize(
    "features",
    [np.zeros(2048), np.zeros((3, 768)), np.zeros((3, 2048), dtype=np.int64), np.full((3, 2048), np.inf)],
    ids=["one row too flat", "another width", "no floats", "not finite"],
)
def test_features_that_are_none_of_the_network_are_refused(tmp_path, features):
    np.savez(tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048), features=features)
    with pytest.raises(UserError, match=r"features of .* are not finite numbers \[N, 2048\]"):
        StatisticsFile(tmp_path / "x.npz").features()


@pytest.mark.parametrize("count", [np.array(0), np.array(2.5), np.array([5])], ids=["none", "a fraction", "a list"])
def test_a_count_that_is_no_number_of_images_is_refused(tmp_path, count):
    np.savez(tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048), count=count)
    with pytest.raises(UserError, match="count of .* is no number of images"):
        StatisticsFile(tmp_path / "x.npz")


def test_one_image_is_a_count(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048), count=np.array(1))
    assert StatisticsFile(tmp_path / "x.npz").count == 1


def test_provenance_of_another_program_is_no_concern_and_a_damaged_one_is_told(tmp_path):
    for text in ("[1]", '{"format": "another", "version": 9}'):
        np.savez(tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048), provenance=np.asarray(text))
        assert StatisticsFile(tmp_path / "x.npz").provenance == {}
    np.savez(tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048), provenance=np.asarray("{"))
    with pytest.raises(UserError, match="provenance of .* is damaged"):
        StatisticsFile(tmp_path / "x.npz")


def test_statistics_that_are_no_numbers_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.full(2048, "a"), sigma=np.eye(2048))
    with pytest.raises(UserError, match=r"mu of .* but numbers \[2048\] are needed"):
        StatisticsFile(tmp_path / "x.npz").gaussian("features_2048")
