"""Images in an .npz: every way numpy writes them is read in pieces, and what is no such file is refused in a sentence."""

import io
import zipfile

import numpy as np
import pytest

from pipeline.runtime.errors import UserError
from sample.evaluate.npz import NpzImages, content_key, list_arrays


@pytest.fixture(params=[np.savez, np.savez_compressed], ids=["stored", "compressed"])
def save(request):
    return request.param


def read(images, start=0, stop=None, batch_size=3):
    try:
        return np.concatenate(list(images.batches(start, images.count if stop is None else stop, batch_size)))
    finally:
        images.close()


def refusal(path):
    with pytest.raises(UserError) as caught:
        read(NpzImages(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_images_come_in_order_in_batches_from_any_start(tmp_path, pictures, save):
    expected = pictures(10)
    save(tmp_path / "x.npz", arr_0=expected, arr_1=np.zeros(10, dtype=np.int64))
    images = NpzImages(tmp_path / "x.npz")
    assert (images.count, images.size) == (10, (24, 24))
    assert [len(batch) for batch in images.batches(0, 10, 4)] == [4, 4, 2]
    np.testing.assert_array_equal(read(images), expected)
    for start, stop in ((4, 8), (8, 9), (2, 5), (5, 6)):
        np.testing.assert_array_equal(np.concatenate(list(images.batches(start, stop, 2))), expected[start:stop])
    images.close()


def test_memory_does_not_grow_with_the_file(tmp_path, save):
    """48 MB of images in batches of 64 kB: what is read at once stays below a megabyte."""
    import tracemalloc

    save(tmp_path / "x.npz", np.zeros((4000, 64, 64, 3), dtype=np.uint8))
    images = NpzImages(tmp_path / "x.npz")
    tracemalloc.start()
    for _ in images.batches(0, images.count, 5):
        pass
    images.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_the_key_is_of_the_contents(tmp_path, pictures):
    for name, first in (("a", 0), ("same", 0), ("other", 1)):
        np.savez(tmp_path / f"{name}.npz", pictures(4, first=first))
    assert content_key(tmp_path / "a.npz") == content_key(tmp_path / "same.npz")
    assert content_key(tmp_path / "a.npz") != content_key(tmp_path / "other.npz")


def test_python_objects_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    np.savez(tmp_path / "x.npz", arr_0=np.array([[[[Bomb()]]]], dtype=object))
    assert "holds Python objects, which are never loaded" in refusal(tmp_path / "x.npz")


def test_a_float_image_that_is_not_finite_is_named(tmp_path):
    images = np.zeros((130, 2, 2, 3), dtype=np.float32)
    images[100, 1, 0, 2] = np.nan
    np.savez(tmp_path / "x.npz", images)
    assert "image 100 of" in refusal(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", np.zeros((3, 2, 2, 3)))
    assert "is float64, but images are uint8" in refusal(tmp_path / "x.npz")


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 1), (4, 3, 8, 8), (4, 0, 8, 3)])
def test_arrays_that_are_no_images_are_refused(tmp_path, shape):
    np.savez(tmp_path / "x.npz", np.zeros(shape, dtype=np.uint8))
    assert "images are [N, H, W, 3]" in refusal(tmp_path / "x.npz")


def test_no_images_at_all_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((0, 8, 8, 3), dtype=np.uint8))
    assert "holds no images" in refusal(tmp_path / "x.npz")


def test_fortran_order_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", np.asfortranarray(np.zeros((4, 8, 8, 3), dtype=np.uint8)))
    assert "Fortran order" in refusal(tmp_path / "x.npz")


def test_a_truncated_file_is_refused(tmp_path, pictures, save):
    path = tmp_path / "x.npz"
    save(path, pictures(10))
    path.write_bytes(path.read_bytes()[:-100])
    assert "is not a readable .npz" in refusal(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.npz").write_text("hello")
    assert "is not a readable .npz" in refusal(tmp_path / "x.npz")
    assert "does not exist" in refusal(tmp_path / "nothing.npz")


def test_an_array_shorter_than_its_header_says_is_refused(tmp_path):
    whole = io.BytesIO()
    np.save(whole, np.zeros((4, 8, 8, 3), dtype=np.uint8))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", whole.getvalue()[:-1])
    assert "its header claims 768 bytes of data, but it holds 767" in refusal(tmp_path / "x.npz")


def test_a_flipped_byte_is_noticed(tmp_path, pictures, save):
    path = tmp_path / "x.npz"
    save(path, pictures(50))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert "is not a readable .npz" in refusal(path)


def test_the_directory_alone_tells_what_is_in_a_file(tmp_path, pictures):
    np.savez(tmp_path / "x.npz", arr_0=pictures(2), mu=np.zeros(3))
    assert set(list_arrays(tmp_path / "x.npz")) == {"arr_0", "mu"}
