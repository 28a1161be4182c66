"""A folder of image files: found at any depth, decoded in order, cropped alike or refused by name."""

import numpy as np
import pytest
from PIL import Image

from pipeline.images import center_crop
from pipeline.runtime.errors import UserError
from sample.evaluate.folder import FolderImages, list_images


def open_folder(folder, image_size=None, workers=2):
    return FolderImages(folder, image_size=image_size, workers=workers)


def read(images, start=0, stop=None, batch_size=3):
    return np.concatenate(list(images.batches(start, images.count if stop is None else stop, batch_size)))


def test_images_at_any_depth_come_in_the_order_of_their_paths(tmp_path, pictures, save_pictures):
    expected = pictures(8)
    save_pictures(tmp_path / "x", expected)
    for hidden in (".cache/0.png", "a/.0.png"):
        (tmp_path / "x" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "x" / hidden).write_bytes(b"")
    (tmp_path / "x" / "notes.txt").write_text("no image")
    images = open_folder(tmp_path / "x")
    assert list_images(tmp_path / "x")[0] == "a/0000.png"
    assert (images.count, images.size) == (8, (24, 24))
    np.testing.assert_array_equal(read(images), expected)
    np.testing.assert_array_equal(read(images, 3, 7, batch_size=2), expected[3:7])
    assert images.name_of(5).endswith("b/0005.png")


def test_images_of_any_size_go_through_the_centre_crop_of_extraction(tmp_path, pictures):
    sizes = [(40, 30), (16, 16), (33, 90)]
    originals = [Image.fromarray(pictures(1, first=k, size=96)[0]).resize(size) for k, size in enumerate(sizes)]
    for k, image in enumerate(originals):
        image.save(tmp_path / f"{k}.png")
    images = open_folder(tmp_path, image_size=16)
    assert images.size == (16, 16)
    np.testing.assert_array_equal(read(images), np.stack([center_crop(image, 16) for image in originals]))


def test_without_a_size_the_first_image_that_differs_is_named(tmp_path, pictures, save_pictures):
    save_pictures(tmp_path, pictures(6))
    Image.new("RGB", (30, 20)).save(tmp_path / "b" / "0004.png")
    with pytest.raises(UserError, match=r"a/0000.png has 24×24 pixels, b/0004.png has 30×20; give --image-size"):
        read(open_folder(tmp_path))


def test_images_of_one_size_that_is_no_square_stay_as_they_are(tmp_path):
    for k in range(3):
        Image.new("RGB", (30, 20), (k, 0, 0)).save(tmp_path / f"{k}.png")
    assert open_folder(tmp_path).size == (30, 20)
    assert read(open_folder(tmp_path)).shape == (3, 20, 30, 3)


def test_a_broken_image_is_named(tmp_path, pictures, save_pictures):
    save_pictures(tmp_path, pictures(6))
    (tmp_path / "a" / "0001.png").write_bytes((tmp_path / "a" / "0001.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"a/0001.png cannot be used: .*take it out of the folder"):
        read(open_folder(tmp_path))


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="holds no images"):
        open_folder(tmp_path)


def test_the_key_changes_with_a_file_and_with_the_crop(tmp_path, pictures, save_pictures):
    save_pictures(tmp_path, pictures(4))
    key = open_folder(tmp_path).key()
    assert key == open_folder(tmp_path).key()
    assert key != open_folder(tmp_path, image_size=8).key()
    Image.fromarray(pictures(1, first=99)[0]).save(tmp_path / "a" / "0000.png")
    assert key != open_folder(tmp_path).key()


def test_folders_behind_links_are_looked_into(tmp_path, pictures, save_pictures):
    save_pictures(tmp_path / "elsewhere", pictures(2))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "linked").symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path / "x") == ["linked/a/0000.png", "linked/b/0001.png"]


def test_a_file_that_may_not_be_read_is_named_wherever_it_is_read(tmp_path, pictures, save_pictures):
    save_pictures(tmp_path, pictures(4))
    images = open_folder(tmp_path)
    (tmp_path / "b" / "0003.png").unlink()
    for look in (images.key, lambda: read(images)):
        with pytest.raises(UserError, match=r"b/0003.png cannot be read \(No such file"):
            look()


def test_thumbnails_and_bins_of_file_systems_are_no_images(tmp_path, pictures, save_pictures):
    folder = save_pictures(tmp_path / "x", pictures(4))
    wanted = list_images(folder)
    for name in ("@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "a/@EADIR/1.png", "$RECYCLE.BIN/2.png", "lost+found/3.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "a" / "._0.png").write_bytes(b"x")
    assert list_images(folder) == wanted
    (folder / "z.PNM").write_bytes(b"P5\n1 1\n255\n0")  # whatever decodes is an image here, too
    assert list_images(folder) == [*wanted, "z.PNM"]
