"""Both shard formats: plain libraries read them, and their bytes never change."""

import gc
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from safetensors import safe_open

from pipeline.latents import LatentStore
from pipeline.latents.names import recorded_shards
from pipeline.runtime.errors import UserError

WEBDATASET_LEAVES_FILES_OPEN = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def read_safetensors(folder, tensor):
    parts = {tensor: [], "label": [], "index": []}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            assert set(shard.keys()) == set(parts)
            for name, values in parts.items():
                values.append(shard.get_tensor(name))
    return {name: torch.cat(values) for name, values in parts.items()}


def read_webdataset(folder, tensor):
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    rows = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    gc.collect()  # webdataset leaves its files to the collector, which warns: let it be here
    return [row["__key__"] for row in rows], [row[f"{tensor}.npy"] for row in rows], [row["cls"] for row in rows]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["moments", "point"])
def test_plain_safetensors_reads_every_row_equal(new_sample, kind, dtype, tmp_path):
    sample = new_sample(kind, dtype)
    tensor = "moments" if kind == "moments" else "latent"
    found = read_safetensors(sample.write(tmp_path / "store", "safetensors"), tensor)
    assert found[tensor].dtype == sample.latents.dtype
    assert torch.equal(found[tensor], sample.latents)
    assert found["label"].dtype == found["index"].dtype == torch.int64
    assert found["label"].tolist() == sample.labels.tolist() and found["index"].tolist() == sample.indices.tolist()


@WEBDATASET_LEAVES_FILES_OPEN
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["moments", "point"])
def test_plain_webdataset_reads_every_row_equal(new_sample, kind, dtype, tmp_path):
    sample = new_sample(kind, dtype)
    tensor = "moments" if kind == "moments" else "latent"
    keys, arrays, labels = read_webdataset(sample.write(tmp_path / "store", "webdataset"), tensor)
    assert keys == [f"{index:010d}" for index in sample.indices]
    assert labels == sample.labels.tolist()
    assert np.array_equal(np.stack(arrays), sample.latents.numpy()) and arrays[0].dtype == sample.latents.numpy().dtype


@WEBDATASET_LEAVES_FILES_OPEN
def test_bfloat16_in_a_tar_is_read_by_numpy_as_two_bytes_and_by_a_view_as_bfloat16(new_sample, tmp_path):
    sample = new_sample(dtype="bfloat16")
    _, arrays, _ = read_webdataset(sample.write(tmp_path / "store", "webdataset"), "moments")
    values = torch.from_numpy(np.stack(arrays).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(values, sample.latents)


def test_every_sample_of_a_tar_takes_the_same_bytes_without_extra_headers(new_sample, tmp_path):
    sample = new_sample(rows=(40,))
    sample.labels[:] = [-1, 0, 7, 123, 99999] * 8
    folder = sample.write(tmp_path / "store", "webdataset")
    with tarfile.open(folder / "train-00000.tar") as tar:
        members = tar.getmembers()
    assert [member.offset for member in members[::2]] == [i * members[2].offset for i in range(40)]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.pax_headers != {}) for m in members} == {
        (0, 0, 0, "", "", 0o644, False)
    }
    assert members[2].offset == 5 * 512  # two headers, the label, the array of 128 + 512 bytes, padded


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["moments", "point"])
def test_both_formats_hold_the_same(new_sample, kind, dtype, tmp_path):
    sample = new_sample(kind, dtype)
    stores = [LatentStore(sample.write(tmp_path / name, name)) for name in ("safetensors", "webdataset")]
    for store in stores:
        latents, labels = store[:]
        assert latents.dtype == sample.latents.dtype and torch.equal(latents, sample.latents)
        assert labels.tolist() == store.labels().tolist() == sample.labels.tolist()
        assert store.indices().tolist() == sample.indices.tolist()
    same = ("samples", "skipped", "statistics", "latent", "classes", "views", "vae")
    assert all(stores[0].manifest[key] == stores[1].manifest[key] for key in same)


def test_safetensors_shards_take_at_most_3_percent_more_than_their_samples(new_sample, tmp_path):
    sample = new_sample(rows=(64,))
    folder = sample.write(tmp_path / "store", "safetensors")
    record = sample.latents[0].nbytes + 16  # label and index
    assert 64 * record < (folder / "train-00000.safetensors").stat().st_size < 64 * record * 1.03
    assert not (folder / ".work").exists()


def test_a_slice_of_a_large_tensor_is_written_without_the_rest(new_sample, tmp_path):
    sample = new_sample(rows=(2,))
    sample.shards[0] = torch.zeros(1000, *sample.latents.shape[1:]).half()[5:7]
    folder = sample.write(tmp_path / "store", "safetensors")
    assert (folder / "train-00000.safetensors").stat().st_size < 4096


GOLDEN = {
    ("moments", "float16", "safetensors"): "5b68cd55c150507b7840134c7c69c5714bcb80af3d6fd6ce050e7aadaff1c634",
    ("moments", "float16", "webdataset"): "6b4dca1122109b8749c652db29be2b3f8ecfa7d4be89e0bed0bf0f28cb5e13f6",
    ("point", "bfloat16", "safetensors"): "f96187fd40f241c6d976c01a23bbeaf4da7e30704965e5d6a94ad05ec3ecd7bd",
    ("point", "bfloat16", "webdataset"): "ba2ec7ee6e7364d8b2344f8b2941a82bd7093dddaee7a7a024a294f76a64ca59",
}


@pytest.mark.parametrize(("kind", "dtype", "shard_format"), GOLDEN)
def test_the_bytes_of_version_1_never_change(new_sample, kind, dtype, shard_format, tmp_path):
    sample = new_sample(kind, dtype)
    sample.shards = [  # multiples of 1/8: the same in every dtype, on every machine
        ((torch.arange(shard.numel()) % 61 - 30).reshape(shard.shape) / 8).to(shard.dtype) for shard in sample.shards
    ]
    folder = sample.write(tmp_path / "store", shard_format)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json" and path.suffix == ".json":  # sums of exponentials may differ in the last bit
            record = json.loads(path.read_text())
            del record["sums"], record["checksum"]
            digest.update(json.dumps(record).encode())
        elif path.name not in {"manifest.json", "README.md"}:  # for other programs; no reader of ours takes it
            digest.update(path.name.encode() + path.read_bytes())
    assert digest.hexdigest() == GOLDEN[kind, dtype, shard_format]


ODD_ROWS = {
    "another key's array": ("0000000001", {"array": "0000000002.moments.npy"}, "instead of KEY.cls"),
    "a key too short": ("000000001", {}, "instead of KEY.cls"),
    "a key that is no number": ("00000000-1", {}, "instead of KEY.cls"),
    "an array too long": ("0000000001", {"tail": b"0000"}, "holds members of"),
    "a label too long": ("0000000001", {"label": b"1" * 21}, "holds members of"),
    "another shape": ("0000000001", {"shape": (2, 4, 8, 4)}, "holds an array"),
    "another order": ("0000000001", {"fortran": True}, "holds an array"),
    "another type": ("0000000001", {"dtype": "<i2"}, "holds an array"),
}


@pytest.mark.parametrize("odd", ODD_ROWS)
@pytest.mark.parametrize("at", [0, -1])
def test_a_tar_whose_first_or_last_row_is_not_what_it_should_be_is_refused(new_sample, tmp_path, odd, at):
    store = new_sample().write(tmp_path / "store", "webdataset")
    path = store / "train-00000.tar"
    key, change, sentence = ODD_ROWS[odd]
    with tarfile.open(path) as tar:
        names = tar.getnames()
        members = [(name, tar.extractfile(name).read()) for name in names]
    at = 0 if at == 0 else len(members) - 2
    label, array = members[at][1], members[at + 1][1]
    values = np.lib.format.read_array(io.BytesIO(array))
    if "shape" in change or "fortran" in change or "dtype" in change:
        values = values.reshape(change.get("shape", values.shape)).view(change.get("dtype", values.dtype))
        file = io.BytesIO()
        np.save(file, np.asfortranarray(values) if "fortran" in change else values)
        array = file.getvalue()
    members[at] = (f"{key}.cls", change.get("label", label))
    members[at + 1] = (change.get("array", f"{key}.moments.npy"), array + change.get("tail", b""))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match=rf"train-00000.tar, row {at // 2}, .*{sentence}"):
        LatentStore(store)[0]


def test_a_shard_is_done_by_the_record_of_its_own_split_alone():
    names = ["train-00000.json", "train-00001.safetensors", "train-more-00002.json", "train-notes", "val-00003.json"]
    assert recorded_shards(names, "train") == {0}
    assert recorded_shards(names, "train-more") == {2}
