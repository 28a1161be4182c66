import numpy as np
import pytest
import torch

from pipeline.randomness import Permutation, derive_seed, generator, normal


def test_a_derived_seed_is_the_same_for_ever():
    assert derive_seed(0, "order", 0) == 1370560536841482319
    assert derive_seed(0, "noise", 12, 3) == derive_seed(0, "noise", 12, 3)


def test_no_two_keys_share_a_seed():
    keys = [(s, p, *n) for s in range(4) for p in ("a", "b") for n in [(), (0,), (1,), (0, 1), (1, 0), (11,)]]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_seed_1_is_not_seed_0_one_epoch_later():
    assert derive_seed(1, "order", 0) != derive_seed(0, "order", 1)


def test_a_draw_depends_on_its_key_alone():
    first = normal((3, 4), 5, "noise", 7)
    torch.rand(10)
    assert torch.equal(first, normal((3, 4), 5, "noise", 7))
    assert not torch.equal(first, normal((3, 4), 5, "noise", 8))
    assert torch.equal(first, torch.randn((3, 4), generator=generator(5, "noise", 7)))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 100, 1797, 65_537])
def test_a_permutation_holds_every_index_once_and_can_be_inverted(length):
    permutation = Permutation(length, 0, "order", 0)
    positions = np.arange(length)
    indices = permutation[positions]
    assert np.array_equal(np.sort(indices), positions)
    assert np.array_equal(permutation.inverse(indices), positions)


def test_the_order_is_the_same_for_ever():
    assert Permutation(1000, 0, "order", 0)[np.arange(10)].tolist() == [136, 807, 902, 773, 55, 622, 975, 508, 450, 174]
    assert Permutation(1_281_167, 7, "order", 3)[np.array([0, 1, 1_281_166])].tolist() == [209265, 1068690, 93448]


def test_a_permutation_looks_random():
    length = 20_000
    indices = Permutation(length, 3, "order", 1)[np.arange(length)]
    assert abs(np.corrcoef(np.arange(length), indices)[0, 1]) < 4 / np.sqrt(length)
    fixed_points = int((indices == np.arange(length)).sum())
    assert fixed_points <= 8, "a random permutation has one fixed point on average"
    neighbours = np.abs(np.diff(indices)).mean()
    assert abs(neighbours / (length / 3) - 1) < 0.03
    halves = indices[: length // 2] < length // 2
    assert abs(halves.mean() - 0.5) < 4 * 0.5 / np.sqrt(length // 2)


def test_epochs_differ():
    positions = np.arange(500)
    assert not np.array_equal(Permutation(500, 0, "order", 0)[positions], Permutation(500, 0, "order", 1)[positions])


def test_a_position_deep_in_a_huge_epoch_needs_no_memory():
    permutation = Permutation(100_000_000, 0, "order", 0)
    batch = permutation[np.arange(99_999_744, 100_000_000)]
    assert len(set(batch.tolist())) == 256


def test_positions_outside_are_refused():
    with pytest.raises(IndexError, match="0 … 9"):
        Permutation(10, 0, "order")[np.array([10])]
