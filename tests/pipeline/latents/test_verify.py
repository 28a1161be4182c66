"""Verification: one flipped bit anywhere is found, and named as closely as can be."""

import json
import shutil

import numpy as np
import pytest

from pipeline.latents import LatentStore
from pipeline.latents.manifest import is_intact, read_manifest, sealed
from pipeline.latents.names import format_of
from pipeline.latents.shards import ShardFile, row_type
from pipeline.latents.verify import verify
from pipeline.runtime.errors import UserError


def flip(path, byte, bit=0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def layout_of(folder, number=0):
    manifest = read_manifest(folder)
    shard = manifest.shards[number]
    file = ShardFile(folder / shard.file, size=shard.bytes)
    layout = format_of(manifest.shard_format).read_layout(file, shard.samples, row_type(manifest.latent, 2))
    return file.path, layout


def test_a_whole_store_has_no_faults(whole_store):
    assert verify(whole_store) == [] and verify(str(whole_store)) == []
    LatentStore(whole_store).verify()


@pytest.mark.parametrize("region", ["latents", "labels", "indices"])
def test_a_flipped_bit_in_a_sample_is_named_with_shard_row_and_key(own_store, sample, region):
    path, layout = layout_of(own_store)
    column = getattr(layout, region)
    text = path.suffix == ".tar" and region != "latents"
    for row in range(7):
        byte = column.start + row * column.stride + (0 if text else column.bytes // 2)
        flip(path, byte)
        (fault,) = verify(own_store)
        assert path.name in fault
        # a tar's index is the name in its header: the first's and last's are looked at before any sample
        assert f"row {row} ({sample.keys[row]}) is damaged" in fault or (text and f"row {row}, has a header" in fault)
        flip(path, byte)
    assert verify(own_store) == []


def test_a_flipped_bit_in_a_header_or_between_samples_is_named_with_the_shard(own_store):
    path, layout = layout_of(own_store)
    size = path.stat().st_size
    # a tar: checksum field of the first and a middle member, padding, the end; safetensors: length, names, offsets
    places = [150, 5 * 512 + 150, size - 1] if path.suffix == ".tar" else [0, 12, 40, layout.indices.start - 2]
    for byte in places:
        flip(path, byte, 2)
        (fault,) = verify(own_store)
        assert path.name in fault and "SHA-256" in fault
        flip(path, byte, 2)


def test_every_byte_of_manifest_and_records_is_guarded(whole_store):
    """Tested on the bytes alone: any flip is refused as JSON or noticed by the checksum."""
    for name in ("manifest.json", "train-00001.json"):
        data = (whole_store / name).read_bytes()
        assert is_intact(data)
        for byte in range(len(data)):
            for bit in (byte % 8, (byte + 5) % 8):
                flipped = bytearray(data)
                flipped[byte] ^= 1 << bit
                assert not is_intact(bytes(flipped)), (name, byte, bit)


def test_a_flipped_bit_in_a_record_the_manifest_or_the_list_of_skipped_is_named(own_store):
    for name in ("train-00000.json", "train-00002.json", "manifest.json", "skipped.jsonl"):
        data = (own_store / name).read_bytes()
        for byte in np.linspace(1, len(data) - 2, 9).astype(int).tolist():
            flip(own_store / name, byte, byte % 7)
            try:
                faults = verify(own_store)
            except UserError as error:
                faults = [str(error)]
            assert any(name in fault for fault in faults), (name, byte)
            (own_store / name).write_bytes(data)


def test_all_damaged_shards_are_named_at_once(own_store):
    paths = [layout_of(own_store, number)[0] for number in (0, 2)]
    flip(paths[0], 700)
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    (own_store / "train-00001.json").unlink()
    faults = verify(own_store)
    assert len(faults) == 3
    assert paths[0].name in faults[0] and "train-00001.json is missing" in faults[1]
    assert paths[1].name in faults[2] and "cut off" in faults[2]
    with pytest.raises(UserError, match=rf"{paths[1].name} is cut off"):
        LatentStore(own_store)
    shutil.copy(own_store / "train-00000.json", own_store / "train-00002.json")
    assert any("train-00002.json" in fault and "disagree" in fault for fault in verify(own_store))


def test_an_open_store_verifies_itself_and_raises(own_store):
    store = LatentStore(own_store)
    path, layout = layout_of(own_store)
    flip(path, layout.latents.start)
    with pytest.raises(UserError, match=rf"is damaged: .*{path.name}.*row 0"):
        store.verify()


def test_statistics_that_are_not_those_of_the_records_are_noticed(own_store):
    values = json.loads((own_store / "manifest.json").read_text())
    values["statistics"]["mean"][0] += 1e-3
    (own_store / "manifest.json").write_bytes(sealed(values))
    (fault,) = verify(own_store)
    assert "the statistics are not those of the records" in fault


def test_a_store_by_another_program_without_checksums_of_its_own_is_verified_by_its_hashes(own_store):
    for path in own_store.glob("*.json"):
        values = json.loads(path.read_text())
        for key in ("checksum", "crc32", "plan", "skipped") if path.name != "manifest.json" else ("checksum", "plan"):
            values.pop(key)
        path.write_text(json.dumps(values))
    (own_store / "skipped.jsonl").write_text("")
    assert verify(own_store) == []
    path, layout = layout_of(own_store)
    flip(path, layout.latents.start)
    (fault,) = verify(own_store)
    assert fault.endswith("has not the SHA-256 of the manifest")
