"""Folders, archives and labels of images of a stranger: nothing hangs, takes memory or ends in a traceback."""

import json
import os
import struct
import tarfile
import time
import zipfile

import numpy as np
import pytest

from extract.options import SourceOptions
from extract.sources.folders import FolderSource, looks_like_image
from extract.sources.imagenet import kaggle_labels, labels_from_files
from extract.sources.labels import numbered_labels
from extract.sources.listing import UnreadableInputError, _load, cached_listing
from extract.sources.selection import open_source
from pipeline.image_repair import mended
from pipeline.runtime.errors import UserError

pytestmark = pytest.mark.timeout(20)
PNG = b"\x89PNG\r\n\x1a\n"


def source_of(path, tmp_path, **options):
    return open_source(SourceOptions(data=str(path), **options), tmp_path / "copies")


# --- labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [19, 200, 4000, 4300, 4301, 100_000])
@pytest.mark.parametrize("kind", ["text", "tar .cls", "tar .json", "dataset.json", "zip"])
def test_a_label_of_thousands_of_digits_is_one_short_sentence(kind, digits, tmp_path):
    number, path = "9" * digits, tmp_path / "data"
    about = json.dumps({"labels": [["a.png", "LABEL"], ["b.png", 1]]}).replace('"LABEL"', number)
    if kind == "text":
        with pytest.raises(UserError) as refused:
            numbered_labels([number, "1"])
    else:
        if kind.startswith("tar"):
            path, suffix = tmp_path / "x.tar", kind.removeprefix("tar .")
            write_tar(path, {"a.png": PNG, f"a.{suffix}": number if suffix == "cls" else f'{{"label": "{number}"}}'})
        elif kind == "zip":
            path = tmp_path / "x.zip"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("a.png", PNG), archive.writestr("b.png", PNG), archive.writestr("dataset.json", about)
        else:
            path.mkdir()
            (path / "a.png").write_bytes(PNG), (path / "b.png").write_bytes(PNG)
            (path / "dataset.json").write_text(about)
        with pytest.raises(UserError) as refused:
            source_of(path, tmp_path).inputs()
    said = str(refused.value)
    assert len(said) < 400 + len(str(path)) and said.isprintable()
    assert "far more classes" in said or "is not valid JSON" in said


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            (path.parent / "member").write_bytes(data.encode() if isinstance(data, str) else data)
            archive.add(path.parent / "member", name)


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["0" * 5000 + "1", "0" * 9000, "-0"], [1, 0, 0]),
        (["-" + "9" * 5000, "1", "-1"], [-1, 1, -1]),
        (["3." + "0" * 9000, "2", None], [3, 2, -1]),
    ],
)
def test_zeros_and_negative_numbers_of_any_length_are_what_short_ones_are(texts, labels):
    assert numbered_labels(texts).values == labels


@pytest.mark.parametrize(
    "text", ["[" + "1" * 60 + "x]", "[" + "1 " * 60 + "x]", "1," * 50_000 + "x", "[" + " " * 10**5]
)
def test_a_class_that_is_almost_a_list_takes_no_time(text):
    began = time.process_time()
    assert numbered_labels([text, "cat"]).class_ids == tuple(sorted([text.strip(), "cat"]))
    assert time.process_time() - began < 2


@pytest.mark.parametrize("line", ["9" * 5000, "\u00b2", "-1", "9" * 12])
def test_a_ground_truth_of_no_known_ids_is_one_sentence(line, tmp_path, monkeypatch):
    monkeypatch.setattr("extract.sources.imagenet._synsets_of_ids", lambda _path: {1: "n01440764"})
    (tmp_path / "meta.mat").write_bytes(b"")
    (tmp_path / "truth.txt").write_text(f"1\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"truth.txt names class '.*, which the development kit's meta.mat does not"):
        labels_from_files(tmp_path / "truth.txt", tmp_path)


@pytest.mark.parametrize("kind", [b"MATLAB 5.0 MAT-file", b"MATLAB 7.3 MAT-file"])
def test_a_meta_mat_that_cannot_be_read_is_one_sentence(kind, tmp_path):
    version = b"\0\1IM" if b"5.0" in kind else b"\0\2IM"
    (tmp_path / "meta.mat").write_bytes(kind.ljust(124) + version + b"\x0f\0\0\0\xff\xff\xff\x7f" + bytes(100))
    (tmp_path / "truth.txt").write_text("1\n")
    with pytest.raises(UserError, match=r"meta.mat is not the meta.mat of ImageNet's development kit \("):
        labels_from_files(tmp_path / "truth.txt", tmp_path)


def test_a_solution_with_a_field_longer_than_a_csv_may_have_is_one_sentence(tmp_path):
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nx," + "n" * 200_000)
    with pytest.raises(UserError, match="is not Kaggle's solution file"):
        kaggle_labels(tmp_path)


# --- sizes -------------------------------------------------------------------------------------------------------


def write_sparse_tar(path):
    """A tar of a few bytes on the disk, with a sound image and one of 34 GB that is a hole."""
    large = tarfile.TarInfo("b.png")
    large.size = 1 << 35
    small = tarfile.TarInfo("a.png")
    with path.open("wb") as file:
        file.write(small.tobuf() + large.tobuf(tarfile.GNU_FORMAT))
        file.seek(large.size, os.SEEK_CUR)
        file.write(bytes(1024))
    return path


def test_a_member_of_a_tar_that_is_larger_than_an_image_is_left_out_unread(tmp_path):
    source = source_of(write_sparse_tar(tmp_path / "x.tar"), tmp_path)
    listing = source.inputs()
    with pytest.raises(UnreadableInputError, match="34,359,738,368 bytes in its tar, more than any image here may"):
        source.read(listing, 1)


def test_a_file_of_chunks_or_bytes_of_nothing_takes_no_time_to_give_up():
    began = time.process_time()
    assert mended(PNG + bytes(1 << 23)) is None
    sequential = b"\xff\xd8\xff\xc0\0\x08" + bytes(6) + b"\xff\xda\0\x08\x01\1\0\0\x3f\0"
    assert mended(sequential + bytes(1 << 22)) is mended(sequential + b"\xff\0" * (1 << 21)) is None
    assert time.process_time() - began < 1.5


def write_zip(path, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("a.png", PNG)
        archive.writestr("dataset.json", json.dumps({"labels": [["a.png", 1]]}) + " " * 5000)
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_dataset_json_that_is_damaged_in_its_zip_is_one_sentence(kind, tmp_path):
    data = write_zip(tmp_path / "x.zip", kind)
    begin = data.index(b"dataset.json") + len(b"dataset.json")
    for at in range(begin, begin + 60, 4):
        (tmp_path / "x.zip").write_bytes(data[:at] + b"\xff" * 8 + data[at + 8 :])
        with pytest.raises(UserError, match=r"x.zip cannot be (read as a zip \(|read \()"):
            source_of(tmp_path / "x.zip", tmp_path).inputs()


@pytest.mark.parametrize("place", [1 << 30, (1 << 63) - 1, (1 << 63) + 5, (1 << 64) - 1])
@pytest.mark.parametrize("field", ["its size", "its place"])
def test_a_member_outside_of_its_zip_is_one_sentence(field, place, tmp_path):
    data = write_zip(tmp_path / "x.zip")
    entry, end = data.index(b"PK\1\2"), data.rindex(b"PK\5\6")
    extra = struct.pack("<HHQ", 1, 8, place)  # as zips of more than 4 GB have it, for the field that is all ones
    struct.pack_into("<I", data, entry + (20 if field == "its size" else 42), 0xFFFFFFFF)
    struct.pack_into("<H", data, entry + 30, len(extra))
    struct.pack_into("<I", data, end + 12, int.from_bytes(data[end + 12 : end + 16], "little") + len(extra))
    at = entry + 46 + len("a.png")
    (tmp_path / "x.zip").write_bytes(data[:at] + extra + data[at:])
    with pytest.raises(UserError, match=r"x.zip cannot be read as a zip \('a.png' lies outside of it\)"):
        source_of(tmp_path / "x.zip", tmp_path).inputs()


# --- no files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leads_to", ["pipe", "/dev/zero", "folder", "nowhere", "x.png"])
def test_what_is_no_file_does_not_look_like_an_image_and_is_never_opened(leads_to, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.png").symlink_to(leads_to)
    assert not looks_like_image(tmp_path / "x.png") and not looks_like_image(tmp_path / leads_to)
    (tmp_path / "y.png").write_bytes(PNG)
    assert looks_like_image(tmp_path / "y.png")


def test_a_pipe_that_comes_in_place_of_a_listed_file_is_a_bad_input(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.png").write_bytes(PNG)
    source = FolderSource(root=tmp_path / "d")
    listing = source.inputs()
    (tmp_path / "d" / "x.png").unlink()
    os.mkfifo(tmp_path / "d" / "x.png")
    with pytest.raises(UnreadableInputError, match="a pipe or a device, where a file was when the data was listed"):
        source.read(listing, 0)


def test_a_file_of_the_kernel_that_claims_no_bytes_is_not_read_to_an_end_that_may_never_come(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.png").symlink_to("/proc/self/status")
    source = FolderSource(root=tmp_path / "d")
    assert source.read(source.inputs(), 0) == b""


def test_names_that_are_no_unicode_are_read_in_archives_too(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.tar")
    write_tar(path, {"a.png": PNG, "a.cls": "0"})
    source = source_of(path, tmp_path)
    assert source.settings["tars"] and source.read(source.inputs(), 0) == PNG
    write_tar(path, {os.fsdecode(b"\xfe/a.png"): PNG, "ant/b.png": PNG})
    assert source_of(path, tmp_path).inputs().class_ids == ("ant", r"\xfe"), "as a class folder is called"


def test_a_class_that_is_half_a_character_is_one_sentence():
    with pytest.raises(UserError, match=r"a label in the data is no text \('\\ud800'\)"):
        numbered_labels([json.loads('"\\ud800"'), "cat"])


# --- the cache of a listing --------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path):
    (tmp_path / "d" / "ant").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "d" / "ant" / f"{number}.png").write_bytes(PNG)
    source, cache = source_of(tmp_path / "d", tmp_path), tmp_path / "listing.npz"
    listing = cached_listing(source, cache)
    assert _load(cache, source.identity).keys == listing.keys
    return source, cache, listing


def with_arrays(cache, **changed):
    """The cache with some of its arrays, or keys of its header, made others."""
    with np.load(cache) as arrays:
        held = dict(arrays)
    header = json.loads(held["header"].tobytes())
    for name in changed.keys() & header.keys():
        header[name] = changed.pop(name)
    held["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(cache, **held | changed)


def text(content):
    return np.frombuffer(content, np.uint8)


DAMAGE = {
    "no bytes": lambda cache: cache.write_bytes(b""),
    "cut off": lambda cache: cache.write_bytes(cache.read_bytes()[:-200]),
    "an array alone": lambda cache: (np.save(cache.with_suffix(".npy"), 0), cache.with_suffix(".npy").replace(cache)),
    "another zip": lambda cache: np.savez(cache, x=0),
    "a pipe": lambda cache: (cache.unlink(), os.mkfifo(cache)),
    "a folder": lambda cache: (cache.unlink(), cache.mkdir()),
    "a device": lambda cache: (cache.unlink(), cache.symlink_to("/dev/zero")),
    "no JSON": lambda cache: with_arrays(cache, header=text(b"{")),
    "no object": lambda cache: with_arrays(cache, header=text(b"[1]")),
    "deep JSON": lambda cache: with_arrays(cache, header=text(b"[" * 10**5)),
    "many digits": lambda cache: with_arrays(cache, header=text(b"9" * 10**4)),
    "no number": lambda cache: with_arrays(cache, version="3"),
    "no list of classes": lambda cache: with_arrays(cache, class_ids=7),
    "no text as a class": lambda cache: with_arrays(cache, class_ids=[7]),
    "no stamps": lambda cache: with_arrays(cache, stamps=[["a"]]),
    "a stamp of another type": lambda cache: with_arrays(cache, stamps=[[None, "1", 2]]),
    "a stamp of a name that no file has": lambda cache: with_arrays(cache, stamps=[["\0", 1, 2]]),
    "fewer labels": lambda cache: with_arrays(cache, labels=np.zeros(2, np.int64)),
    "labels of no class": lambda cache: with_arrays(cache, labels=np.full(3, 1)),
    "labels below -1": lambda cache: with_arrays(cache, labels=np.full(3, -2)),
    "labels that are no numbers": lambda cache: with_arrays(cache, labels=np.asarray(["a", "b", "c"])),
    "labels of another shape": lambda cache: with_arrays(cache, labels=np.zeros((3, 1), np.int64)),
    "fewer places": lambda cache: with_arrays(cache, places=np.zeros((2, 3), np.int64)),
    "places in no container": lambda cache: with_arrays(cache, places=np.ones((3, 3), np.int64)),
    "places of one number": lambda cache: with_arrays(cache, places=np.asarray(7)),
    "fewer keys": lambda cache: with_arrays(cache, keys=text(b"ant/0.png\0")),
    "keys that lead out": lambda cache: with_arrays(cache, keys=text(b"ant/0.png\0../x\0ant/1.png\0")),
    "keys that lead out later": lambda cache: with_arrays(cache, keys=text(b"ant/0.png\0a/../../x\0ant/1.png\0")),
    "keys from the root": lambda cache: with_arrays(cache, keys=text(b"/etc/passwd\0ant/0.png\0ant/1.png\0")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_of_a_listing_is_no_reason_to_stop(damage, listed):
    source, cache, listing = listed
    DAMAGE[damage](cache)
    assert _load(cache, source.identity) is None
    if damage not in {"a folder", "a device"}:
        assert cached_listing(source, cache).keys == listing.keys


def test_bytes_of_a_cache_changed_at_random_are_no_reason_to_stop(listed):
    source, cache, _ = listed
    data, draw = cache.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        changed = bytearray(data)
        for place in draw.integers(len(data), size=draw.integers(1, 5)):
            changed[place] = draw.integers(256)
        cache.write_bytes(changed)
        found = _load(cache, source.identity)
        assert found is None or len(found.labels) == len(found.keys)


def test_an_array_in_a_cache_that_claims_more_than_its_bytes_is_passed_over(listed):
    source, cache, _ = listed
    with zipfile.ZipFile(cache) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["labels.npy"] = members["labels.npy"].replace(b"(3,)", b"(" + b"9" * 13 + b",)").replace(b" " * 12, b"", 1)
    with zipfile.ZipFile(cache, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert _load(cache, source.identity) is None
