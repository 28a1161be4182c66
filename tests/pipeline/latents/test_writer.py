"""Shards appear whole, with their records; any number of writers, killed at any moment, give the same bytes."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.latents import LatentStore
from pipeline.latents.verify import verify
from pipeline.latents.writer import finish_store, missing_shards, read_record, unstorable_rows, write_shard
from pipeline.runtime.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("rounds", "writers"),
    [(2, 2), pytest.param(60, 1, marks=pytest.mark.slow), pytest.param(60, 3, marks=pytest.mark.slow)],
)
def test_writers_killed_at_random_moments_leave_nothing_half_done_and_end_with_the_same_bytes(
    tmp_path, bytes_of, rounds, writers
):
    command = [sys.executable, str(Path(__file__).with_name("killed_writers.py")), str(tmp_path)]
    command += [str(rounds), str(writers), str(rounds + writers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["forked"] == 0  # a store can be read on in a fork
    for name, report in found["stores"].items():
        assert report["broken"] == [] and report["status"] == 0, name
        assert report["killed"] > 0 or name.endswith("-straight")
    for shard_format in ("safetensors", "webdataset"):
        straight, killed = tmp_path / f"{shard_format}-straight", tmp_path / f"{shard_format}-killed"
        shutil.rmtree(killed / ".work", ignore_errors=True)  # what the killed left there
        assert bytes_of(killed) == bytes_of(straight)
        assert verify(killed) == []


def test_the_order_in_which_shards_are_made_changes_no_byte(sample, shard_format, tmp_path, bytes_of):
    straight = sample.write(tmp_path / "a", shard_format)
    backwards = sample.write(tmp_path / "b", shard_format, order=[2, 1, 0])
    assert bytes_of(straight) == bytes_of(backwards)
    card = {"README.md"} if shard_format == "webdataset" else set()
    assert {"manifest.json", "skipped.jsonl", *card} <= bytes_of(straight).keys()
    assert len(bytes_of(straight)) == 8 + len(card)


def test_several_writers_of_the_same_shards_at_once_do_no_harm(sample, shard_format, tmp_path, bytes_of):
    straight = sample.write(tmp_path / "a", shard_format)
    again = sample.write(tmp_path / "b", shard_format)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda shard: sample.write_shard(again, shard_format, shard), (0, 1)))
    assert finish_store(again, sample.describe(shard_format), shards=3) is not None
    shutil.rmtree(again / ".work")
    assert bytes_of(straight) == bytes_of(again)


def test_the_record_says_what_is_in_the_shard_and_what_is_not(sample, shard_format, tmp_path):
    record = sample.write_shard(tmp_path, shard_format, 0)
    plain = json.loads((tmp_path / "train-00000.json").read_text())
    assert {"file", "samples", "bytes", "sha256", "keys", "sums"} <= set(plain)
    assert plain["keys"] == sample.keys[:7] and plain["skipped"] == [{"key": "bad 0", "reason": 'not "an" image'}]
    assert plain["bytes"] == (tmp_path / plain["file"]).stat().st_size
    assert read_record(tmp_path, "train", 0, plan="a plan") == record


def test_no_manifest_while_a_shard_is_missing_and_the_same_one_ever_after(sample, shard_format, tmp_path):
    description = sample.describe(shard_format)
    assert missing_shards(tmp_path / "none", "train", 3) == [0, 1, 2]
    for shard in (2, 0):
        sample.write_shard(tmp_path, shard_format, shard)
    assert missing_shards(tmp_path, "train", 3) == [1]
    assert finish_store(tmp_path, description, shards=3) is None and not (tmp_path / "manifest.json").exists()
    sample.write_shard(tmp_path, shard_format, 1)
    first = finish_store(tmp_path, description, shards=3)
    written = (tmp_path / "manifest.json").read_bytes()
    second = finish_store(tmp_path, description, shards=3)
    assert dict(first) | {"checksum": None} == dict(second) | {"checksum": None}
    assert (tmp_path / "manifest.json").read_bytes() == written == second.to_bytes()
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert lines == [{"key": f"bad {shard}", "reason": 'not "an" image'} for shard in (0, 2)]


def test_a_shard_without_its_record_or_a_record_without_its_shard_is_not_there(sample, shard_format, own_store):
    shard = own_store / sample.write_shard(own_store, shard_format, 0).file
    shard.write_bytes(shard.read_bytes()[:-1])
    assert read_record(own_store, "train", 0) is None
    shard.unlink()
    assert read_record(own_store, "train", 0) is None
    (own_store / "train-00002.json").unlink()
    assert read_record(own_store, "train", 2) is None
    (own_store / "manifest.json").unlink()
    assert finish_store(own_store, sample.describe(shard_format), shards=3) is None


def test_shards_of_another_plan_are_refused(sample, shard_format, own_store):
    with pytest.raises(UserError, match=r"train-00001\.json belongs to .* other settings.*--overwrite"):
        read_record(own_store, "train", 1, plan="another plan")
    with pytest.raises(UserError, match="finished store of other settings"):
        finish_store(own_store, sample.describe(shard_format, plan="another plan"), shards=3)
    (own_store / "manifest.json").unlink()
    with pytest.raises(UserError, match="other settings"):
        finish_store(own_store, sample.describe(shard_format, plan="another plan"), shards=3)


def test_a_damaged_record_is_refused_by_name(own_store):
    path = own_store / "train-00000.json"
    path.write_text(path.read_text().replace("class", "klass", 1))
    with pytest.raises(UserError, match=r"train-00000\.json was changed after it was written"):
        read_record(own_store, "train", 0)
    path.write_text('{"file": "x"}')
    with pytest.raises(UserError, match=r"train-00000\.json is no commit record"):
        read_record(own_store, "train", 0)


def test_latents_that_do_not_fit_the_dtype_are_found_and_never_stored(sample, tmp_path):
    latents = torch.zeros(4, 1, 2, 2, 2)
    latents[1, 0, 0, 0, 0], latents[3, 0, 1, 1, 1] = 70000.0, float("nan")
    assert unstorable_rows(latents, "float16").tolist() == [1, 3]
    assert unstorable_rows(latents, "bfloat16").tolist() == [3]
    with pytest.raises(UserError, match=r"2 inputs are not finite in float16 \(b, d\).*--store-dtype"):
        write_shard(tmp_path, "train", 0, "safetensors", latents.half(), [0] * 4, range(4), list("abcd"))
    assert [path.name for path in tmp_path.iterdir() if path.name != ".work"] == []


def test_a_store_in_which_everything_was_skipped_is_not_finished(tmp_path, new_sample):
    sample = new_sample(rows=(0, 0))
    with pytest.raises(UserError, match="not one input"):
        sample.write(tmp_path, "safetensors")
    assert not (tmp_path / "manifest.json").exists()


def test_a_full_disk_gives_one_sentence_and_leaves_nothing_under_a_final_name(
    sample, shard_format, tmp_path, monkeypatch
):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        sample.write_shard(tmp_path, shard_format, 0)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    assert sample.write_shard(tmp_path, shard_format, 0).samples == 7


def test_a_split_that_would_leave_the_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--split '\.\./x' cannot begin a file's name"):
        write_shard(tmp_path, "../x", 0, "safetensors", torch.zeros(0, 1, 2, 1, 1).half(), [], [], [])


def test_more_shards_than_five_digits_count_on(sample, tmp_path):
    write_shard(tmp_path, "val", 123456, "webdataset", torch.zeros(1, 1, 2, 1, 1).half(), [-1], [0], ["x"])
    assert (tmp_path / "val-123456.tar").exists() and (tmp_path / "val-123456.json").exists()
    assert read_record(tmp_path, "val", 123456).samples == 1


def test_a_store_of_one_sample_is_a_store(new_sample, shard_format, tmp_path):
    store = LatentStore(new_sample(rows=(1,)).write(tmp_path, shard_format))
    assert len(store) == 1 and store[0][0].shape == (2, 8, 4, 4)


def test_a_shard_its_record_and_the_manifest_are_flushed_before_they_get_their_names(
    sample, shard_format, tmp_path, monkeypatch
):
    """What a power cut may keep of the order in which a process did things: each file, its name, then what rests on it."""
    order, honest = [], (os.fsync, Path.replace)

    def name_of(path):
        return re.sub(r"\.\d+\.partial$", "", path.name)

    def fsync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        order.append(("folder", "") if path.is_dir() else ("flush", name_of(path)))
        honest[0](descriptor)

    def replace(path, target):
        assert path.stat().st_size == len(path.read_bytes()) > 0 or path.name.startswith("skipped")
        order.append(("name", Path(target).name))
        return honest[1](path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    sample.write(tmp_path / "store", shard_format, order=[2, 0, 1])
    suffix = {"safetensors": ".safetensors", "webdataset": ".tar"}[shard_format]
    names = [f"train-0000{n}{kind}" for n in (2, 0, 1) for kind in (suffix, ".json")]
    names += ["skipped.jsonl", *(["README.md"] if shard_format == "webdataset" else []), "manifest.json"]
    assert order == [step for name in names for step in (("flush", name), ("name", name), ("folder", ""))]


@pytest.mark.parametrize("split", ["train", "no", "val-256"])
def test_datasets_reads_the_samples_of_a_store_of_tars_and_not_its_records(new_sample, tmp_path, split):
    """By the card: without it the commit records are taken for the data."""
    import datasets

    sample, folder = new_sample(rows=(3, 4)), tmp_path / "store"
    for shard in range(2):
        rows = sample.part(shard)
        write_shard(
            folder,
            split,
            shard,
            "webdataset",
            sample.shards[shard],
            sample.labels[rows],
            sample.indices[rows],
            sample.keys[rows],
        )
    finish_store(folder, sample.describe("webdataset", split=split, plan=""), shards=2)
    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(found) == [split.replace("-", "_")]
    rows = found[split.replace("-", "_")].with_format("numpy")[:]
    assert rows["cls"].tolist() == sample.labels.tolist()
    assert np.array_equal(np.stack(list(rows["moments.npy"])), sample.latents.numpy())
    assert [int(key) for key in rows["__key__"]] == sample.indices.tolist()
