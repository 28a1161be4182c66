"""Grids a person can read, pairs to compare, PNGs that are whole and say what they are."""

import numpy as np
import pytest
from PIL import Image

from pipeline.image_grid import INK, PAPER, can_be_drawn, grid, pairs, save_png
from pipeline.runtime.errors import UserError


def tiles(count, height=64, width=64):
    """Single-coloured images, each of a colour of its own."""
    colours = np.array([[37 * n % 256, 91 * n % 256, 200] for n in range(count)], dtype=np.uint8)
    return np.broadcast_to(colours[:, None, None], (count, height, width, 3)).copy()


def areas(picture, colour):
    """(left, top, right, bottom) of all pixels of a colour, None if there are none."""
    mask = (np.asarray(picture) == colour).all(axis=-1)
    if not mask.any():
        return None
    rows, columns = np.where(mask.any(axis=1))[0], np.where(mask.any(axis=0))[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def has_ink(picture, box):
    return (np.asarray(picture.crop(box)).astype(int).sum(axis=-1) < 400).any()


def test_every_image_stands_whole_in_reading_order_and_apart_from_the_next():
    images = tiles(5)
    places = [areas(grid(images, 3), image[0, 0]) for image in images]
    assert [(right - left, bottom - top) for left, top, right, bottom in places] == [(64, 64)] * 5
    assert places[0][1] == places[1][1] == places[2][1] < places[3][1] == places[4][1]
    assert places[0][2] < places[1][0] and places[1][2] < places[2][0] and places[3][0] == places[0][0]
    assert places[0][3] < places[3][1]


def test_images_of_another_shape_and_tiny_ones_are_enlarged_by_a_whole_factor():
    left, top, right, bottom = areas(grid(tiles(1, 8, 12), 1), tiles(1)[0, 0, 0])
    assert (right - left, bottom - top) == (96, 64)


def test_row_labels_stand_to_the_left_of_their_rows():
    images = tiles(6)
    picture = grid(images, 3, row_labels=["golden retriever", "zero"])
    for row in range(2):
        left, top, _, bottom = areas(picture, images[3 * row, 0, 0])
        assert has_ink(picture, (0, top, left, bottom))
    assert areas(grid(images, 3), INK) is None


def test_captions_stand_below_their_image_and_never_run_into_the_next():
    images = tiles(2)
    picture = grid(images, 2, captions=["a caption that is much longer than its image is wide", ""])
    left, _, right, bottom = areas(picture, images[0, 0, 0])
    assert has_ink(picture, (left, bottom, right, picture.height))
    assert not has_ink(picture, (right, bottom, picture.width, picture.height))


def test_a_title_makes_room_for_itself():
    images = tiles(1)
    title = "a title that is wider than the one small picture below it"
    picture = grid(images, 1, title=title)
    _, top, right, _ = areas(picture, images[0, 0, 0])
    assert has_ink(picture, (0, 0, picture.width, top))
    assert picture.width > 2 * right
    assert (np.asarray(picture)[:, -1] == PAPER).all()


@pytest.mark.parametrize("label", ["", "西瓜", "Crête de l’île", "one\ntwo", "x" * 300, "many words " * 40])
def test_any_label_can_be_drawn(label):
    assert grid(tiles(1), 1, row_labels=[label], captions=[label], title="t").height < 400


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="2 row labels for 3 rows"):
        grid(tiles(5), 2, row_labels=["a", "b"])
    with pytest.raises(ValueError, match="1 captions for 5 images"):
        grid(tiles(5), 2, captions=["a"])
    with pytest.raises(ValueError, match="needs images and columns, not 0 and 2"):
        grid(tiles(1)[:0], 2)


def test_pairs_stand_side_by_side():
    images = tiles(4)
    picture = pairs(images[:2], images[2:], ["first", "second"], columns=1)
    for number in range(2):
        _, top, right, _ = areas(picture, images[number, 0, 0])
        left, other_top, _, _ = areas(picture, images[2 + number, 0, 0])
        assert (left - right, other_top) == (2, top)
    with pytest.raises(ValueError, match="differ in shape"):
        pairs(images[:2], images[2:3], ["first", "second"])


def test_a_png_comes_back_with_its_facts_and_leaves_nothing_else(tmp_path):
    images = tiles(1)
    save_png(tmp_path / "one.png", images[0], {"vae": "demo", "name": "Crête"})
    with Image.open(tmp_path / "one.png") as loaded:
        assert loaded.text == {"vae": "demo", "name": "Crête"}
        assert np.array_equal(loaded, images[0])
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]
    save_png(tmp_path / "one.png", grid(images, 1))
    with Image.open(tmp_path / "one.png") as loaded:
        assert loaded.size == grid(images, 1).size


def test_a_png_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, but a folder is needed there"):
        save_png(tmp_path / "file" / "one.png", tiles(1)[0])
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder\.png: that is a folder"):
        save_png(tmp_path / "folder.png", tiles(1)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_the_folder_of_a_png_is_made(tmp_path):
    save_png(tmp_path / "new" / "one.png", tiles(1)[0])
    assert (tmp_path / "new" / "one.png").is_file()


def test_narrow_images_are_enlarged_too_so_that_captions_have_room():
    narrow = np.zeros((2, 128, 32, 3), np.uint8)
    assert grid(narrow, 2, captions=["t = 999", "t = 0"]).width > 2 * 64


@pytest.mark.parametrize(("text", "drawn"), [("Crête", True), ("why?", True), ("сова", False), ("貓 cat", False)])
def test_a_text_that_the_font_lacks_is_known(text, drawn):
    assert can_be_drawn(text) is drawn
