"""What a user opens: equal bytes for equal images, however they came in parts, and memory that stays flat."""

import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from pipeline.runtime.gate import typed
from sample.outputs import Output, fill_folder, is_intact, write_grid, write_latents, write_npz, write_strip

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 16, 24, 3), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])


def grey(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def parts(array, size):
    return (array[start : start + size] for start in range(0, len(array), size))


def test_an_npz_is_what_numpy_and_adms_tools_read(tmp_path):
    path = tmp_path / "a.npz"
    write_npz(path, parts(IMAGES, 4), LABELS, pixels=(16, 24))
    with np.load(path, allow_pickle=False) as content:
        assert content.files == ["arr_0", "arr_1"]
        assert content["arr_0"].dtype == np.uint8
        assert content["arr_1"].dtype == np.int64
        assert (content["arr_0"] == IMAGES).all()
        assert (content["arr_1"] == LABELS).all()
    with zipfile.ZipFile(path) as archive:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        assert archive.testzip() is None


def test_the_bytes_do_not_depend_on_how_the_images_came_or_when(tmp_path, monkeypatch):
    first = write_npz(tmp_path / "a.npz", parts(IMAGES, 4), LABELS, pixels=(16, 24))
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    second = write_npz(tmp_path / "b.npz", parts(IMAGES, 1), LABELS, pixels=(16, 24))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert first["sha256"] == second["sha256"]


def test_an_npz_of_any_size_is_written_with_one_part_in_memory(tmp_path):
    part = np.zeros((8, 256, 256, 3), dtype=np.uint8)  # 1.5 MiB
    tracemalloc.start()
    write_npz(tmp_path / "a.npz", (part.copy() for _ in range(100)), np.zeros(800, dtype=np.int64), pixels=(256, 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 100 * part.nbytes
    assert peak < 4 * part.nbytes


def test_latents_are_plain_safetensors(tmp_path):
    latents = np.random.default_rng(1).normal(size=(10, 4, 2, 3)).astype(np.float32)
    write_latents(tmp_path / "a.safetensors", parts(latents, 3), LABELS, shape=(4, 2, 3))
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["label", "latents"]
        assert (file.get_tensor("latents") == latents).all()
        assert (file.get_tensor("label") == LABELS).all()


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield IMAGES[:4]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_npz(tmp_path / "a.npz", broken(), LABELS, pixels=(16, 24))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_one_png_per_image_in_its_class_and_its_number_in_the_name(tmp_path):
    about = fill_folder(tmp_path / "f", parts(IMAGES, 4), LABELS, folder_name=lambda label: f"n{label}")
    files = sorted((tmp_path / "f").rglob("*.png"))
    assert about["files"] == len(files) == 10
    with Image.open(tmp_path / "f" / "n9" / "000005.png") as image:
        assert (np.asarray(image) == IMAGES[5]).all()
    about = typed(about, Output, "", advice="")
    assert is_intact(tmp_path / "f", about)
    Image.fromarray(IMAGES[0]).save(tmp_path / "f" / "n9" / "000005.png")
    assert not is_intact(tmp_path / "f", about)
    files[0].unlink()
    assert not is_intact(tmp_path / "f", about)


def test_images_without_a_class_have_no_sub_folder(tmp_path):
    unlabelled = np.full(10, -1)
    fill_folder(tmp_path / "f", parts(IMAGES, 4), unlabelled, folder_name=lambda _: "")
    assert len(list((tmp_path / "f").glob("*.png"))) == 10


def test_a_grid_by_class_has_a_row_and_a_name_per_class(tmp_path):
    tiles = np.zeros((6, 64, 64, 3), dtype=np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None, None] * 40
    write_grid(
        tmp_path / "a.png", [tiles], np.array([7, 7, 7, 2, 2, 2]), class_name=lambda label: f"class {label}", columns=3
    )
    picture = grey(tmp_path / "a.png")
    assert picture.shape[0] > 2 * 64
    assert picture.shape[1] > 3 * 64 + 40
    for value in (0, 40, 80, 120, 160, 200):
        assert (picture == value).sum() >= 64 * 64 * 0.9
    label = picture[:, :40]
    assert (label < 128).any()


def test_a_grid_of_drawn_labels_is_a_square_sorted_by_class_with_captions(tmp_path):
    tiles = np.zeros((4, 64, 64, 3), dtype=np.uint8) + np.array([200, 0, 150, 50], dtype=np.uint8)[:, None, None, None]
    write_grid(tmp_path / "a.png", [tiles], np.array([3, 0, 2, 1]), class_name=str, columns=None)
    picture = grey(tmp_path / "a.png")
    middles = [np.median(np.argwhere(picture == value), axis=0) for value in (0, 50, 150, 200)]
    down, right = (middles[2] - middles[0]), (middles[1] - middles[0])
    assert down[0] > 64 > abs(down[1])
    assert right[1] > 64 > abs(right[0])
    assert np.abs(middles[3] - middles[0] - down - right).max() < 8


def test_a_sorted_grid_says_each_class_below_its_image_and_none_where_there_are_no_classes(tmp_path):
    tiles = np.full((4, 64, 64, 3), 200, dtype=np.uint8)

    def drawn(name, labels, class_name):
        write_grid(tmp_path / name, [tiles], labels, class_name=class_name, columns=None)
        return grey(tmp_path / name)

    captioned = drawn("a.png", np.array([0, 1, 0, 1]), lambda label: ["I", "WWWW"][label])
    ink = [(captioned[:, half] < 100).sum() for half in (slice(0, 70), slice(70, None))]
    assert ink[1] > 0 and ink[0] > 0
    assert captioned.shape[0] > drawn("b.png", np.full(4, -1), pytest.fail).shape[0]
    half = captioned.shape[0] // 2
    assert (captioned[:half] < 100).sum() < (captioned[half:] < 100).sum(), "sorted: the short name is above"


def test_a_strip_is_a_row_of_moments(tmp_path):
    frames = np.zeros((2, 5, 64, 64, 3), dtype=np.uint8)
    write_strip(tmp_path / "s.png", frames, row_labels=["a", "b"], captions=[f"t = {t}" for t in range(5)])
    height, width = grey(tmp_path / "s.png").shape
    assert width > 5 * 64
    assert height > 2 * 64
