"""Metrics on closed forms, against scipy, and at the edges where careless arithmetic breaks."""

import numpy as np
import pytest
import scipy.linalg

from sample.evaluate.metrics import (
    Gaussian,
    fit_gaussian,
    frechet_distance,
    inception_score,
    kernel_distance,
    unbiased_mmd,
)
from sample.evaluate.neighbours import precision_and_recall


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def covariance_of(seed, width, rank=None):
    factor = draw(seed, width, rank or 3 * width)
    return factor @ factor.T / factor.shape[1]


def gaussian(seed, width, rank=None):
    return Gaussian(mean=draw(seed + 1, width), covariance=covariance_of(seed, width, rank))


# --- Gaussians and their distance


def test_a_fitted_gaussian_has_the_unbiased_covariance_whatever_the_blocks():
    rows = (draw(0, 57, 6) + 100).astype(np.float32)
    whole = fit_gaussian([rows])
    in_blocks = fit_gaussian([rows[:1], rows[1:20], rows[20:]])
    np.testing.assert_allclose(whole.mean, rows.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(whole.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-11)
    np.testing.assert_allclose(in_blocks.covariance, whole.covariance, rtol=1e-11)
    assert whole.covariance.dtype == np.float64


def test_a_covariance_keeps_its_digits_beside_a_large_mean():
    rows = draw(0, 1000, 4)
    far = fit_gaussian([rows + 1e8])
    np.testing.assert_allclose(far.covariance, np.cov(rows, rowvar=False), rtol=1e-6, atol=1e-6)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 rows, not 1"):
        fit_gaussian([draw(0, 1, 3)])


def test_fid_of_two_gaussians_in_one_dimension_is_the_closed_form():
    first = Gaussian(mean=np.array([1.0]), covariance=np.array([[4.0]]))
    second = Gaussian(mean=np.array([-2.0]), covariance=np.array([[0.25]]))
    assert frechet_distance(first, second) == pytest.approx(3**2 + (2 - 0.5) ** 2, rel=1e-14)


def test_fid_of_gaussians_with_common_axes_is_the_closed_form():
    axes = np.linalg.qr(draw(3, 20, 20))[0]
    a, b = np.random.default_rng(4).uniform(0.01, 9, (2, 20))
    mean = draw(5, 20)
    first = Gaussian(mean=mean, covariance=axes * a @ axes.T)
    second = Gaussian(mean=mean + 0.5, covariance=axes * b @ axes.T)
    expected = 20 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("width", [2, 30, 200])
def test_fid_agrees_with_the_matrix_square_root_of_scipy(width):
    first, second = gaussian(0, width), gaussian(7, width)
    root = scipy.linalg.sqrtm(first.covariance @ second.covariance)
    difference = first.mean - second.mean
    expected = difference @ difference + np.trace(first.covariance + second.covariance - 2 * np.real(root))
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_fid_of_a_gaussian_with_itself_is_zero_even_if_singular():
    for rank in (5, 60):
        same = gaussian(0, 60, rank)
        assert frechet_distance(same, same) == pytest.approx(0, abs=1e-10)


def test_fid_of_a_shifted_gaussian_is_the_squared_shift():
    first = gaussian(0, 40, rank=10)
    shifted = Gaussian(mean=first.mean + 0.3, covariance=first.covariance)
    assert frechet_distance(first, shifted) == pytest.approx(40 * 0.09, rel=1e-10)


def test_fid_of_singular_gaussians_on_orthogonal_axes_is_the_sum_of_their_traces():
    first = Gaussian(mean=np.zeros(4), covariance=np.diag([2.0, 3.0, 0.0, 0.0]))
    second = Gaussian(mean=np.zeros(4), covariance=np.diag([0.0, 0.0, 5.0, 1.0]))
    assert frechet_distance(first, second) == pytest.approx(11, rel=1e-14)


def test_fid_is_symmetric():
    first, second = gaussian(0, 50, 20), gaussian(9, 50)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-12)


# --- Inception Score


def test_the_inception_score_of_confident_even_classes_is_their_number():
    logits = np.tile(np.eye(7) * 200, (10, 1))
    assert inception_score([logits]).mean == pytest.approx(7, rel=1e-12)


def test_the_inception_score_of_equal_predictions_is_one():
    assert inception_score([np.tile(draw(0, 1, 12), (30, 1))]).mean == pytest.approx(1, rel=1e-12)


def test_the_inception_score_is_unmoved_by_huge_logits():
    logits = draw(0, 40, 9)
    assert inception_score([logits + 1e4]).mean == pytest.approx(inception_score([logits]).mean, rel=1e-9)


def test_the_inception_score_is_taken_over_splits_in_order_with_the_short_one_last():
    logits = draw(0, 25, 5) * 3
    scores = [inception_score([part]).mean for part in (logits[:10], logits[10:20], logits[20:])]
    for blocks in ([logits], [logits[:3], logits[3:4], logits[4:24], logits[24:]]):
        found = inception_score(blocks, split_size=10)
        assert found.mean == pytest.approx(np.mean(scores), rel=1e-13)
        assert found.std == pytest.approx(np.std(scores), rel=1e-12)
        assert (found.parts, found.part_size) == (3, 10)


# --- KID


def test_the_mmd_is_the_sum_over_pairs():
    x, y = draw(0, 6, 3), draw(1, 5, 3)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    within_x = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert unbiased_mmd(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-12)


def test_kid_has_no_bias_from_small_samples():
    rows = draw(0, 4000, 4)
    small = kernel_distance(rows[:2000], rows[2000:], seed=0, subsets=400, subset_size=20)
    assert abs(small.mean) < 4 * small.std / np.sqrt(small.parts)
    assert small.std > 0


def test_kid_sees_a_shift_and_depends_on_the_seed_alone():
    x = draw(0, 300, 4)
    shifted = x + 1
    first = kernel_distance(x, shifted, seed=3, subsets=10, subset_size=100)
    assert first == kernel_distance(x, shifted, seed=3, subsets=10, subset_size=100)
    assert first != kernel_distance(x, shifted, seed=4, subsets=10, subset_size=100)
    assert first.mean > 1


def test_a_small_set_shrinks_the_subsets_of_kid():
    assert kernel_distance(draw(0, 30, 4), draw(1, 12, 4), seed=0, subsets=2).part_size == 12


# --- precision and recall


def plain_precision(reference, samples, k=3):
    distances = np.linalg.norm(reference[:, None] - reference[None], axis=2)
    reach = np.sort(distances, axis=1)[:, k]
    return np.mean([(np.linalg.norm(reference - row, axis=1) <= reach).any() for row in samples])


def test_precision_and_recall_are_those_of_the_definition_in_tiles_of_any_size():
    reference, samples = draw(0, 61, 3), draw(1, 47, 3) * 1.5
    expected = plain_precision(reference, samples), plain_precision(samples, reference)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    for tile_rows in (7, 47, 1000):
        assert precision_and_recall(reference, samples, tile_rows=tile_rows) == pytest.approx(expected)


def test_equal_sets_have_precision_and_recall_one_and_distant_ones_zero():
    rows = draw(0, 40, 8).astype(np.float32)
    assert precision_and_recall(rows, rows) == (1.0, 1.0)
    assert precision_and_recall(rows, rows + 1000) == (0.0, 0.0)


def test_a_set_of_copies_lies_in_its_own_manifold():
    """Balls of radius zero: rounding must not push a vector out of its own place."""
    rows = np.repeat(draw(0, 5, 64).astype(np.float32) * 37, 6, axis=0)
    assert precision_and_recall(rows, rows[::6].repeat(4, axis=0)) == (1.0, 1.0)


def test_samples_of_one_mode_are_precise_but_miss_the_other():
    left, right = draw(0, 60, 4), draw(1, 60, 4) + 100
    precision, recall = precision_and_recall(np.concatenate([left, right]), draw(2, 60, 4) * 0.5)
    assert precision > 0.95
    assert recall <= 0.5


def test_three_neighbours_need_four_images():
    with pytest.raises(ValueError, match="3 nearest neighbours need more than 3 vectors"):
        precision_and_recall(draw(0, 3, 2), draw(0, 9, 2))


def test_sets_that_make_one_subset_are_judged_once():
    rows = np.random.default_rng(0).standard_normal((20, 8))
    spread = kernel_distance(rows, rows[::-1] + 1, seed=0, subsets=100, subset_size=50)
    assert (spread.parts, spread.part_size, spread.std) == (1, 20, 0.0)
    assert kernel_distance(rows, rows[:19], seed=0, subsets=7, subset_size=50).parts == 7
