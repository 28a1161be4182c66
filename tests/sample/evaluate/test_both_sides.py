"""Both sides are looked at before anything is computed for one of them."""

import numpy as np
import pytest
from PIL import Image

from sample.evaluate.__main__ import main


@pytest.fixture
def refused(weights_file, monkeypatch, capsys):
    """Runs dit-evaluate, which must refuse before the first feature is made; gives what it said."""

    def never(*_, **__):
        raise AssertionError("features were made of one side before the other was looked at")

    monkeypatch.setattr("sample.evaluate.evaluation.make_features", never)

    def run(samples, reference, metrics="kid"):
        words = ["--samples", str(samples), "--reference", str(reference), "--metrics", metrics]
        assert main([*words, "--inception", str(weights_file), "--device", "cpu"]) == 2
        return capsys.readouterr().err

    return run


def test_a_last_image_of_another_size_in_the_second_folder(refused, pictures, save_pictures, tmp_path):
    good = save_pictures(tmp_path / "good", pictures(4))
    odd = save_pictures(tmp_path / "odd", pictures(4))
    Image.fromarray(pictures(1, size=32)[0]).save(odd / "z.png")
    for sides in ((good, odd), (odd, good)):
        assert "have different sizes: a/0000.png has 24×24 pixels, z.png has 32×32" in refused(*sides)


def test_a_last_file_that_is_no_image_in_the_second_folder(refused, pictures, save_pictures, tmp_path):
    good = save_pictures(tmp_path / "good", pictures(4))
    broken = save_pictures(tmp_path / "broken", pictures(4))
    (broken / "z.png").write_bytes(b"no image")
    assert "z.png cannot be used" in refused(good, broken)


def test_an_image_on_its_side_has_the_size_it_is_shown_in(pictures, tmp_path):
    from sample.evaluate.folder import FolderImages

    wide = np.concatenate([pictures(1)[0], pictures(1)[0]], axis=1)
    Image.fromarray(wide).save(tmp_path / "a.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(wide.transpose(1, 0, 2))).save(tmp_path / "b.jpg", exif=exif)
    images = FolderImages(tmp_path, image_size=None, workers=1)
    assert images.key()
    assert len(next(images.batches(0, 2, 2))) == 2


@pytest.mark.parametrize(
    ("mu", "said"), [(np.zeros(7), "mu of .* is float64"), (np.full(2048, np.nan), "holds NaN or infinity")]
)
def test_statistics_of_the_second_side_that_are_no_good(mu, said, refused, pictures, tmp_path):
    import re

    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2048, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=np.eye(len(mu)))
    assert re.search(said, refused(tmp_path / "samples.npz", tmp_path / "reference.npz", metrics="fid"))
