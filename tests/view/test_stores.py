"""Stores on the page: what one is, what was left out, and the pictures of a class."""

import json
import shutil
from io import BytesIO

import msgspec
import numpy as np
import pytest
from PIL import Image

from extract.__main__ import main as extract
from pipeline.images import center_crop, psnr
from pipeline.latents import LatentStore
from pipeline.runtime.errors import UserError
from pipeline.vae import load_vae
from view.given import find_given
from view.jobs import Job
from view.options import ViewOptions
from view.stores import SHOWN, BrowseRequest, _known_images, browsing, describe, skipped


def browsed(given, options, **asked):
    job = Job(*browsing(BrowseRequest(store=0, **asked), given, options))
    job.run()
    assert (job.state, job.sentence) == ("done", "")
    return job


def pixels(picture):
    return np.asarray(Image.open(BytesIO(picture.png)))


def test_a_store_is_described_with_its_classes_and_the_statistics_of_its_latents(given, store):
    about = describe(given.stores[0])
    assert [(one["name"], one["samples"]) for one in about["classes"]] == [
        ("class 0", 13),
        ("class 1", 13),
        ("class 2", 12),
        ("class 3", 12),
    ]
    statistics = LatentStore(store).manifest["statistics"]
    assert [one["mean"] for one in about["statistics"]] == statistics["mean"]
    assert about["views"] == ["center", "center-hflip"]
    assert about["skipped"] == {"count": 0, "reasons": [], "first": []}
    assert str(store.parent) not in json.dumps(about), "the page shows no folder of this machine"


@pytest.mark.parametrize("view", [0, 1])
def test_pictures_of_a_class_are_the_decoded_means_of_its_samples(given, options, store, view):
    job = browsed(given, options, label=2, view=view)
    opened, vae = LatentStore(store), load_vae("demo")
    rows = np.flatnonzero(opened.labels().numpy() == 2)
    latents = opened[rows][0][:, view, :4].float()
    assert len(job.pictures) == len(rows) == 12
    for picture, expected in zip(job.pictures, vae.decode(latents).numpy(), strict=True):
        np.testing.assert_allclose(pixels(picture).astype(int), expected.astype(int), atol=1)
    assert job.facts["names"][0] == {"class": "class 2", "key": f"{rows[0]}.png"}


def test_pages_follow_one_another_and_end(given, options):
    whole = [browsed(given, options, first=first) for first in (0, SHOWN, 2 * SHOWN, 3 * SHOWN)]
    assert [len(job.pictures) for job in whole] == [24, 24, 2, 0]
    keys = [name["key"] for job in whole for name in job.facts["names"]]
    assert len(set(keys)) == 50
    assert {job.facts["all"] for job in whole} == {50}


def test_a_second_round_through_the_vae_is_measured(given, options):
    job = browsed(given, options, label=0, compared="again")
    assert len(job.facts["errors"]) == 13
    assert all(5 < error < 99 for error in job.facts["errors"])
    assert "errors" not in browsed(given, options, label=0).facts


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """(a folder of images in two classes, the store that dit-extract made of it, both views)."""
    work, draws = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(6):
        place = work / "images" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((48, 40)).save(place)
    words = ["--vae", "demo", "--image-size", "32", "--samples-per-shard", "4", "--device", "cpu"]
    assert extract(["--data", str(work / "images"), "--out", str(work / "latents"), *words]) == 0
    return work / "images", work / "latents"


@pytest.mark.parametrize("view", [0, 1])
def test_pictures_stand_beside_the_images_they_were_made_from_with_the_error_of_the_vae(photos, view):
    images, store = photos
    options = ViewOptions(latents=(str(store),), data=str(images), device="cpu")
    job = browsed(find_given(options), options, view=view, compared="original")
    opened = LatentStore(store)
    listed, vae = sorted(images.rglob("*.png")), load_vae("demo")
    assert len(job.pictures) == len(opened) == 6
    for row, (picture, error) in enumerate(zip(job.pictures, job.facts["errors"], strict=True)):
        original = center_crop(Image.open(listed[opened.indices()[row]]), 32)
        original = original[:, ::-1] if view else original
        decoded = vae.decode(opened[row][0][view : view + 1, :4].float()).numpy()[0]
        shown = pixels(picture)
        np.testing.assert_array_equal(shown[:, :32], original)
        np.testing.assert_allclose(shown[:, 32:].astype(int), decoded.astype(int), atol=1)
        assert error == pytest.approx(psnr(original, shown[:, 32:]))
        assert job.facts["names"][row]["key"] == str(listed[opened.indices()[row]].relative_to(images))


def failed(options, **asked):
    job = Job(*browsing(BrowseRequest(store=0, **asked), find_given(options), options))
    job.run()
    assert job.state == "failed"
    return job.sentence


def test_other_images_and_stores_that_were_made_of_none_are_refused(photos, store, tmp_path):
    images, latents = photos
    shutil.copytree(images, tmp_path / "copy")
    options = ViewOptions(latents=(str(latents),), data=str(tmp_path / "copy"), device="cpu")
    changed = tmp_path / "copy" / "a" / "0.png"
    changed.write_bytes((images / "a" / "2.png").read_bytes())
    _known_images.clear()
    assert "a/0.png is not the image that its latent" in failed(options, compared="original")
    changed.unlink()
    _known_images.clear()
    assert "--data has not the inputs that" in failed(options, compared="original")
    options = ViewOptions(latents=(str(store),), data=str(images), device="cpu")
    assert "no folder that dit-extract made from images" in failed(options, compared="original")
    options = ViewOptions(latents=(str(latents),), device="cpu")
    assert "start dit-view with --data" in failed(options, compared="original")


def test_a_class_without_samples_has_no_pictures(given, options):
    job = browsed(given, options, label=-1)
    assert (job.pictures, job.facts["all"]) == ([], 0)


def test_a_view_that_is_not_there_is_refused(given, options):
    job = Job(*browsing(BrowseRequest(store=0, view=2), given, options))
    job.run()
    assert (job.state, "has 2 views" in job.sentence) == ("failed", True)
    with pytest.raises(UserError, match="no store number 3"):
        browsing(BrowseRequest(store=3), given, options)


def test_what_was_left_out_is_counted_by_reason_and_named(tmp_path):
    entries = [{"key": f"{k}.png", "reason": "too small" if k % 3 else "<b>no image</b>"} for k in range(300)]
    (tmp_path / "skipped.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    about = skipped(str(tmp_path), 300)
    assert about["reasons"] == [{"reason": "too small", "inputs": 200}, {"reason": "<b>no image</b>", "inputs": 100}]
    assert (about["count"], len(about["first"]), about["first"][1]["key"]) == (300, 200, "1.png")


@pytest.mark.parametrize("text", ["{", '{"key": 1, "reason": "x"}', '["key", "reason"]', None])
def test_a_damaged_list_of_what_was_left_out_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "skipped.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"skipped\.jsonl is"):
        skipped(str(tmp_path), 1)


@pytest.mark.parametrize(
    "asked", [{"first": -1}, {"view": 1.5}, {"label": -2}, {"store": "0"}, {"store": 0, "path": "/"}]
)
def test_a_request_of_other_types_or_bounds_is_none(asked):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"store": 0, **asked}, BrowseRequest)
