import numpy as np
import pytest

from pipeline.runtime.errors import UserError
from train.data import BatchShard, DataOrder, draw_views

GRID = [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)]

GOLDEN_ORDER = [233, 207, 486, 169, 769, 880, 796, 97]
GOLDEN_SPLIT = [40, 291, 312, 354, 268, 778, 97, 367]


def stream(order, batch_size, batches, processes=1, accumulation=1):
    """The global batches, put together from every process's micro-batches."""
    rows = []
    for number in range(batches):
        for rank in range(processes):
            shard = BatchShard(batch_size=batch_size, rank=rank, processes=processes, accumulation=accumulation)
            mine = order.batch(number, shard)
            rows += [mine[shard.micro_rows(part)] for part in range(accumulation)]
    return np.concatenate(rows)


@pytest.mark.parametrize("order", ["scattered", "runs"])
@pytest.mark.parametrize(("processes", "accumulation"), GRID)
def test_global_batches_are_the_same_for_any_processes_and_accumulation(processes, accumulation, order):
    alone = stream(DataOrder(100, seed=3, order=order), 12, 30)
    assert np.array_equal(stream(DataOrder(100, seed=3, order=order), 12, 30, processes, accumulation), alone)


@pytest.mark.parametrize("order", ["scattered", "runs"])
def test_every_epoch_holds_every_sample_once_and_runs_on_across_its_edge(order):
    order = stream(DataOrder(100, seed=3, order=order), 12, 25)  # three epochs, whose edges fall inside batches
    epochs = order.reshape(3, 100)
    assert all(np.array_equal(np.sort(epoch), np.arange(100)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_batch_larger_than_the_store_is_full():
    assert np.array_equal(np.bincount(stream(DataOrder(5, seed=0), 12, 5)), [12] * 5)


def test_a_seed_is_no_other_seeds_next_epoch():
    first = DataOrder(50, seed=1).indices(np.arange(50))
    assert not np.array_equal(first, DataOrder(50, seed=0).indices(np.arange(50, 100)))


def test_the_order_never_changes():
    assert DataOrder(1000, seed=0).indices(np.arange(8)).tolist() == GOLDEN_ORDER
    assert DataOrder(1000, seed=0, held_out=100).indices(np.arange(8)).tolist() == GOLDEN_SPLIT


def test_a_position_far_away_is_reached_without_walking_there():
    order, epoch = DataOrder(1_281_167, seed=0), 10**9
    far = order.indices(np.arange(epoch * 1_281_167, epoch * 1_281_167 + 256))
    assert len(set(far.tolist())) == 256


def test_held_out_samples_are_never_trained_on_and_the_rest_always():
    order = DataOrder(100, seed=7, held_out=20)
    held = order.held_out(20)
    trained = order.indices(np.arange(80))
    assert sorted([*held, *trained]) == list(range(100))
    assert np.array_equal(order.held_out(5), held[:5])


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(UserError, match="none is left to train on; lower --validation-share"):
        DataOrder(10, seed=0, held_out=10)


def test_a_batch_that_does_not_divide_names_the_sizes_that_do():
    with pytest.raises(UserError, match=r"2 processes × --grad-accumulation 3; use 6 or 12"):
        BatchShard(batch_size=8, processes=2, accumulation=3)
    with pytest.raises(UserError, match="use 4$"):
        BatchShard(batch_size=3, processes=4)


def test_views_are_drawn_per_sample_alike_on_any_number_of_processes():
    candidates = np.array([0, 2, 5])
    alone = draw_views(candidates, 4, BatchShard(batch_size=600), seed=1)
    parts = [draw_views(candidates, 4, BatchShard(batch_size=600, rank=r, processes=4), seed=1) for r in range(4)]
    assert np.array_equal(np.concatenate(parts), alone)
    counts = np.bincount(alone, minlength=6)
    assert counts[[1, 3, 4]].sum() == 0 and counts[[0, 2, 5]].min() > 150
    assert not np.array_equal(alone, draw_views(candidates, 5, BatchShard(batch_size=600), seed=1))


@pytest.mark.parametrize("samples", [15, 16, 1024, 5000])
def test_runs_hold_every_sample_once_and_keep_neighbours_in_one_window(samples):
    order = DataOrder(samples, seed=2, order="runs")
    epoch = order.indices(np.arange(samples))
    assert np.array_equal(np.sort(epoch), np.arange(samples))
    assert not np.array_equal(epoch, order.indices(np.arange(samples, 2 * samples)))
    if samples == 5000:
        window_of = {index: position // 1024 for position, index in enumerate(epoch.tolist())}
        assert all(len({window_of[16 * run + row] for row in range(16)}) == 1 for run in range(5000 // 16))
        runs_per_batch = [len(set((epoch[first : first + 256] // 16).tolist())) for first in range(0, 4096, 256)]
        assert max(runs_per_batch) <= 64


def test_runs_of_a_randomly_written_store_mix_the_classes_nearly_as_well():
    """Distinct classes in a batch of 256 of 1,000 classes: 226 for a global permutation."""
    labels = DataOrder(100_000, seed=9).indices(np.arange(100_000)) % 1000
    stream_of_runs = labels[DataOrder(100_000, seed=0, order="runs").indices(np.arange(100_000))]
    distinct = [len(set(stream_of_runs[first : first + 256].tolist())) for first in range(0, 99_000, 256)]
    assert abs(np.mean(distinct) - 226) < 3
