"""Labels that a stranger's JSON tells, a `dataset.json` or one .json a sample: through the gate, from real archives."""

import io
import json
import os
import struct
import tarfile
import zipfile

import pytest
from PIL import Image

from extract.options import SourceOptions
from extract.sources.selection import open_source
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import MOST_BYTES

pytestmark = pytest.mark.timeout(20)
NAMES = ["00000/0.png", "00001/1.png"]
PLACES = ["folder", "zip", "deflated zip", "tar"]
JSON_LIMIT = 1 << 22  # of a sample's


def picture():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def write_folder(path, files, longer):
    for name, data in files.items():
        place = path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        if name.endswith(".json") and longer:
            os.truncate(place, longer)
    return path


def write_zip(path, files, longer, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path := path.with_suffix(".zip"), "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    if longer:  # what the directory at the end claims of its last member
        data = bytearray(path.read_bytes())
        struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, longer)
        path.write_bytes(data)
    return path


def write_tar(path, files, longer):
    with (path := path.with_suffix(".tar")).open("wb") as file:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = longer if name.endswith(".json") and longer else len(data)
            file.write(member.tobuf())
            start = file.tell()
            file.write(data)
            file.seek(start + -(-member.size // 512) * 512)
        file.truncate(file.tell() + 20 * 512)
    return path


WRITE = {
    "folder": write_folder,
    "zip": write_zip,
    "deflated zip": lambda *given: write_zip(*given, zipfile.ZIP_DEFLATED),
    "tar": write_tar,
}


def listed(tmp_path, place, files, longer=0):
    path = WRITE[place](tmp_path / "d", dict.fromkeys(NAMES, picture()) | files, longer)
    return open_source(SourceOptions(data=str(path)), tmp_path / "remote").inputs()


BAD = {
    "deep": (b'{"labels": ' + b"[" * 100 + b"]" * 100 + b"}", "more than 64 deep"),
    "deeper than Python reads": (b"[" * 10**6, "nests too deeply"),
    "a long number": (b'{"labels": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    "cut off": (b'{"labels": [["a', "is not valid JSON"),
    "a list": (b"[]", "is no JSON object"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", BAD)
def test_a_dataset_json_out_of_bounds_is_one_sentence_with_the_way_on(tmp_path, place, kind):
    data, why = BAD[kind]
    with pytest.raises(UserError, match=rf"dataset.json .*{why}.*--ignore dataset.json"):
        listed(tmp_path, place, {"dataset.json": data})


@pytest.mark.parametrize("place", PLACES)
def test_a_dataset_json_larger_than_any_json_is_refused_before_it_is_read(tmp_path, place):
    with pytest.raises(UserError, match=r"dataset.json has more than the 268.* that such a file may have"):
        listed(tmp_path, place, {"dataset.json": b"{}"}, longer=MOST_BYTES + 1)


@pytest.mark.parametrize("leads_to", ["pipe", "/dev/zero"])
def test_a_dataset_json_that_is_no_file_is_no_part_of_the_data_and_never_opened(tmp_path, leads_to):
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "d" / "dataset.json").symlink_to(leads_to if leads_to.startswith("/") else tmp_path / leads_to)
    assert listed(tmp_path, "folder", {}).class_ids == ("00000", "00001"), "of the folders"


@pytest.mark.parametrize("place", PLACES)
def test_an_image_with_two_labels_in_a_dataset_json_is_told_and_twice_the_same_is_not(tmp_path, place):
    rows = [["00000/0.png", 1], ["00001/1.png", 0], ["./00000\\0.png", 1]]
    assert listed(tmp_path, place, {"dataset.json": json.dumps({"labels": rows}).encode()}).labels.tolist() == [1, 0]
    rows[-1][1] = 2
    with pytest.raises(UserError, match="gives '00000/0.png' two labels"):
        listed(tmp_path, place, {"dataset.json": json.dumps({"labels": rows}).encode()})


@pytest.mark.parametrize("kind", BAD)
def test_a_samples_json_out_of_bounds_is_one_sentence(tmp_path, kind):
    data, why = BAD[kind]
    members = {"00000/0.json": b'{"label": 1}', "00001/1.json": data}
    with pytest.raises(UserError, match=rf"00001/1.json in its tar .*{why}"):
        listed(tmp_path, "tar", members)


def test_a_samples_json_is_read_up_to_four_megabytes_and_refused_beyond_without_being_read(tmp_path):
    long = {"00000/0.json": b'{"label": 1}', "00001/1.json": json.dumps({"label": 0, "is": "x" * 2_000_000}).encode()}
    assert listed(tmp_path, "tar", long).labels.tolist() == [1, 0]
    with pytest.raises(UserError, match=r"1.json in its tar has more than the 4\.\d MB"):
        listed(tmp_path, "tar", {"00000/0.json": b'{"label": 1}', "00001/1.json": b" " * (JSON_LIMIT + 1)})
