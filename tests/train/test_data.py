import threading
import time

import numpy as np
import pytest
import torch

from pipeline.latents import LatentStore
from pipeline.runtime.errors import UserError
from tests.train.runs import make_store
from train.data import BatchReader, BatchShard, DataOrder, view_candidates


def reader(store, *, first=0, shard=None, prefetch=2, views=(0, 1)):
    shard = shard or BatchShard(batch_size=8)
    order = DataOrder(len(store), seed=0)
    candidates = np.array(views, dtype=np.int64)
    device = torch.device("cpu")
    return BatchReader(store, order, shard, views=candidates, seed=0, first=first, prefetch=prefetch, device=device)


def take(batches, count):
    """Copies, as a batch is valid only until the next one."""
    return [
        (batch.number, batch.latents.clone(), batch.labels.clone())
        for batch, _ in zip(batches, range(count), strict=False)
    ]


def test_batches_hold_the_samples_of_the_order_in_one_of_their_views(store):
    with LatentStore(store) as latents, reader(latents) as batches:
        seen = set()
        for number, moments, labels in take(batches, 20):
            indices = DataOrder(len(latents), seed=0).batch(number, BatchShard(batch_size=8))
            both, expected = latents[indices]
            assert torch.equal(labels, expected)
            for row, views in zip(moments, both, strict=True):
                found = [torch.equal(row, view) for view in views]
                assert any(found)
                seen.add(found.index(True))
        assert seen == {0, 1}


def test_reading_begins_anywhere_and_a_rank_gets_its_rows(store):
    with LatentStore(store) as latents, reader(latents) as from_start, reader(latents, first=3) as later:
        whole = take(from_start, 6)
        for (a, moments, labels), (b, same, same_labels) in zip(whole[3:], take(later, 3), strict=True):
            assert a == b and torch.equal(moments, same) and torch.equal(labels, same_labels)
        shard = BatchShard(batch_size=8, rank=1, processes=2)
        with reader(latents, shard=shard) as second_half:
            for (_, moments, _), (_, mine, _) in zip(whole, take(second_half, 6), strict=True):
                assert torch.equal(moments[4:], mine)


def test_reading_ahead_is_bounded_and_buffers_are_used_again(store):
    with LatentStore(store) as latents:
        gathered = []
        original = latents.gather
        latents.gather = lambda *args, **kwargs: gathered.append(1) or original(*args, **kwargs)
        with reader(latents, prefetch=3) as batches:
            endless = iter(batches)
            addresses = {next(endless).latents.data_ptr()}
            time.sleep(0.3)
            assert len(gathered) <= 4  # the one in use and three ahead
            addresses |= {next(endless).latents.data_ptr() for _ in range(20)}
            assert len(addresses) == 4


def test_closing_ends_the_thread_even_with_batches_waiting(store):
    with LatentStore(store) as latents, reader(latents, prefetch=4) as batches:
        take(batches, 1)
        assert any(thread.name.startswith("read_") for thread in threading.enumerate())
    assert not any(thread.name.startswith("read_") for thread in threading.enumerate())


def test_an_error_while_reading_is_raised_where_the_batch_is_asked_for(tmp_path):
    folder = make_store(tmp_path / "latents", shards=1)
    with LatentStore(folder) as latents, reader(latents, prefetch=1) as batches:
        endless = iter(batches)
        next(endless)
        shard = folder / "train-00000.safetensors"
        with shard.open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(UserError, match="train-00000"):
            for _ in range(20):
                next(endless)


def test_mirrored_views_can_be_left_out():
    views = ["random-0", "random-0-hflip", "random-1", "random-1-hflip"]
    assert view_candidates(views, flip=True).tolist() == [0, 1, 2, 3]
    assert view_candidates(views, flip=False).tolist() == [0, 2]


def test_the_reading_thread_takes_its_device_before_it_waits_for_a_copy_and_only_pinned_copies_go_ahead(
    store, monkeypatch
):
    """Else every rank's thread would open a context on the first GPU, and other memory be read too late."""
    said = []

    class Event:
        def __init__(self, *, blocking):
            said.append(("event", blocking))

        def record(self):
            said.append("record")

        def synchronize(self):
            said.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: said.append(str(device)))
    sent, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **b: sent.append(b.get("non_blocking")) or to(x, *a, **b))
    with LatentStore(store) as opened:
        for pinned in (True, False):
            batches = reader(opened)
            batches._device, batches._pinned = torch.device("meta"), pinned
            slot = batches._read(0)
            batches._on_device(0, slot)
            assert sent == [pinned] * 2
            sent.clear()
            batches._read(0)
    assert said == [("event", True), "record", "meta", "synchronize"]
