import math

import pytest

from studies.statistics import compared, fit_power_law, ratio_of_means, samples_to, spread


def test_the_fit_of_a_power_law_is_that_law():
    law = fit_power_law([1, 2, 4, 8], [3 * x**-0.5 for x in (1, 2, 4, 8)])
    assert (law.factor, law.exponent, law.r) == pytest.approx((3, -0.5, -1))
    assert law.at(16) == pytest.approx(0.75)


def test_r_is_pearsons_of_the_logarithms():
    law = fit_power_law([1, 10, 100], [1, 100, 10])
    assert law.r == pytest.approx(0.5)


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 1, 2])])
def test_points_that_give_no_fit_give_none(x, y):
    assert fit_power_law(x, y) is None


def test_samples_to_a_threshold_are_exact_on_a_curve_that_falls_exponentially():
    curve = [(samples, 100 * math.exp(-samples / 1000)) for samples in (500, 1000, 3000, 4000)]
    assert samples_to(curve, 10) == pytest.approx(1000 * math.log(10))


def test_a_threshold_that_is_never_reached_has_no_samples_and_the_first_crossing_counts():
    assert samples_to([(1, 5.0), (2, 4.0)], 3) is None
    assert samples_to([(1, 5.0), (2, 2.5), (3, 9.0), (4, 1.0)], 2.5) == 2
    assert samples_to([(7, 2.0)], 3) == 7


def test_the_interval_of_a_ratio_holds_the_ratio_and_narrows_with_seeds_that_agree():
    wide, narrow = ratio_of_means([90, 100, 110], [40, 50, 60]), ratio_of_means([99, 100, 101], [49, 50, 51])
    assert wide.value == narrow.value == 2
    assert wide.low < narrow.low < 2 < narrow.high < wide.high
    assert ratio_of_means([100], [50]) == ratio_of_means([100, 100], [50, 50])


def test_the_interval_of_a_mean_is_students():
    band = spread([1.0, 2.0, 3.0])
    assert (band.value, band.high - 2) == pytest.approx((2, 4.3027 / math.sqrt(3)), rel=1e-4)
    assert spread([5.0]).low == spread([5.0]).high == 5


def test_a_sentence_says_whether_a_difference_is_larger_than_the_noise():
    assert "50.0% lower than base, which is larger than" in compared("new", [5.0, 5.1, 4.9], "base", [10, 10.1, 9.9])
    assert "higher than base, which is within the noise" in compared("new", [5.0, 15.5, 10], "base", [10, 6, 14])
    assert compared("new", [5.0], "base", [10.0, 9]).endswith("with one seed a side nothing is said of noise")
    assert compared("new", [5.0, 5.0], "base", [10.0, 10.0]).endswith("seeds make no difference")
