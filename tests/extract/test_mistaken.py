"""What is more likely a mistake than a wish is refused with what to do, or said; never read as something else in silence."""

import base64
import json
import shutil
import zipfile
from pathlib import Path

import datasets
import pytest
from pyarrow import parquet, table

from extract.sources.mistaken import refuse_containers, some
from pipeline.latents import LatentStore
from pipeline.runtime.errors import UserError
from tests.extract.test_sources import opened, tar_of

ROOT = Path(__file__).parents[2]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def image(make_picture):
    return make_picture(0)


def archive(path, members):
    """A tar or a zip, by the path's suffix."""
    if path.suffix == ".tar":
        path.write_bytes(tar_of(members))
    else:
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members:
                file.writestr(name, data)
    return path


def classes_of(listing):
    return [listing.class_ids[label] if label >= 0 else None for label in listing.labels.tolist()]


def rows_of(image, labels):
    return table({"image": [{"bytes": image, "path": None}] * len(labels), "label": labels})


# --- files that hold images and are none


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["index.json", "shard.00000.mds"], r"MDS.*WebDataset tars, first \(docs/sources.md, .* has a script\)"),
        (["train/index.json", "train/shard.00000.mds.zstd"], "MDS.*WebDataset tars, first"),
        (["data.mdb", "lock.mdb"], "an LMDB database"),
        (["train-00000-of-01024", "train-00001-of-01024"], "TFRecord"),
        (["x/train.tfrecord"], "TFRecord"),
        (["train.beton"], "FFCV"),
        (["train.rec", "train.idx"], "RecordIO"),
        (["train-images-idx3-ubyte"], "MNIST"),
        (["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"], "pickles"),
        (["a.h5"], "HDF5"),
        (["train_data_batch_1.npz"], "arrays"),
        (["train_images_0.tar.gz", "train_images_1.tar.gz"], r"train_images_0\.tar\.gz.*unpack it first"),
        (["a.zip", "b.zip"], "name one of them in --data"),
        (["deep/er/0.tar"], "name the folder they lie in"),
    ],
)
def test_files_that_hold_images_and_are_none_are_named_with_what_to_do(tmp_path, tree, image, names, message):
    tree(tmp_path / "d", dict.fromkeys(names, b"x"))
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "d", tmp_path)
    if names[0].count("/") == 0 and not names[0].endswith((".json", ".zip")) and "." in names[0]:
        with pytest.raises(UserError, match="is a file .*, but neither a folder nor a .tar"):
            opened(tmp_path / "d" / names[0], tmp_path)
    beside = f"{names[0].rpartition('/')[0]}/picture".lstrip("/")
    tree(tmp_path / "d", {beside: image})  # known by its content
    listing = opened(tmp_path / "d", tmp_path, layout="flat")[1]
    assert any(key.endswith("picture") for key in listing.keys)


def test_a_tar_of_tars_that_are_no_imagenet_is_no_data(tmp_path, image):
    inner = tar_of([("0.jpg", image)])
    with pytest.raises(UserError, match=r"holds tars \(cat.tar\) and no images"):
        opened(archive(tmp_path / "t.tar", [("cat.tar", inner), ("dog.tar", inner)]), tmp_path)


@pytest.mark.parametrize("suffix", [".tar", ".zip", ".parquet"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, tree, suffix):
    tree(tmp_path / "d", {f"train-00000-of-00001{suffix}": POINTER})
    with pytest.raises(UserError, match="Git LFS pointer.*git lfs pull"):
        opened(tmp_path / "d" / (f"train-00000-of-00001{suffix}" if suffix != ".parquet" else ""), tmp_path)


def test_a_repository_in_the_hubs_cache_is_read_by_its_snapshot(tmp_path, tree, image):
    tree(tmp_path / "datasets--me--pets", {"blobs/aa": image, "refs/main": b"123"})
    snapshot = tmp_path / "datasets--me--pets/snapshots/123"
    for name in ("cat", "dog"):
        (snapshot / name).mkdir(parents=True)
        (snapshot / name / "0.jpg").symlink_to("../../../blobs/aa")
    with pytest.raises(UserError, match=r"Hub's cache.*name \S+snapshots/123 in --data"):
        opened(tmp_path / "datasets--me--pets", tmp_path)
    assert opened(snapshot, tmp_path)[1].class_ids == ("cat", "dog")


# --- folders that are no classes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/b/c/cat/0.jpg", "a/b/c/dog/0.jpg"], r"name \S+d/a/b/c in --data"),
        (["images/0.jpg", "images/1.jpg"], r"as \S+d/images"),
        (["JPEGImages/0.jpg", "Annotations/0.xml", "ImageSets/Main/train.txt"], r"as \S+d/JPEGImages"),
        (["imgs/0.jpg", "tables/meta.parquet"], r"as \S+d/imgs"),
    ],
)
def test_folders_that_are_parts_are_refused_and_the_one_meant_is_named(tmp_path, tree, image, names, message):
    tree(tmp_path / "d", {name: image if name.endswith(".jpg") else b"<a/>" for name in names if "parquet" not in name})
    if any("parquet" in name for name in names):
        (tmp_path / "d/tables").mkdir()
        parquet.write_table(table({"file_name": ["imgs/0.jpg"]}), tmp_path / "d/tables/meta.parquet")
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "d", tmp_path)
    listing = opened(tmp_path / "d", tmp_path, layout="class-folders")[1]
    assert set(listing.class_ids) == {name.split("/")[0] for name in names}


@pytest.mark.parametrize("names", [["a/b/0.jpg", "a/b/cat/1.jpg"], ["a/b/cat/1.jpg", "a/b/0.jpg", "a/b/dog/2.jpg"]])
def test_one_class_with_images_beside_its_folders_is_a_class(tmp_path, tree, image, names):
    tree(tmp_path / "d", dict.fromkeys(names, image))
    assert opened(tmp_path / "d", tmp_path)[1].class_ids == ("a",)


@pytest.mark.parametrize(
    ("names", "what", "said"),
    [
        ("a", "folder", "1 folder (a)"),
        ("cab", "folder", "3 folders (a, b, c)"),
        ("dcba", "class", "4 classes (a, b, c, …)"),
    ],
)
def test_three_names_are_told_whole_and_more_are_cut(names, what, said):
    assert some(names, what) == said


def test_class_folders_that_hold_the_same_folders_are_said(tmp_path, tree, image):
    names = [f"{outer}/{inner}/0.jpg" for outer in ("real", "fake") for inner in ("cat", "dog")]
    tree(tmp_path / "d", dict.fromkeys(names, image))
    _, listing = opened(tmp_path / "d", tmp_path)
    assert listing.class_ids == ("fake", "real")
    assert any("holds the same folders (cat, dog)" in note for note in listing.notes)


def test_a_dataset_json_one_folder_below_is_not_passed_over(tmp_path, tree, image):
    content = json.dumps({"labels": [["00000/0.png", 1]]}).encode()
    tree(tmp_path / "d", {"afhq/00000/0.png": image, "afhq/dataset.json": content})
    with pytest.raises(UserError, match=r"afhq holds a dataset.json.*name \S+d/afhq in --data"):
        opened(tmp_path / "d", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", b"\xef\xbb\xbffile_name,label\r\n0.jpg,1\r\n"),
        ("labels.tsv", b"id\tBreed\n0\tpug\n"),
        ("metadata.jsonl", b'{"file_name": "0.jpg", "label": 3}\n'),
    ],
)
def test_a_list_of_labels_beside_images_is_not_passed_over(tmp_path, tree, image, name, content):
    for place in ("flat", "split"):
        folder = tmp_path / place
        tree(folder / ("train" if place == "split" else ""), {"0.jpg": image, "1.jpg": image})
        tree(folder, {name: content})
        with pytest.raises(UserError, match=f"{name} has a column '(label|breed)'.*--layout flat"):
            opened(folder, tmp_path)
    assert len(opened(tmp_path / "flat", tmp_path, ignore=name)[1]) == 2
    assert opened(tmp_path / "flat", tmp_path, layout="flat")[1].class_ids == ()
    tree(tmp_path / "captions", {"0.jpg": image, "metadata.csv": b"file_name,text\n0.jpg,a cat\n"})
    assert opened(tmp_path / "captions", tmp_path)[1].class_ids == ()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("val.txt", b"0.jpg 1\r\n1.jpg 0\r\n"),
        ("list.lst", b"train/0.jpg\tcat\n"),
        ("labels.csv", b"\xef\xbb\xbf0.jpg,1\n1.jpg,0\n"),
        ("labels.json", b'{"0.jpg": "cat", "1.jpg": 3}'),
        ("instances.json", b'{"images": [], "annotations": [], "categories": []}'),
    ],
)
def test_neither_is_a_list_without_columns(tmp_path, tree, image, name, content):
    tree(tmp_path / "flat", {"0.jpg": image, "1.jpg": image, name: content})
    with pytest.raises(UserError, match=f"{name} tells a label of each image, but lists are not read.*--layout flat"):
        opened(tmp_path / "flat", tmp_path)
    assert len(opened(tmp_path / "flat", tmp_path, ignore=name)[1]) == 2
    others = {"0.txt": b"a cat", "captions.txt": b"0.jpg a cat\n", "c.json": b'{"0.jpg": "a cat"}', "x.txt": b"2.jpg 3"}
    tree(tmp_path / "captions", {"0.jpg": image, "1.jpg": image, "none.txt": b"", "deep.json": b"[" * 9999, **others})
    assert opened(tmp_path / "captions", tmp_path)[1].class_ids == ()


# --- archives


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
@pytest.mark.parametrize("top", ["", "PetImages/", "set/train/"])
def test_files_beside_the_class_folders_of_an_archive_cost_no_labels(tmp_path, image, suffix, top):
    members = [(f"{top}{name}/{k}.jpg", image) for name in ("cat", "dog") for k in range(2)]
    members += [("readme.txt", b"words"), (f"{top}list.csv", b"a,b")]
    path = archive(tmp_path / f"t{suffix}", members)
    _, listing = opened(path, tmp_path)
    assert classes_of(listing) == ["cat", "cat", "dog", "dog"]
    assert any(note.startswith("left out: 2 beside the folders") for note in listing.notes)
    stray = archive(tmp_path / f"s{suffix}", [*members, ("stray.png", image)])
    with pytest.raises(UserError, match=r"images beside them \(stray.png\).*--layout flat"):
        opened(stray, tmp_path)
    assert opened(stray, tmp_path, layout="flat")[1].class_ids == ()


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_splits_and_parts_in_an_archive_are_no_classes(tmp_path, image, suffix):
    splits = [(f"{split}/{name}/0.jpg", image) for split in ("train", "test") for name in ("cat", "dog")]
    path = archive(tmp_path / f"splits{suffix}", splits)
    assert classes_of(opened(path, tmp_path)[1]) == ["cat", "dog"]
    with pytest.raises(UserError, match="named like splits: choose one by --split"):
        opened(path, tmp_path, split="val")
    assert opened(path, tmp_path, split="val", layout="class-folders")[1].class_ids == ("test", "train")
    flat = archive(tmp_path / f"flat{suffix}", [("train/0.jpg", image), ("val/1.jpg", image)])
    _, listing = opened(flat, tmp_path)
    assert len(listing) == 1 and any("1 of other folders than train" in note for note in listing.notes)
    parts = archive(tmp_path / f"parts{suffix}", [("images/0.jpg", image), ("annotations/0.xml", b"<a/>")])
    with pytest.raises(UserError, match=r"parts of one data set.*--ignore annotations"):
        opened(parts, tmp_path)
    assert len(opened(parts, tmp_path, ignore="annotations")[1]) == 1
    mixed = archive(tmp_path / f"mixed{suffix}", [("cat/0.jpg", image), ("dog/0.jpg", image), ("labels/0.txt", b"x")])
    with pytest.raises(UserError, match=r"hold no images \(labels\)"):
        opened(mixed, tmp_path)
    bus = archive(tmp_path / f"bus{suffix}", [("bus/0.jpg", image), ("train/0.jpg", image)])
    assert classes_of(opened(bus, tmp_path)[1]) == ["bus", "train"]


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
@pytest.mark.parametrize("top", ["", "./", "afhq/"])
def test_dataset_json_in_an_archive_is_read_wherever_its_folder_is(tmp_path, image, suffix, top):
    if suffix == ".zip" and top == "./":
        pytest.skip("zips have no such names")
    names = [f"0000{k // 2}/img{k}.png" for k in range(4)]
    content = json.dumps({"labels": [[name, (k + 1) % 2] for k, name in enumerate(names)]}).encode()
    members = [(f"{top}{name}", image) for name in names]
    path = archive(tmp_path / f"t{suffix}", [*members, (f"{top}dataset.json", content)])
    source, listing = opened(path, tmp_path)
    assert listing.labels.tolist() == [1, 0, 1, 0] and listing.labels_from == "dataset.json"
    assert source.read(listing, 3) == image
    assert classes_of(opened(path, tmp_path, ignore="dataset.json")[1]) == ["00000", "00000", "00001", "00001"]


def test_a_zip_with_the_other_slash_in_its_names_has_its_folders(tmp_path, image):
    """As programs of Windows have written them."""
    content = json.dumps({"labels": [["00000/img0.png", 3]]}).encode()
    members = [("cat\\0.jpg", image), ("dog\\0.jpg", image), ("dog\\", b"")]
    source, listing = opened(archive(tmp_path / "d.zip", members), tmp_path)
    assert classes_of(listing) == ["cat", "dog"] and source.read(listing, 1) == image
    edm = archive(tmp_path / "e.zip", [("00000\\img0.png", image), ("dataset.json", content)])
    assert opened(edm, tmp_path)[1].labels.tolist() == [3]


def test_a_tar_without_the_split_among_others_is_refused(tmp_path, tree, image):
    one = tar_of([("0.jpg", image), ("0.cls", b"1")])
    tree(tmp_path / "d", {"train-0.tar": one, "validation-0.tar": one})
    assert len(opened(tmp_path / "d", tmp_path)[1]) == len(opened(tmp_path / "d", tmp_path, split="val")[1]) == 1
    with pytest.raises(UserError, match="of the splits train, validation, and --split is test"):
        opened(tmp_path / "d", tmp_path, split="test")


# --- labels in tars


def labelled_tar(path, image, extension, labels):
    members = [
        member
        for k, label in enumerate(labels)
        for member in ((f"{k}.jpg", image), (f"{k}.{extension}", label if isinstance(label, bytes) else label.encode()))
    ]
    path.write_bytes(tar_of(members))
    return path


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([{"label": 1.0}, {"label": 0.0}], [1, 0]),
        ([{"label": None}, {"label": 1}], [-1, 1]),
        ([{}, {"label": 1}], [-1, 1]),
        ([{"caption": "x"}, {"class_id": "1"}], [-1, 1]),
    ],
)
def test_labels_in_json_members_are_found_though_the_first_has_none(tmp_path, image, labels, expected):
    path = labelled_tar(tmp_path / "t.tar", image, "json", [json.dumps(content) for content in labels])
    assert opened(path, tmp_path)[1].labels.tolist() == expected


@pytest.mark.parametrize(
    ("extension", "label", "message"),
    [
        ("json", '{"label": [0, 1]}', "is a list"),
        ("cls", "[1, 0]", "is a list"),
        ("cls", "1,0", "is a list"),
        ("cls", '{"id": 3}', "is a list"),
        ("cls", (7).to_bytes(8, "little"), "is no text"),
        ("cls", b"caf\xe9", "is no text"),
    ],
)
def test_what_is_no_label_in_a_tar_is_refused_and_may_be_left_out(tmp_path, image, extension, label, message):
    path = labelled_tar(tmp_path / "t.tar", image, extension, [label, label])
    with pytest.raises(UserError, match=f"{message}.*--layout flat"):
        opened(path, tmp_path)
    assert opened(path, tmp_path, layout="flat")[1].labels.tolist() == [-1, -1]


@pytest.mark.parametrize("name", ["[cat]", "tench, Tinca tinca", "(big) dog", "1st", "3-5"])
def test_names_with_marks_are_names(tmp_path, image, name):
    path = labelled_tar(tmp_path / "t.tar", image, "cls", [name, "other"])
    assert set(opened(path, tmp_path)[1].class_ids) == {name, "other"}


@pytest.mark.parametrize("extension", ["txt", "cls.txt", "index", "json"])
def test_members_that_may_be_labels_and_are_not_read_are_said(tmp_path, image, extension):
    path = labelled_tar(tmp_path / "t.tar", image, extension, ['{"class_name": "a"}', '{"class_name": "b"}'])
    _, listing = opened(path, tmp_path)
    assert listing.class_ids == ()
    assert any(f"no labels are told by the .{extension} members" in note for note in listing.notes)
    told = "json:class_name" if extension == "json" else extension
    if extension == "json":
        assert opened(path, tmp_path, label_column=told)[1].class_ids == ("a", "b")


def test_members_beside_images_that_names_label_are_not_said_to_be_missed(tmp_path, image):
    names = ("n01440764_0", "n01443537_1")
    members = [member for name in names for member in ((f"{name}.jpg", image), (f"{name}.txt", b"a picture"))]
    listing = opened(archive(tmp_path / "t.tar", members), tmp_path)[1]
    assert listing.class_ids == ("n01440764", "n01443537")
    assert not any("no labels are told" in note for note in listing.notes)


# --- tables


@pytest.mark.parametrize("before", ["", "data:image/jpeg;base64,"])
def test_images_written_as_base64_text_are_images_and_paths_are_paths(tmp_path, image, before):
    (tmp_path / "9j").mkdir()
    (tmp_path / "9j" / "x.jpg").write_bytes(image)
    texts = [before + base64.encodebytes(image).decode(), "9j/x.jpg"]
    parquet.write_table(table({"image": texts, "label": [0, 1]}), tmp_path / "x.parquet")
    source, listing = opened(tmp_path, tmp_path)
    assert [source.read(listing, index) for index in range(2)] == [image, image]


def test_tables_of_images_beside_folders_of_images_ask(tmp_path, tree, image):
    tree(tmp_path / "d", {"a/0.jpg": image, "b/0.jpg": image})
    parquet.write_table(rows_of(image, [0, 1, 1]), tmp_path / "d/x.parquet")
    with pytest.raises(UserError, match=r"folders of images beside them \(a, b\).*--layout table or --layout class-"):
        opened(tmp_path / "d", tmp_path)
    assert len(opened(tmp_path / "d", tmp_path, layout="table")[1]) == 3
    assert opened(tmp_path / "d", tmp_path, layout="class-folders")[1].class_ids == ("a", "b")


def test_pictures_and_stores_beside_tables_do_not_change_what_is_read(tmp_path, tree, image):
    """`datasets` would take the commonest kind of file in the folder."""
    (tmp_path / "d/data").mkdir(parents=True)
    for split, count in (("train", 2), ("validation", 3)):
        parquet.write_table(rows_of(image, [1] * count), tmp_path / f"d/data/{split}-00000-of-00001.parquet")
    tree(tmp_path / "d", {f"assets/{k}.png": image for k in range(5)})
    shard = tar_of([("0.cls", b"0"), ("0.moments.npy", b"x")])
    store = {f"train-{k:05d}.tar": shard for k in range(4)} | {"manifest.json": b'{"format": "dit-latents"}'}
    tree(tmp_path / "d/latents", store)
    assert len(opened(tmp_path / "d", tmp_path)[1]) == 2
    assert len(opened(tmp_path / "d", tmp_path, split="validation")[1]) == 3
    with pytest.raises(UserError, match="no table of the split test"):
        opened(tmp_path / "d", tmp_path, split="test")


def test_paths_that_begin_at_a_table_one_folder_below_keep_their_labels(tmp_path, tree, image):
    tree(tmp_path / "d/data", {"0.jpg": image, "1.jpg": image})
    paths = table({"path": ["gone.jpg", "1.jpg"], "label": ["a", "b"]})
    parquet.write_table(paths, tmp_path / "d/data/meta.parquet")
    source, listing = opened(tmp_path / "d", tmp_path)
    assert listing.class_ids == ("a", "b") and source.read(listing, 1) == image
    with pytest.raises(UserError, match=r"gone.jpg is gone"):
        source.read(listing, 0)


def test_rows_without_a_label_are_counted_and_labels_may_be_left_out(tmp_path, image):
    (tmp_path / "d").mkdir()
    parquet.write_table(rows_of(image, [1.0, float("nan"), 0.0]), tmp_path / "d/x.parquet")
    _, listing = opened(tmp_path / "d", tmp_path)
    assert listing.labels.tolist() == [1, -1, 0] and "1 of 3 rows carry no label" in listing.notes
    assert opened(tmp_path / "d", tmp_path, layout="flat")[1].class_ids == ()


def test_names_that_a_table_gives_its_classes_are_without_line_ends(tmp_path, image):
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["\ufeffcat\r", "dog "])})
    rows = {"image": [{"bytes": image, "path": None}] * 2, "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "d")
    assert classes_of(opened(tmp_path / "d", tmp_path)[1]) == ["dog", "cat"]


def test_of_save_to_disk_the_files_that_are_missing_are_named(tmp_path, image):
    rows = datasets.Dataset.from_dict({"image": [{"bytes": image, "path": None}] * 4, "label": [0, 1, 1, 0]})
    rows.save_to_disk(tmp_path / "d", num_shards=2)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(
        tmp_path / "both", num_shards={"train": 2, "test": 1}
    )
    shutil.rmtree(tmp_path / "both/test")
    assert len(opened(tmp_path / "both", tmp_path)[1]) == 4  # another split may be missing
    for place in (tmp_path / "d", tmp_path / "both/train"):
        (place / "data-00001-of-00002.arrow").unlink()
        with pytest.raises(UserError, match=r"missing \(data-00001-of-00002.arrow\).*--anyway"):
            opened(place, tmp_path)
        assert len(opened(place, tmp_path, anyway=True)[1]) == 2


# --- links


def test_links_to_tars_and_tables_that_are_read_themselves_are_no_data(tmp_path, tree, image):
    tree(tmp_path / "t", {"0.tar": tar_of([("0.jpg", image), ("0.cls", b"1")])})
    (tmp_path / "t/latest.tar").symlink_to("0.tar")
    assert opened(tmp_path / "t", tmp_path)[1].keys == ["0.tar/0.jpg"]
    (tmp_path / "p").mkdir()
    parquet.write_table(rows_of(image, [0, 1]), tmp_path / "p/x.parquet")
    (tmp_path / "p/y.parquet").symlink_to("x.parquet")
    assert len(opened(tmp_path / "p", tmp_path)[1]) == 2
    (tmp_path / "q").mkdir()
    (tmp_path / "q/x.tar").symlink_to(tmp_path / "t/0.tar")  # elsewhere: followed
    assert len(opened(tmp_path / "q", tmp_path)[1]) == 1


def test_byte_order_marks_in_lists_of_names_are_no_part_of_them(tmp_path, tree, image):
    from extract.class_names import class_names

    for name, content in (("a.txt", "cat\ndog\n"), ("b.json", '["cat", "dog"]'), ("c.txt", "x\tcat\r\ny\tdog\r\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert class_names(("x", "y"), str(tmp_path / name)) == ("cat", "dog")
    tree(tmp_path / "val", {"ILSVRC2012_val_00000001.JPEG": image})
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfn01440764\r\n")
    assert opened(tmp_path / "val", tmp_path, val_labels=tmp_path / "labels.txt")[1].class_ids == ("n01440764",)


def test_runs_without_a_checkpoint_and_checkpoints_alone_are_no_data(tmp_path, tree, image):
    assert "# The resolved options of this run" in (ROOT / "train" / "run_folder.py").read_text()
    made = {
        "begun/config.yaml": b"# The resolved options of this run; dit-train --config config.yaml repeats it.\nlr: 1\n",
        "begun/samples/0.png": image,
        "converted/config.json": b'{"format": "dit-checkpoint", "version": 1}',
        "converted/ema.safetensors": b"x",
        "features/manifest.json": b'{"format": "dit-features"}',
        "features/train-00000.safetensors": b"x",
    }
    tree(
        tmp_path / "d",
        {"a/0.jpg": image, "b/0.jpg": image, "b/config.yaml": b"mine: 1\n", "a/config.json": b"[]", **made},
    )
    _, listing = opened(tmp_path / "d", tmp_path)
    assert listing.class_ids == ("a", "b") and len(listing) == 4
    for name in ("begun", "converted", "features"):
        with pytest.raises(UserError, match=r"is a (training run|checkpoint|store of features), not images"):
            opened(tmp_path / "d" / name, tmp_path)


# --- the whole command


def test_a_store_within_a_folder_of_tars_is_found_finished_and_replaced(tmp_path, command, tree, make_picture):
    members = [m for k in range(4) for m in ((f"{k}.jpg", make_picture(k)), (f"{k}.cls", str(k % 2).encode()))]
    tree(tmp_path / "d", {"000.tar": tar_of(members)})
    out = tmp_path / "d" / "latents"
    assert command("--out", out, "--format", "webdataset", data=tmp_path / "d")[0] == 0
    status, said = command("--out", out, "--format", "webdataset", data=tmp_path / "d")
    assert status == 0 and "already finished" in said
    assert command("--out", out, "--seed", 1, "--overwrite", data=tmp_path / "d")[0] == 0
    assert command("--out", tmp_path / "d" / "more", data=tmp_path / "d")[0] == 0
    for place in (out, tmp_path / "d" / "more"):
        with LatentStore(place) as store:
            assert len(store) == 4 and store.manifest["class_ids"] == ["0", "1"]
    assert not (out / "README.md").exists()  # it was of the tars that are gone


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded_unless_anyway(tmp_path, command, monkeypatch):
    from extract import progress

    free = progress.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(progress.shutil, "disk_usage", lambda _path: free)
    status, said = command("--out", tmp_path / "s", "--limit", 8)
    assert status == 2 and "but only 1.0 kB are free" in said and "--anyway" in said
    assert not list((tmp_path / "s").glob("train-*"))
    status, said = command("--out", tmp_path / "s", "--limit", 8, "--anyway")
    assert status == 0 and "but only 1.0 kB are free" in said
    with LatentStore(tmp_path / "s") as store:
        assert len(store) == 8


def test_files_of_the_split_that_are_missing_stop_the_command_unless_anyway(tmp_path, command, make_picture):
    (tmp_path / "d").mkdir()
    parquet.write_table(rows_of(make_picture(0), [0, 1]), tmp_path / "d/train-00000-of-00002.parquet")
    status, said = command("--out", tmp_path / "s", data=tmp_path / "d")
    assert status == 2 and "train-00001-of-00002.parquet" in said and not (tmp_path / "s").exists()
    status, said = command("--out", tmp_path / "s", "--anyway", data=tmp_path / "d")
    assert status == 0 and "1 file of the data set is missing" in said
    assert "are copied as Arrow files into" in said and "HF_DATASETS_CACHE names another place" in said
    with LatentStore(tmp_path / "s") as store:
        assert len(store) == 2


def test_a_container_beside_images_is_no_mistake():
    refuse_containers("it", ["a.png", "b.tar"])
    refuse_containers("it", ["a", "b.tar"], lambda name: name == "a")
    with pytest.raises(UserError, match="and no images"):
        refuse_containers("it", ["b.tar"])
