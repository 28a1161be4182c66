"""dit-evaluate and buckets: results and references go there whole, and references and samples are read from there."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.runtime import remote_output
from pipeline.runtime.remote_copies import local_place
from sample.evaluate import features
from tests.sample.evaluate.test_publishing import images as write_images

pytestmark = pytest.mark.usefixtures("quick_urls")


@pytest.fixture
def images(tmp_path):
    return lambda name, seed, count=6: write_images(tmp_path / name, seed, count)


def test_a_result_goes_to_a_bucket_and_the_same_command_finds_it_there(s3, run, images, tmp_path):
    asked = ("--samples", images("a.npz", 0), "--metrics", "is")
    assert run(*asked, "--out", tmp_path / "r.json")[0] == 0
    status, table, said = run(*asked, "--out", f"{s3.url}/results/r.json")
    assert status == 0 and f"all of it is at {s3.url}/results/r.json" in said
    assert s3.names() == ["results/r.json"]
    made, local = json.loads(s3.read("results/r.json")), json.loads((tmp_path / "r.json").read_text())
    assert made.pop("options")["out"] == f"{s3.url}/results/r.json" and local.pop("options") and made == local
    again = run(*asked, "--out", f"{s3.url}/results/r.json")
    assert again[0] == 0 and again[1] == table and "there already, made from these very inputs" in again[2]
    status, _, said = run("--samples", images("b.npz", 1), "--metrics", "is", "--out", f"{s3.url}/results/r.json")
    assert status == 2 and f"--out {s3.url}/results/r.json is there already and holds another result" in said
    other = ("--samples", images("b.npz", 1), "--metrics", "is", "--out", f"{s3.url}/results/r.json", "--overwrite")
    assert run(*other)[0] == 0 and json.loads(s3.read("results/r.json"))["request"] != local["request"]
    assert run(*asked, "--out", f"{s3.url}/results/r.json")[0] == 2
    s3.files().rm_file(f"{s3.bucket}/results/r.json")
    assert run(*asked, "--out", f"{s3.url}/results/r.json")[0] == 0, "what is here of another answer keeps none away"
    assert list((tmp_path / "cache" / "outputs").rglob("*.json")) == []


def test_a_reference_in_a_bucket_has_the_bytes_of_a_local_one_and_is_read_by_its_url(s3, run, images, tmp_path):
    asked = ("--reference", images("a.npz", 0, count=8))
    assert run(*asked, "--make-reference", tmp_path / "ref.npz")[0] == 0
    order = []
    s3.before_answer = lambda method, path: order.append(path.rsplit("/", 1)[1]) if method == "PUT" else None
    assert run(*asked, "--make-reference", f"{s3.url}/ref.npz")[0] == 0
    s3.before_answer = None
    assert order == ["upload.json", "ref.npz", "ref.npz.json"] and s3.names() == ["ref.npz", "ref.npz.json"]
    assert s3.read("ref.npz") == (tmp_path / "ref.npz").read_bytes()
    status, _, said = run(*asked, "--make-reference", f"{s3.url}/ref.npz")
    assert status == 0 and "nothing to do" in said
    status, _, said = run("--samples", images("b.npz", 1), "--reference", f"{s3.url}/ref.npz", "--metrics", "kid")
    assert status == 2 and "--reference-features" in said, "it is read as the statistics that it is"


def test_images_in_a_bucket_are_judged_as_those_on_a_disk_and_copied_once(s3, run, images, tmp_path):
    here = [images("a.npz", 0), images("b.npz", 1)]
    for path in here:
        s3.files().put(str(path), f"{s3.bucket}/{path.name}")
    there = [f"{s3.url}/{path.name}" for path in here]
    tables = []
    for samples, reference in (here, there, there):
        s3.asked.clear()
        status, table, said = run("--samples", samples, "--reference", reference, "--metrics", "kid")
        assert status == 0, said
        tables.append(table)
    assert len(set(tables)) == 1
    assert ("GET", f"/{s3.bucket}/a.npz") not in s3.asked, "the second time there is a copy"


def test_samples_whose_json_is_of_a_newer_version_are_refused_in_a_bucket_as_on_a_disk(s3, run, images, tmp_path):
    path, reference = images("a.npz", 0), images("b.npz", 1)
    (tmp_path / "a.npz.json").write_text('{"format": "dit-samples", "version": 2}')
    for name in ("a.npz", "a.npz.json"):
        s3.files().put(str(tmp_path / name), f"{s3.bucket}/{name}")
    for samples in (path, f"{s3.url}/a.npz"):
        status, _, said = run("--samples", samples, "--reference", reference, "--metrics", "kid")
        assert status == 2 and f"{samples}.json is of version 2, but this program knows version 1; upgrade it" in said


def test_a_folder_of_images_in_a_bucket_is_judged_as_one_on_a_disk_and_what_was_replaced_is_fetched_anew(
    s3, run, images, tmp_path
):
    pixels = np.random.default_rng(0).integers(0, 256, size=(7, 8, 8, 3), dtype=np.uint8)
    asked = ("--reference", images("a.npz", 0), "--metrics", "kid")
    for number, image in enumerate(pixels[:6]):
        name = f"class {number % 2}/{number:06d}.png"
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "here" / name)
        s3.files().put_file(str(tmp_path / "here" / name), f"{s3.bucket}/there/{name}")
    tables = []
    for samples in (tmp_path / "here", f"{s3.url}/there/", f"{s3.url}/there"):
        s3.asked.clear()
        status, table, said = run("--samples", samples, *asked)
        assert status == 0, said
        tables.append(table)
    assert len(set(tables)) == 1
    assert not [path for method, path in s3.asked if method == "GET" and path.endswith(".png")], "there are copies"

    Image.fromarray(pixels[6]).save(tmp_path / "other.png")
    s3.files().put_file(str(tmp_path / "other.png"), f"{s3.bucket}/there/class 1/000005.png")
    local_place.cache_clear()  # as in another process
    assert run("--samples", f"{s3.url}/there", *asked)[1] != tables[0]
    status, _, said = run("--samples", f"{s3.url}/nothing", *asked)
    assert status == 2 and "nothing" in said and "Traceback" not in said


def test_a_folder_of_copies_is_completed_after_a_full_disk_and_made_where_there_are_no_links(
    s3, run, images, tmp_path, monkeypatch
):
    pixels = np.random.default_rng(0).integers(0, 256, size=(6, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "one.png")
        s3.files().put_file(str(tmp_path / "one.png"), f"{s3.bucket}/there/{number:06d}.png")
    asked = ("--samples", f"{s3.url}/there", "--reference", images("a.npz", 0), "--metrics", "kid")
    copy, copied = shutil.copyfile, []

    def without_links(self, target):
        raise OSError(errno.EPERM, "no links here", str(self))

    def full_at_the_fourth(source, target):
        copied.append(target)
        if len(copied) == 4:
            target.write_bytes(source.read_bytes()[:20])
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return copy(source, target)

    monkeypatch.setattr(Path, "hardlink_to", without_links)
    monkeypatch.setattr(shutil, "copyfile", full_at_the_fourth)
    status, _, said = run(*asked)
    assert status == 2 and "disk is full" in said and "Traceback" not in said
    folder = next((tmp_path / "cache" / "images").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == [f"{number:06d}.png" for number in range(3)]
    status, table, said = run(*asked)
    assert status == 0 and len(copied) == 7, said
    assert all(np.array_equal(Image.open(folder / f"{number:06d}.png"), pixels[number]) for number in range(6))
    assert run("--samples", folder, *asked[2:])[1] == table, "as a folder that is here"


def test_an_upload_that_fails_is_completed_by_the_same_command_and_computed_once(s3, run, images, monkeypatch):
    asked = ("--reference", images("a.npz", 0), "--make-reference", f"{s3.url}/ref.npz")
    put = remote_output.RemoteOutput.put

    def refused(self, *arguments, **settings):
        s3.expired = True
        put(self, *arguments, **settings)

    monkeypatch.setattr(remote_output.RemoteOutput, "put", refused)
    status, _, said = run(*asked)
    assert status == 2 and "access is refused" in said and "Traceback" not in said
    s3.expired = False
    monkeypatch.setattr(remote_output.RemoteOutput, "put", put)
    s3.throttled, s3.breaks["ref.npz"] = 2, 2
    monkeypatch.setattr(features, "_features_of_batch", None)
    assert run(*asked)[0] == 0 and s3.names() == ["ref.npz", "ref.npz.json"]


def test_someone_elses_object_of_the_name_is_never_replaced(s3, run, images):
    s3.files().pipe_file(f"{s3.bucket}/ref.npz", b"mine")
    status, _, said = run("--reference", images("a.npz", 0), "--make-reference", f"{s3.url}/ref.npz")
    assert status == 2 and "ref.npz is there already" in said and s3.read("ref.npz") == b"mine"
    s3.files().pipe_file(f"{s3.bucket}/r.json", b"[]")
    status, _, said = run("--samples", images("a.npz", 0), "--metrics", "is", "--out", f"{s3.url}/r.json")
    assert status == 2 and s3.read("r.json") == b"[]"
    status, _, said = run("--samples", f"{s3.url}/none.npz", "--metrics", "is")
    assert status == 2 and "none.npz cannot be fetched" in said
