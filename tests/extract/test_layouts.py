"""Every row of docs/sources.md: what people bring is read as what it is, or refused in a sentence; never wrongly in silence."""

import json
import os
import zipfile
from collections import Counter

import pytest
from pyarrow import parquet, table

from extract import understood
from extract.options import SourceOptions
from extract.sources.selection import open_source
from pipeline.image_names import LITTER
from pipeline.runtime.errors import UserError
from tests.extract.test_sources import opened, tar_of


@pytest.fixture
def image(make_picture):
    return make_picture(0)


def labelled(listing):
    """The class of every input by its key; None where it has none."""
    return {
        key: listing.class_ids[label] if label >= 0 else None
        for key, label in zip(listing.keys, listing.labels.tolist(), strict=True)
    }


def pairs(names, image, extension="jpg"):
    return [
        member
        for number, name in enumerate(names)
        for member in ((f"{name}.{extension}", image), (f"{name}.cls", str(number % 2).encode()))
    ]


# --- folders


def test_numbered_class_folders_are_sorted_as_numbers_and_it_is_said(tmp_path, tree, image):
    tree(tmp_path / "d", {f"{number}/0.jpg": image for number in range(12)})
    source, listing = opened(tmp_path / "d", tmp_path)
    assert listing.class_ids == tuple(map(str, range(12)))
    assert "sorted as numbers" in " ".join(understood.lines(source.description, listing, listing.class_ids))


def test_opening_a_folder_looks_into_each_class_folder_once(tmp_path, tree, image, monkeypatch):
    """A million images may lie in them, on a slow disk; the listing looks a second time."""
    tree(tmp_path / "d", {f"{name}/{number}.jpg": image for name in ("a", "b") for number in range(3)})
    looks, scandir = Counter(), os.scandir

    def counted(path="."):
        looks[os.fspath(path)] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    source = open_source(SourceOptions(data=str(tmp_path / "d")), tmp_path / "copies")
    assert looks[str(tmp_path / "d" / "a")] == 1
    assert len(source.inputs()) == 6
    assert looks[str(tmp_path / "d" / "a")] == 2


def test_a_class_called_like_the_split_is_not_taken_for_it(tmp_path, tree, image):
    tree(tmp_path / "d", {f"{name}/0.jpg": image for name in ("bus", "car", "train")})
    with pytest.raises(UserError, match=r"--layout class-folders.*--layout split-folder"):
        opened(tmp_path / "d", tmp_path)
    assert opened(tmp_path / "d", tmp_path, layout="class-folders")[1].class_ids == ("bus", "car", "train")
    assert opened(tmp_path / "d", tmp_path, layout="split-folder")[1].keys == ["0.jpg"]


def test_a_split_beside_other_things_is_read(tmp_path, tree, image):
    tree(tmp_path / "d", {"train/a/0.jpg": image, "train/b/0.jpg": image, "val/a/1.jpg": image, "devkit/x.txt": b"x"})
    assert opened(tmp_path / "d", tmp_path)[1].keys == ["a/0.jpg", "b/0.jpg"]


def test_a_wrapper_is_refused_and_the_folder_meant_is_named(tmp_path, tree, image):
    tree(tmp_path / "d", {"images/cats/0.jpg": image, "images/dogs/0.jpg": image})
    with pytest.raises(UserError, match=r"name \S+d/images in --data.*--layout class-folders"):
        opened(tmp_path / "d", tmp_path)
    assert opened(tmp_path / "d", tmp_path, layout="class-folders")[1].class_ids == ("images",)
    tree(tmp_path / "d", {"annotations/0.xml": b"<annotation/>"})
    with pytest.raises(UserError, match=r"name \S+d/images in --data"):
        opened(tmp_path / "d", tmp_path)


@pytest.mark.parametrize("name", [*LITTER, "0.jpg:Zone.Identifier", "0.jpg~", "THUMBS.DB", "@EADIR", ".git", "._x"])
def test_litter_is_no_data_as_file_or_folder_anywhere(tmp_path, tree, image, name):
    files = {"a/0.jpg": image, "b/0.jpg": image}
    tree(tmp_path / "d", {**files, f"{name}/0.jpg": image, f"a/{name}/1.jpg": image, f"b/c/{name}": image})
    _, listing = opened(tmp_path / "d", tmp_path)
    assert listing.keys == sorted(files) and listing.class_ids == ("a", "b")
    assert any(note.startswith("left out: 3 ") for note in listing.notes)
    (tmp_path / "t.tar").write_bytes(tar_of([("a/0.jpg", image), ("b/1.jpg", image), (f"a/{name}/2.jpg", image)]))
    assert len(opened(tmp_path / "t.tar", tmp_path)[1]) == 2


def test_ignore_reaches_folders(tmp_path, tree, image):
    tree(tmp_path / "d", {"a/0.jpg": image, "b/0.jpg": image, "a/thumbs/1.jpg": image, "old/1.jpg": image})
    _, listing = opened(tmp_path / "d", tmp_path, ignore="thumbs,old")
    assert listing.class_ids == ("a", "b") and listing.keys == ["a/0.jpg", "b/0.jpg"]


def test_links_to_folders_that_are_read_themselves_are_no_data(tmp_path, tree, image):
    tree(tmp_path / "d", {"a/0.jpg": image, "b/0.jpg": image})
    (tmp_path / "d/latest").symlink_to(tmp_path / "d/a")
    _, listing = opened(tmp_path / "d", tmp_path)
    assert listing.class_ids == ("a", "b") and any("links to folders" in note for note in listing.notes)


@pytest.mark.parametrize("beside", [{}, {"a/x.json": b"{}", "README.md": b"x"}])
def test_tars_in_sub_folders_are_read_with_the_labels_in_them(tmp_path, tree, image, beside):
    tars = {
        f"{name}/{name}.tar": tar_of([(f"{name}{label}.jpg", image), (f"{name}{label}.cls", b"%d" % label)])
        for label, name in enumerate("ab")
    }
    tree(tmp_path / "d", {**tars, **beside})
    assert labelled(opened(tmp_path / "d", tmp_path)[1]) == {"a/a.tar/a0.jpg": "0", "b/b.tar/b1.jpg": "1"}


@pytest.mark.parametrize("beside", ["a/0.jpg", "x.tar"])
def test_stores_and_runs_inside_the_data_are_no_data(tmp_path, tree, image, beside):
    content = tar_of(pairs("ab", image)) if beside.endswith(".tar") else image
    made = {
        "finished/manifest.json": json.dumps({"format": "dit-latents"}).encode(),
        "finished/train-00000.tar": tar_of([("0.cls", b"0")]),
        "unfinished/.work/settings.json": b"{}",
        "run/config.yaml": b"",
        "run/checkpoints/step-0000001/config.json": b"{}",
        "run/samples/0.png": image,
    }
    tree(tmp_path / "d", {beside: content, **made})
    (tmp_path / "d/out").mkdir()
    source = open_source(SourceOptions(data=str(tmp_path / "d")), tmp_path, left_out=tmp_path / "d/out")
    assert {key.partition("/")[0] for key in source.inputs().keys} == {beside.partition("/")[0]}
    with pytest.raises(UserError, match="is a latent store, not images"):
        opened(tmp_path / "d/finished", tmp_path)


@pytest.mark.parametrize("name", ["{}_18_{}.JPEG", "{}_10026.JPEG", "ILSVRC2012_val_00000001_{}.JPEG"])
def test_flat_names_with_synsets_are_labels(tmp_path, tree, image, name):
    synsets = ["n01440764", "n01443537"]
    names = [name.format(synset, synset) for synset in synsets]
    tree(tmp_path / "d", {names[0]: image, names[1]: image})
    assert sorted(labelled(opened(tmp_path / "d", tmp_path)[1]).values()) == synsets
    tree(tmp_path / "parts", {f"part{number}/{name}": image for number in range(2) for name in names})
    assert set(labelled(opened(tmp_path / "parts", tmp_path)[1]).values()) == set(synsets)
    (tmp_path / "t.tar").write_bytes(tar_of([(name, image) for name in names]))
    assert sorted(labelled(opened(tmp_path / "t.tar", tmp_path)[1]).values()) == synsets


# --- dataset.json


def dataset_json(rows):
    return {
        **{f"0000{k // 2}/img{k:08d}.png": None for k in range(4)},
        "dataset.json": json.dumps({"labels": rows}).encode(),
    }


@pytest.mark.parametrize("kind", ["folder", "zip", "deflated zip"])
def test_dataset_json_of_stylegan_and_edm_is_read(tmp_path, tree, image, kind):
    rows = [[f"0000{k // 2}/img{k:08d}.png", (k + 1) % 2] for k in range(4)]
    files = {name: image if data is None else data for name, data in dataset_json(rows).items()}
    place = tmp_path / "d"
    if kind == "folder":
        tree(place, files)
    else:
        place = tmp_path / "d.zip"
        method = zipfile.ZIP_STORED if kind == "zip" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(place, "w", method) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    source, listing = opened(place, tmp_path)
    assert listing.labels.tolist() == [1, 0, 1, 0] and listing.labels_from == "dataset.json"
    assert source.read(listing, 3) == image


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"labels": [["00000/img00000000.png", 1', "is not valid JSON"),
        (json.dumps({"labels": [["00000/img00000000.png", 1]]}).encode(), "3 of 4 files have no label"),
        (json.dumps({"labels": [[f"0000{k // 2}/img{k:08d}.png", [0, 1]] for k in range(4)]}).encode(), "is a list"),
    ],
)
def test_a_dataset_json_that_does_not_fit_is_refused(tmp_path, tree, image, data, message):
    tree(tmp_path / "d", {**dict.fromkeys(dataset_json([]), image), "dataset.json": data})
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "d", tmp_path)
    assert opened(tmp_path / "d", tmp_path, ignore="dataset.json")[1].class_ids == ("00000", "00001")


def test_class_folders_in_a_zip_are_labels(tmp_path, image):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for name in ("top/cat/0.jpg", "top/dog/0.jpg", "__MACOSX/top/cat/._0.jpg"):
            archive.writestr(name, image)
    assert list(labelled(opened(tmp_path / "d.zip", tmp_path)[1]).values()) == ["cat", "dog"]


# --- tars


def test_only_webdatasets_own_names_are_dropped(tmp_path, image):
    members = [*pairs(["__tag__0", "1", "__tag__2", "3"], image), ("__worker__", b"x")]
    (tmp_path / "t.tar").write_bytes(tar_of(members))
    _, listing = opened(tmp_path / "t.tar", tmp_path)
    assert len(listing) == 4 and "left out: 1 WebDataset's own members (__worker__)" in listing.notes


@pytest.mark.parametrize("names", [["a.v1", "b.v1", "c.v1"], ["a.v1", "a.v2", "b.0.5"], ["x/1.5", "y/1.5"]])
def test_dots_in_names_keep_their_labels(tmp_path, image, names):
    (tmp_path / "t.tar").write_bytes(tar_of(pairs(names, image)))
    _, listing = opened(tmp_path / "t.tar", tmp_path)
    expected = {f"t.tar/{name}.jpg": str(number % 2) for number, name in enumerate(names)}
    assert labelled(listing) == expected


def test_an_unsorted_tar_is_joined_by_name(tmp_path, image):
    members = pairs("abc", image)
    (tmp_path / "t.tar").write_bytes(tar_of([*members[::2], *members[1::2]]))
    _, listing = opened(tmp_path / "t.tar", tmp_path)
    assert (
        listing.labels.tolist() == [0, 1, 0] and "3 samples lie scattered in their tar; joined by name" in listing.notes
    )


def test_labels_in_json_members_are_found_by_key(tmp_path, image):
    members = [
        (f"{k}.{kind}", data)
        for k in range(2)
        for kind, data in (("jpg", image), ("json", json.dumps({"label": k, "tag": "xy"[k], "caption": "c"}).encode()))
    ]
    (tmp_path / "t.tar").write_bytes(tar_of(members))
    assert opened(tmp_path / "t.tar", tmp_path)[1].labels.tolist() == [0, 1]
    assert opened(tmp_path / "t.tar", tmp_path, label_column="json:tag")[1].class_ids == ("x", "y")


def test_class_tars_in_a_folder_are_labels(tmp_path, tree, image):
    synsets = ("n01440764", "n01443537")
    tree(tmp_path / "d", {f"{s}.tar": tar_of([(f"{s}_{k}.JPEG", image) for k in range(2)]) for s in synsets})
    assert opened(tmp_path / "d", tmp_path)[1].class_ids == synsets
    tree(tmp_path / "e", {f"{name}.tar": tar_of([("0.jpg", image)]) for name in ("cat", "dog")})
    _, listing = opened(tmp_path / "e", tmp_path)
    assert listing.class_ids == () and any("--layout class-tars" in note for note in listing.notes)
    assert opened(tmp_path / "e", tmp_path, layout="class-tars")[1].class_ids == ("cat", "dog")


@pytest.mark.parametrize("top", ["", "./", "set/", "train/"])
def test_class_folders_inside_a_tar_are_labels(tmp_path, image, top):
    members = [(f"{top}{name}/{k}.jpg", image) for name in ("cat", "dog") for k in range(2)]
    if top == "train/":
        members += [("val/cat/9.jpg", image)]
    (tmp_path / "t.tar").write_bytes(tar_of(members))
    _, listing = opened(tmp_path / "t.tar", tmp_path)
    assert listing.labels.tolist() == [0, 0, 1, 1] and listing.class_ids == ("cat", "dog")
    assert opened(tmp_path / "t.tar", tmp_path, layout="flat")[1].class_ids == ()


def test_a_folder_beside_tars_is_said_and_one_with_images_is_refused(tmp_path, tree, image):
    tree(tmp_path / "d", {"0.tar": tar_of(pairs("ab", image)), "logs/x.txt": b"x"})
    assert len(opened(tmp_path / "d", tmp_path)[1]) == 2
    tree(tmp_path / "d", {"more/0.jpg": image})
    with pytest.raises(UserError, match="holds tars .* and also images beside them"):
        opened(tmp_path / "d", tmp_path)
    assert len(opened(tmp_path / "d", tmp_path, ignore="more")[1]) == 2


def test_img2dataset_output_is_read_in_its_two_forms(tmp_path, tree, image):
    tree(tmp_path / "wds", {"00000.tar": tar_of([("0.jpg", image), ("0.txt", b"c"), ("0.json", b"{}")])})
    tree(tmp_path / "files", {"00000/0.jpg": image, "00000/0.txt": b"c", "00001/1.jpg": image, "00001/1.txt": b"c"})
    for place in ("wds", "files"):
        parquet.write_table(table({"url": ["u"], "key": ["0"]}), tmp_path / place / "00000.parquet")
    assert opened(tmp_path / "wds", tmp_path)[1].keys == ["00000.tar/0.jpg"]
    assert len(opened(tmp_path / "files", tmp_path, ignore="*.txt,*.parquet")[1]) == 2


# --- tables


def test_a_table_without_images_beside_class_folders_is_no_data(tmp_path, tree, image):
    tree(tmp_path / "d", {"a/0.jpg": image, "b/0.jpg": image})
    parquet.write_table(table({"file_name": ["a/0.jpg"]}), tmp_path / "d/metadata.parquet")
    assert opened(tmp_path / "d", tmp_path)[1].class_ids == ("a", "b")


def test_a_table_of_relative_paths_and_labels_is_read(tmp_path, tree, image):
    tree(tmp_path / "d", {"images/0.jpg": image})
    parquet.write_table(table({"file_name": ["images/0.jpg"], "label": [3.0]}), tmp_path / "d/x.parquet")
    source, listing = opened(tmp_path / "d", tmp_path)
    assert listing.labels.tolist() == [3] and source.read(listing, 0) == image


README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/validation-*
---
"""


def test_of_a_hub_set_that_is_not_whole_the_missing_files_are_named(tmp_path, tree, image):
    tree(tmp_path / "d", {"README.md": README.encode(), "data/x": b""})
    rows = table({"image": [{"bytes": image, "path": None}], "label": [0]})
    parquet.write_table(rows, tmp_path / "d/data/train-00000-of-00002.parquet")
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet.*--anyway"):
        opened(tmp_path / "d", tmp_path)
    assert len(opened(tmp_path / "d", tmp_path, anyway=True)[1]) == 1
    parquet.write_table(rows, tmp_path / "d/data/train-00001-of-00002.parquet")
    source, listing = opened(tmp_path / "d", tmp_path)
    assert len(listing) == 2 and source.read(listing, 0) == image


# --- labels


@pytest.mark.parametrize(
    ("values", "labels", "class_ids"),
    [
        (["\ufeff1\r\n", " 0 ", "1"], [1, 0, 1], ("0", "1")),
        ([2.0, 0.0, float("nan")], [2, 0, -1], ("0", "1", "2")),
        (["10.5", "9.5"], [1, 0], ("9.5", "10.5")),
        (["cat ", "\ufeffcat", None, "ant"], [1, 1, -1, 0], ("ant", "cat")),
        (["1", "nan"], [1, -1], ("0", "1")),
        ([b"dog\0", ""], [0, -1], ("dog",)),
    ],
)
def test_labels_are_what_they_mean(values, labels, class_ids):
    from extract.sources.labels import numbered_labels

    found = numbered_labels(values)
    assert (list(found.values), found.class_ids) == (labels, class_ids)


@pytest.mark.parametrize("value", [[1, 2], [], {"id": 1}, (1,)])
def test_a_list_is_no_label(value):
    from extract.sources.labels import numbered_labels

    with pytest.raises(UserError, match="an image has one class"):
        numbered_labels([value])


def test_what_was_understood_is_said_in_lines(tmp_path, tree, image):
    tree(tmp_path / "d", {"a/0.jpg": image, "a/1.jpg": image, "b/0.jpg": image, "a/Thumbs.db": b"x", "note.txt": b"x"})
    source, listing = opened(tmp_path / "d", tmp_path)
    assert list(understood.lines(source.description, listing, listing.class_ids)) == [
        f"folder {tmp_path / 'd'}: 3 inputs, 2 classes",
        "labels: from the names of class folders; classes sorted as text",
        "classes: 0: a (2), 1: b (1)",
        "left out: 1 file (note.txt) beside the class folders",
        "left out: 1 litter of file systems and desktops (a/Thumbs.db)",
    ]


def test_classes_that_read_alike_are_asked_about(tmp_path, tree, image):
    names = ["dog", "dog ", "caf\u00e9", "cafe\u0301", "Cat"]
    tree(tmp_path / "d", {f"{name}/0.jpg": image for name in names})
    source, listing = opened(tmp_path / "d", tmp_path)
    said = list(understood.lines(source.description, listing, listing.class_ids))
    assert listing.class_ids == tuple(sorted(names))
    assert said[3].startswith("classes that differ only in case, spaces or the encoding of accents: ")
    assert "'cafe\\u0301', 'caf\\xe9', and 1 more such; are they one?" in said[3]
