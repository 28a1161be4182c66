"""Reading: any samples in any order, equal to the naive way; damage is told with the shard and the row."""

import json
import os
import pickle
import shutil
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.latents import LatentStore, shards
from pipeline.latents.names import format_of
from pipeline.latents.shards import row_type
from pipeline.latents.writer import finish_store, write_shard
from pipeline.runtime.errors import UserError


@pytest.fixture(scope="module")
def store(whole_store):
    return LatentStore(whole_store)


def test_an_integer_drops_the_axis_and_everything_else_keeps_it(store, sample):
    latents, label = store[8]
    assert latents.shape == (2, 8, 4, 4) and torch.equal(latents, sample.latents[8])
    assert label.shape == () and label.dtype == torch.int64 and label == sample.labels[8]
    for one in ([8], np.array([8]), torch.tensor([8]), slice(8, 9), (8,), range(8, 9)):
        latents, labels = store[one]
        assert latents.shape == (1, 2, 8, 4, 4) and torch.equal(latents[0], sample.latents[8])
        assert labels.tolist() == [sample.labels[8]]
    assert torch.equal(store[np.int64(8)][0], sample.latents[8])


@pytest.mark.parametrize(
    "indices",
    [[11, 0, 3, 3, 0], [], [-1, -12], slice(None), slice(None, None, -2), slice(100, 200), np.arange(12) % 3 == 0],
)
def test_indices_mean_what_they_mean_in_numpy(store, sample, indices):
    latents, labels = store[indices]
    numpy_indices = np.array(indices, dtype=int) if isinstance(indices, list) else indices
    assert np.array_equal(latents.numpy(), sample.latents.numpy()[numpy_indices])
    assert np.array_equal(labels.numpy(), sample.labels[numpy_indices])


@pytest.mark.parametrize("indices", [12, -13, [0, 12], [5, -13]])
def test_what_is_outside_the_store_is_an_index_error(store, indices):
    with pytest.raises(IndexError, match="outside the 12 samples"):
        store[indices]


@pytest.mark.parametrize("indices", [[0.5], [[1, 2]], ["a"]])
def test_what_is_no_index_is_a_type_error(store, indices):
    with pytest.raises(TypeError, match="whole numbers"):
        store[indices]


def test_iterating_gives_every_sample_once(store, sample):
    assert torch.equal(torch.stack([latents for latents, _ in store]), sample.latents)


@pytest.mark.parametrize("may_know_what_is_cached", [True, False])
def test_a_gather_of_views_equals_one_row_after_the_other(whole_store, sample, may_know_what_is_cached, monkeypatch):
    if not may_know_what_is_cached:
        monkeypatch.setattr(shards, "_NO_WAIT", 0)
    store = LatentStore(whole_store)
    draws = np.random.default_rng(0)
    for count in (0, 1, 2, 5, 50, 2000):
        indices = draws.integers(0, 12, count)
        views = draws.integers(0, 2, count)
        latents, labels = store.gather(indices, views)
        assert torch.equal(latents, sample.latents[torch.as_tensor(indices), torch.as_tensor(views)])
        assert labels.tolist() == sample.labels[indices].tolist()
        first, _ = store.gather(indices)
        assert torch.equal(first, sample.latents[torch.as_tensor(indices), 0])


def test_a_gather_fills_the_buffer_it_is_given_and_refuses_another(store, sample):
    buffer = torch.full((3, 8, 4, 4), 7.0, dtype=torch.float16)
    indices = np.array([9, 1, 4])
    latents, _ = store.gather(indices, out=buffer)
    assert latents is buffer and torch.equal(buffer, sample.latents[indices, 0])
    for wrong in (buffer[:2], buffer.float(), buffer[..., :2], buffer.transpose(2, 3)):
        with pytest.raises((ValueError, TypeError)):
            store.gather(indices, out=wrong)
    with pytest.raises(IndexError, match=r"0 … 1: the store has center, center-hflip"):
        store.gather(indices, np.array([0, 2, 0]))


def test_labels_and_listing_positions_come_in_store_order(store, sample):
    assert store.labels().tolist() == sample.labels.tolist()
    assert store.indices().tolist() == sample.indices.tolist()


@pytest.mark.parametrize("kind", ["moments", "point"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kind_and_dtype_is_read_back(new_sample, kind, dtype, shard_format, tmp_path):
    sample = new_sample(kind, dtype)
    store = LatentStore(str(sample.write(tmp_path, shard_format)))
    assert torch.equal(store[:][0], sample.latents)
    assert torch.equal(store.gather(np.array([3, 11]))[0], sample.latents[[3, 11], 0])


def borders(path):
    """Every place where one thing of a shard ends and the next begins, and the last byte."""
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            found = [
                place
                for member in tar
                for place in (member.offset, member.offset_data, member.offset_data + member.size)
            ]
    else:
        first = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8:first])
        found = [0, 8, first, *(first + place for entry in header.values() for place in entry["data_offsets"])]
    size = path.stat().st_size
    return sorted({place for place in [*found, size - 1] if place < size})


def test_a_shard_cut_off_anywhere_is_named_when_the_store_is_opened(own_store):
    for path in sorted([*own_store.glob("*.tar"), *own_store.glob("*.safetensors")]):
        whole = path.read_bytes()
        for place in borders(path):
            path.write_bytes(whole[:place])
            with pytest.raises(UserError, match=rf"{path.name} is cut off: it has {place} bytes"):
                LatentStore(own_store)
        path.write_bytes(whole + b"\0")
        with pytest.raises(UserError, match=rf"{path.name} is too long"):
            LatentStore(own_store)
        path.write_bytes(whole)
    assert len(LatentStore(own_store)) == 12


def test_a_missing_shard_is_named_when_the_store_is_opened(own_store, sample):
    path = next(own_store.glob("train-00002.[st]*"))
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} is missing"):
        LatentStore(own_store)


def test_a_shard_cut_off_while_it_is_read_gives_an_error_with_shard_and_row(own_store, sample):
    store = LatentStore(own_store)
    store[:]
    path = next(own_store.glob("train-00000.[st]*"))
    row = row_type(store.manifest.latent, 2)
    layout = format_of(store.manifest.shard_format).read_layout(
        shards.ShardFile(path, size=path.stat().st_size), 7, row
    )
    os.truncate(path, layout.latents.start + 4 * layout.latents.stride + 10)
    with pytest.raises(UserError, match=rf"{path.name}, row 4, is cut off"):
        store[[2, 4, 9]]
    assert torch.equal(store[[0, 3]][0], sample.latents[[0, 3]])
    with pytest.raises(UserError, match=rf"{path.name}, row [56], is cut off"):
        store.gather(np.array([6, 5]))


def test_a_shard_of_another_store_is_refused_though_its_size_fits(own_store, sample, shard_format, tmp_path):
    path = next(own_store.glob("train-00000.[st]*"))
    other = sample.shards[0].reshape(7, 1, 16, 4, 4)
    write_shard(tmp_path / "other", "train", 0, shard_format, other, [0] * 7, range(7), [""] * 7)
    swapped = (tmp_path / "other" / path.name).read_bytes()
    if len(swapped) == path.stat().st_size:
        path.write_bytes(swapped)
        with pytest.raises(UserError, match=rf"{path.name}.*(does not hold|expected)"):
            LatentStore(own_store)[0]


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\0" * 8, (1 << 40).to_bytes(8, "little")])
def test_a_header_of_impossible_length_is_refused(new_sample, damage, tmp_path):
    folder = new_sample().write(tmp_path, "safetensors")
    path = folder / "train-00000.safetensors"
    path.write_bytes(damage + path.read_bytes()[8:])
    with pytest.raises(UserError, match=r"train-00000\.safetensors"):
        LatentStore(folder)[0]


@pytest.mark.parametrize(
    ("found", "written"),
    [
        ('"F16"', '"F32"'),
        ("[7,2,8,4,4]", "[7,2,4,8,4]"),
        ("[0,56]", "[0,57]"),
        ("[56,112]", "[-6,50]"),
        ("[112,3696]", "[113,3697]"),
        ('"label"', '"lebal"'),
        ("[7]", "{7}"),
    ],
)
def test_a_header_that_points_elsewhere_is_refused(new_sample, found, written, tmp_path):
    folder = new_sample().write(tmp_path, "safetensors")
    path = folder / "train-00000.safetensors"
    data = path.read_bytes()
    assert found.encode() in data
    changed = data.replace(found.encode(), written.encode(), 1)
    path.write_bytes(changed[: len(data)].ljust(len(data), b"\0"))
    with pytest.raises(
        UserError, match=r"train-00000\.safetensors (does not hold what the manifest promises|is not valid JSON)"
    ):
        LatentStore(folder)[0]


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_files_stay_open_however_many_shards_there_are(new_sample, shard_format, tmp_path):
    sample = new_sample(rows=(3,) * 30)
    store = LatentStore(sample.write(tmp_path, shard_format))
    store._most_open = 4
    before = open_files()
    for _ in range(2):
        assert torch.equal(store[:][0], sample.latents)
    assert open_files() - before <= 4
    store.close()
    assert open_files() == before


def test_threads_may_read_at_the_same_time(new_sample, shard_format, tmp_path):
    sample = new_sample(rows=(3,) * 10)
    store = LatentStore(sample.write(tmp_path, shard_format))
    store._most_open = 1  # files are closed under the other threads' hands
    wrong = []

    def read(seed):
        draws = np.random.default_rng(seed)
        for _ in range(30):
            indices = draws.integers(0, 30, 20)
            wrong.extend([1] if not torch.equal(store[indices][0], sample.latents[indices]) else [])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_store_can_be_sent_to_another_process(store, sample):
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy[:][0], sample.latents) and copy.manifest == store.manifest


def test_a_store_can_be_moved(own_store, sample, tmp_path):
    moved = tmp_path / "moved"
    shutil.move(own_store, moved)
    with LatentStore(moved) as store:
        assert torch.equal(store[:][0], sample.latents) and store.manifest.samples == len(store)


def test_a_batch_costs_at_most_a_fifth_of_loading_one_file_per_sample(new_sample, tmp_path):
    """CPU time, so that a busy machine changes nothing; `benchmarks/loader.py` measures the wall clock and asks for 8."""
    sample = new_sample(rows=(512,))
    sample.shards = [torch.randn(512, 1, 8, 32, 32, generator=torch.Generator().manual_seed(0)).half()]
    for index, array in enumerate(sample.shards[0].numpy()[:, 0]):
        np.save(tmp_path / f"{index}.npy", array)
    sample.write_shard(tmp_path, "safetensors", 0)
    description = sample.describe("safetensors", views=["center"])
    latent = replace(description.latent, height=32, width=32)
    finish_store(tmp_path, replace(description, latent=latent), shards=1)
    store = LatentStore(tmp_path)
    order = np.random.default_rng(0).permutation(512)

    def cpu_seconds(work):
        times = []
        for _ in range(5):
            started = time.process_time()
            work()
            times.append(time.process_time() - started)
        return min(times)

    plain = cpu_seconds(lambda: torch.stack([torch.from_numpy(np.load(tmp_path / f"{i}.npy")) for i in order]))
    ours = cpu_seconds(lambda: [store.gather(order[:256]), store.gather(order[256:])])
    assert ours * 5 < plain


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_100_million_samples_open_within_seconds_and_little_memory(tmp_path):
    """24,415 shards that are all the same file of zeros with holes, behind a manifest of the real size."""
    latents = torch.zeros(4096, 1, 2, 1, 1).half()
    record = write_shard(tmp_path, "train", 0, "safetensors", latents, [0] * 4096, range(4096), ["k"] * 4096)
    shards = []
    for number in range(24415):
        name = f"train-{number:05d}.safetensors"
        if number:
            os.link(tmp_path / record.file, tmp_path / name)
        shards.append({"file": name, "samples": 4096, "bytes": record.bytes, "sha256": record.sha256})
    manifest = {
        "format": "dit-latents",
        "version": 1,
        "shard_format": "safetensors",
        "split": "train",
        "samples": 4096 * len(shards),
        "skipped": 0,
        "classes": [],
        "class_ids": [],
        "image": {"size": 8, "crop": "adm-center"},
        "views": ["center"],
        "latent": {"kind": "moments", "channels": 1, "height": 1, "width": 1, "dtype": "float16", "downsample": 8},
        "vae": {"scaling_factor": 1.0},
        "statistics": {"mean": [0.0], "std": [1.0]},
        "seed": 0,
        "shards": shards,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    started, before = time.process_time(), resident_bytes()
    store = LatentStore(tmp_path)
    indices = np.random.default_rng(0).integers(0, len(store), 256)
    latents, labels = store.gather(indices)
    assert time.process_time() - started < 10
    assert len(store) == 100_003_840 and not latents.any() and not labels.any()
    assert resident_bytes() - before < 500e6
