"""The coloured set: OpenMoji's drawings as files, classed by their code points."""

import sys

import pytest
from PIL import Image

from examples.openmoji.make_images import Options, class_of, main, write_drawings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1F1E9-1F1EA", "flags"),
        ("1F600", "faces"),
        ("1F44B-1F3FD", "people"),
        ("1F44B", "pictographs"),
        ("1F680", "transport"),
        ("1FAE0", "newer"),
        ("E0C1", "extras"),
        ("0023-FE0F-20E3", "symbols"),
    ],
)
def test_a_drawings_class_is_what_its_code_points_are(name, expected):
    assert class_of(name) == expected


def test_without_its_packages_the_example_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert main(["--out", str(tmp_path / "images")]) == 2
    assert "dit-pipeline[openmoji]" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


@pytest.mark.slow
def test_the_drawings_are_4495_coloured_files_in_eight_class_folders(tmp_path):
    write_drawings(Options(out=tmp_path / "images", side=32))
    files = sorted((tmp_path / "images").rglob("*.png"))
    assert len(files) == 4495 and len({file.parent for file in files}) == 8
    with Image.open(tmp_path / "images/faces/1F600.png") as picture:
        red, green, blue = picture.convert("RGB").getpixel((16, 26))
    assert picture.size == (32, 32) and red > blue and green > blue  # a yellow face
