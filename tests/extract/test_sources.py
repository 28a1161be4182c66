"""Every kind of source lists the same way: keys sorted, labels by sorted class names, bytes as they were."""

import functools
import http.server
import io
import json
import os
import tarfile
import threading
import time
import zipfile
from dataclasses import replace

import datasets
import numpy as np
import pytest
import scipy.io

from extract.options import SourceOptions
from extract.sources.labels import BY_LABEL
from extract.sources.listing import UnreadableInputError, cached_listing
from extract.sources.selection import open_source
from pipeline.runtime import remote_copies as remote
from pipeline.runtime.errors import UserError


def opened(data, tmp_path, **flags):
    source = open_source(SourceOptions(data=str(data), **flags), tmp_path / "remote")
    return source, source.inputs()


def read_all(source, listing):
    return {key: source.read(listing, i) for i, key in enumerate(listing.keys)}


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


# --- folders -----------------------------------------------------------------------------------------------------


def test_class_folders_at_any_depth_are_labelled_by_sorted_names(tmp_path, tree, make_picture):
    files = {
        "zebra/b.png": make_picture(0, kind="PNG"),
        "ant/deep/er/x.jpg": make_picture(1),
        "ant/a.weird": make_picture(2),
        "ant b/name with\nnewline ü.jpg": make_picture(3),
    }
    tree(tmp_path / "data", {**files, "zebra/.hidden": b"x", ".git/y": b"x", "ant/Thumbs.db": b"x"})
    source, listing = opened(tmp_path / "data", tmp_path)
    assert listing.keys == sorted(files)
    assert listing.class_ids == ("ant", "ant b", "zebra")
    assert [listing.class_ids[label] for label in listing.labels] == [key.split("/")[0] for key in listing.keys]
    assert read_all(source, listing) == files


def test_renamed_classes_other_labels_and_other_keys_are_other_data(tmp_path, tree, make_picture):
    tree(tmp_path / "data", {f"{'ab'[n % 2]}/{n}.jpg": make_picture(n) for n in range(4)})
    _, listing = opened(tmp_path / "data", tmp_path)
    others = [
        replace(listing, class_ids=("a", "c")),
        replace(listing, class_ids=("ab",)),
        replace(listing, labels=listing.labels[::-1].copy()),
        replace(listing, keys=[*listing.keys[:-1], "b/x.jpg"]),
    ]
    assert len({listing.sha256, *(other.sha256 for other in others)}) == 5
    assert replace(listing, notes=("a note",), mtime_sizes=()).sha256 == listing.sha256


def test_a_flat_folder_is_unlabelled(tmp_path, tree, make_picture):
    tree(tmp_path / "data", {f"{n}.jpg": make_picture(n) for n in range(3)})
    _, listing = opened(tmp_path / "data", tmp_path)
    assert listing.labels.tolist() == [-1, -1, -1] and listing.class_ids == ()


def test_a_folder_named_like_the_split_is_the_data(tmp_path, tree, make_picture):
    tree(tmp_path / "data", {"train/a/0.jpg": make_picture(0), "val/b/1.jpg": make_picture(1)})
    assert opened(tmp_path / "data", tmp_path)[1].keys == ["a/0.jpg"]
    assert opened(tmp_path / "data", tmp_path, split="val")[1].keys == ["b/1.jpg"]
    assert opened(tmp_path / "data", tmp_path, split="other")[1].class_ids == ("train", "val")


def test_an_empty_class_keeps_its_label_and_is_mentioned(tmp_path, tree, make_picture):
    tree(tmp_path / "data", {"a/0.jpg": make_picture(0), "c/1.jpg": make_picture(1)})
    (tmp_path / "data/b").mkdir()
    _, listing = opened(tmp_path / "data", tmp_path)
    assert listing.labels.tolist() == [0, 2]
    assert any("(b)" in note for note in listing.notes)


def test_images_beside_class_folders_are_refused_and_other_files_are_mentioned(tmp_path, tree, make_picture):
    tree(tmp_path / "data", {"a/0.jpg": make_picture(0), "LICENSE": b"words"})
    _, listing = opened(tmp_path / "data", tmp_path)
    assert listing.keys == ["a/0.jpg"] and "LICENSE" in listing.notes[0]
    tree(tmp_path / "data", {"stray.jpg": make_picture(1)})
    with pytest.raises(UserError, match=r"images beside them \(stray.jpg\)"):
        opened(tmp_path / "data", tmp_path)


def test_links_are_followed_once_and_broken_ones_are_bad_inputs(tmp_path, tree, make_picture):
    tree(tmp_path / "data", {"a/0.jpg": make_picture(0)})
    tree(tmp_path / "elsewhere", {"1.jpg": make_picture(1)})
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/again").symlink_to(tmp_path / "data")
    (tmp_path / "data/a/broken.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "data/a/pipe")
    source, listing = opened(tmp_path / "data", tmp_path)
    assert listing.keys == ["a/0.jpg", "a/broken.jpg", "b/1.jpg"]
    with pytest.raises(UnreadableInputError, match="broken symbolic link"):
        source.read(listing, 1)


def test_a_vanished_input_stops_the_command_with_the_way_on(tmp_path, tree, make_picture):
    tree(tmp_path / "data", {"a/0.jpg": make_picture(0)})
    source, listing = opened(tmp_path / "data", tmp_path)
    (tmp_path / "data/a/0.jpg").unlink()
    with pytest.raises(UserError, match="gone since the data was listed.*--overwrite"):
        source.read(listing, 0)


def test_ignored_patterns_are_left_out(tmp_path, tree, make_picture):
    tree(tmp_path / "data", {"a/0.jpg": make_picture(0), "a/0.txt": b"caption", "a/0.json": b"{}"})
    assert opened(tmp_path / "data", tmp_path, ignore="*.txt, *.json")[1].keys == ["a/0.jpg"]


@pytest.mark.parametrize("made", [(), ("empty",), ("data/.hidden",)])
def test_a_folder_without_files_is_refused(tmp_path, made):
    (tmp_path / "data").mkdir()
    for name in made:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match="holds no files"):
        opened(tmp_path / "data", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        opened(tmp_path / "missing", tmp_path)


def test_a_link_to_itself_is_one_bad_input_and_not_the_end(tmp_path, tree, make_picture):
    tree(tmp_path / "data", {"a/0.jpg": make_picture(0)})
    (tmp_path / "data/a/loop.jpg").symlink_to("loop.jpg")
    source, listing = opened(tmp_path / "data", tmp_path)
    assert listing.keys == ["a/0.jpg", "a/loop.jpg"]
    with pytest.raises(UnreadableInputError, match="leads nowhere"):
        source.read(listing, 1)


@pytest.mark.parametrize("damage", [lambda data: data[:2000], lambda data: data[:1000] + b"\xff" + data[1001:]])
def test_a_damaged_cache_of_the_listing_is_made_anew(tmp_path, tree, make_picture, damage):
    tree(tmp_path / "data", {f"a/{n}.jpg": make_picture(0) for n in range(50)})
    source, listing = opened(tmp_path / "data", tmp_path)
    cache = tmp_path / "listing.npz"
    cached_listing(source, cache)
    cache.write_bytes(damage(cache.read_bytes()))
    assert cached_listing(source, cache).keys == listing.keys


def test_folders_named_like_splits_are_mentioned(tmp_path, tree, make_picture):
    tree(tmp_path / "data", {"train/0.jpg": make_picture(0), "val/1.jpg": make_picture(1)})
    _, listing = opened(tmp_path / "data", tmp_path, split="test")
    assert listing.notes == (
        "2 folders (train, val) taken for classes, but named like splits; --split reads one of them",
    )


# --- the cache ---------------------------------------------------------------------------------------------------


def test_the_listing_of_a_zip_is_cached_whole_until_the_zip_changes(tmp_path, make_picture, monkeypatch):
    def write(*labels):
        with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
            for number in range(len(labels)):
                archive.writestr(f"{number}.png", make_picture(number, kind="PNG"))
            about = {"labels": [[f"{number}.png", label] for number, label in enumerate(labels)]}
            archive.writestr("dataset.json", json.dumps(about))

    write(0, 1)
    source, cache = open_source(SourceOptions(data=str(tmp_path / "d.zip")), tmp_path), tmp_path / "listing.npz"
    first = cached_listing(source, cache)
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "inputs", None)
        again = cached_listing(source, cache)
    for name in ("keys", "class_ids", "notes", "labels_from", "order", "sha256"):
        assert getattr(again, name) == getattr(first, name), name
    assert again.order == BY_LABEL and read_all(source, again) == read_all(source, first)
    write(0, 1, 1)
    assert cached_listing(source, cache).labels.tolist() == [0, 1, 1]


def test_the_listing_is_cached_until_a_folder_changes(tmp_path, tree, make_picture):
    names = [f"a/{n}.jpg" for n in range(3)] + [os.fsdecode(b"b/\xff.jpg"), "b/ü\n.jpg"]
    tree(tmp_path / "data", {name: make_picture(n) for n, name in enumerate(names)})
    source = open_source(SourceOptions(data=str(tmp_path / "data")), tmp_path)
    cache = tmp_path / "listing.npz"
    first = cached_listing(source, cache)
    written = cache.stat().st_mtime_ns
    again = cached_listing(source, cache)
    assert cache.stat().st_mtime_ns == written
    assert again.keys == first.keys == sorted(names) and again.sha256 == first.sha256
    assert again.printable_key(sorted(names).index(os.fsdecode(b"b/\xff.jpg"))) == "b/\\xff.jpg"
    time.sleep(0.02)
    tree(tmp_path / "data", {"a/new.jpg": make_picture(9)})
    assert "a/new.jpg" in cached_listing(source, cache).keys
    cache.write_bytes(b"damaged")
    assert len(cached_listing(source, cache)) == 6


def test_a_million_cached_inputs_load_in_seconds(tmp_path, tree, make_picture):
    from extract.sources.listing import MtimeSize, _load, _save, sorted_listing

    keys = [f"n{n // 1300:08d}/n{n // 1300:08d}_{n}.JPEG" for n in range(1_000_000)]
    labels, names = np.arange(1_000_000) // 1300, tuple(f"n{number:08d}" for number in range(770))
    listing = sorted_listing(keys, labels, class_ids=names, mtime_sizes=[MtimeSize.of(tmp_path)])
    _save(tmp_path / "listing.npz", "x", listing)
    os.utime(tmp_path, ns=(0, listing.mtime_sizes[0].changed_ns))
    began = time.process_time()
    loaded = _load(tmp_path / "listing.npz", "x")
    assert loaded is not None and loaded.sha256 == listing.sha256
    assert time.process_time() - began < 5


# --- WebDataset --------------------------------------------------------------------------------------------------


@pytest.fixture
def webdataset(tmp_path, make_picture):
    pictures = {f"{t}/{n}": make_picture(10 * t + n) for t in range(2) for n in range(3)}
    (tmp_path / "wds").mkdir()
    for t in range(2):
        files = []
        for n in range(3):
            files += [
                (f"s{n}.cls", str((t + n) % 3).encode()),
                (f"s{n}.jpg", pictures[f"{t}/{n}"]),
                (f"s{n}.json", b"{}"),
            ]
        (tmp_path / f"wds/part-{t:03d}.tar").write_bytes(tar_of(files))
    return tmp_path / "wds", {f"part-{t:03d}.tar/s{n}.jpg": pictures[f"{t}/{n}"] for t in range(2) for n in range(3)}


def test_webdataset_tars_are_read_in_place(tmp_path, webdataset):
    folder, pictures = webdataset
    source, listing = opened(folder / "part-{000..001}.tar", tmp_path)
    assert read_all(source, listing) == pictures
    assert listing.labels.tolist() == [0, 1, 2, 1, 2, 0] and listing.class_ids == ("0", "1", "2")
    _, one = opened(folder / "part-001.tar", tmp_path)
    assert one.keys == ["part-001.tar/s0.jpg", "part-001.tar/s1.jpg", "part-001.tar/s2.jpg"]


def test_a_folder_of_tars_is_read_as_tars_those_of_the_split_if_names_tell(tmp_path, webdataset, make_picture):
    folder, pictures = webdataset
    assert opened(folder, tmp_path)[1].keys == sorted(pictures)
    (folder / "val-000.tar").write_bytes(tar_of([("1.jpg", make_picture(1))]))
    assert opened(folder, tmp_path, split="val")[1].keys == ["val-000.tar/1.jpg"]


def test_webdataset_without_labels_is_unlabelled_and_names_may_be_labels(tmp_path, make_picture):
    (tmp_path / "a.tar").write_bytes(tar_of([("x/1.png", make_picture(1)), ("x/2.jpg", make_picture(2))]))
    assert opened(tmp_path / "a.tar", tmp_path)[1].labels.tolist() == [-1, -1]
    files = [("1.png", make_picture(1)), ("1.cls", b"dog\n"), ("2.png", make_picture(2)), ("2.cls", b"ant")]
    (tmp_path / "b.tar").write_bytes(tar_of(files))
    listing = opened(tmp_path / "b.tar", tmp_path)[1]
    assert listing.class_ids == ("ant", "dog") and listing.labels.tolist() == [1, 0]


def test_two_images_in_a_sample_need_a_choice(tmp_path, make_picture):
    (tmp_path / "a.tar").write_bytes(tar_of([("1.left.jpg", make_picture(1)), ("1.right.jpg", make_picture(2))]))
    with pytest.raises(UserError, match="--image-column"):
        opened(tmp_path / "a.tar", tmp_path)
    source, listing = opened(tmp_path / "a.tar", tmp_path, image_column="right.jpg")
    assert source.read(listing, 0) == make_picture(2)


@pytest.mark.parametrize("keep", [700, 512 * 3, 1024 * 2])
def test_a_tar_that_is_cut_off_is_refused_by_name(tmp_path, make_picture, keep):
    data = tar_of([(f"{n}.jpg", make_picture(n)) for n in range(3)])
    end_of_last = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for length in (keep, end_of_last):
        (tmp_path / "cut.tar").write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut.tar"):
            opened(tmp_path / "cut.tar", tmp_path)


def test_compressed_tars_and_unbalanced_braces_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match="unpack it first"):
        opened(tmp_path / "a.tar.gz", tmp_path)
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar.gz").read_bytes())
    with pytest.raises(UserError, match="uncompressed tar"):
        opened(tmp_path / "b.tar", tmp_path)
    with pytest.raises(UserError, match="brace"):
        opened(tmp_path / "x-{000..1.tar", tmp_path)


def test_tars_behind_a_url_are_fetched_once_and_read_like_local_ones(tmp_path, webdataset):
    folder, pictures = webdataset
    served = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            served.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/part-{{000..001}}.tar"
        source, listing = opened(url, tmp_path)
        assert read_all(source, listing) == pictures
        count = len(served)
        assert source.inputs().sha256 == listing.sha256 == opened(folder / "part-{000..001}.tar", tmp_path)[1].sha256
        assert len(served) == count
        with pytest.raises(UserError, match=r"part-007.tar cannot be fetched"):
            opened(f"http://127.0.0.1:{server.server_port}/part-007.tar", tmp_path)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert sorted(path.name[17:] for path in (tmp_path / "remote").iterdir()) == ["part-000.tar", "part-001.tar"]


@pytest.mark.parametrize("when", ["between two runs", "while it is fetched"])
def test_a_tar_that_is_replaced_on_the_server_is_not_taken_for_the_one_before(
    tmp_path, make_picture, monkeypatch, serve, when
):
    tar = tmp_path / "served" / "part.tar"
    tar.parent.mkdir()
    pictures = [make_picture(number, kind="BMP") for number in range(2)]  # of one size
    tar.write_bytes(tar_of([("a.bmp", pictures[0])]))
    os.utime(tar, (1, 1))

    def put_another():
        tar.write_bytes(tar_of([("a.bmp", pictures[1])]))

    url = f"{serve(tar.parent)}/part.tar"
    if when == "while it is fetched":
        honest = remote.pieces_of

        def slow(*arguments, **more):
            yield from honest(*arguments, **more)
            put_another()

        monkeypatch.setattr(remote, "pieces_of", slow)
        with pytest.raises(UserError, match="was replaced on the server meanwhile"):
            opened(url, tmp_path)
        assert list((tmp_path / "remote").iterdir()) == []
        return
    source, listing = opened(url, tmp_path)
    assert source.read(listing, 0) == pictures[0]
    served = source.as_served
    put_another()
    remote.local_place.cache_clear()  # as in another process
    source, listing = opened(url, tmp_path)
    assert source.read(listing, 0) == pictures[1]
    assert source.as_served != served


def test_a_copy_is_gone_on_with_where_the_server_cannot_be_asked(tmp_path, make_picture, serve, caplog):
    (tmp_path / "served").mkdir()
    (tmp_path / "served/part.tar").write_bytes(tar_of([("a.jpg", make_picture(0))]))
    url = f"{serve(tmp_path / 'served')}/part.tar"
    opened(url, tmp_path)
    (tmp_path / "served/part.tar").unlink()
    remote.local_place.cache_clear()
    source, listing = opened(url, tmp_path)
    assert source.read(listing, 0) == make_picture(0)
    assert "cannot be asked whether it has changed" in caplog.text


def test_links_in_a_tar_are_bad_inputs_and_not_silence(tmp_path, make_picture):
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        first = tarfile.TarInfo("0.jpg")
        first.size = len(make_picture(0))
        archive.addfile(first, io.BytesIO(make_picture(0)))
        for name, kind in (("1.jpg", tarfile.LNKTYPE), ("2.jpg", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "0.jpg"
            archive.addfile(link)
    source, listing = opened(tmp_path / "t.tar", tmp_path)
    assert listing.keys == ["t.tar/0.jpg", "t.tar/1.jpg", "t.tar/2.jpg"]
    assert source.read(listing, 0) == make_picture(0)
    for index in (1, 2):
        with pytest.raises(UnreadableInputError, match="a link in the tar, without contents"):
            source.read(listing, index)


def test_a_name_that_comes_twice_in_a_sample_is_refused(tmp_path, make_picture):
    (tmp_path / "t.tar").write_bytes(tar_of([("a.jpg", make_picture(0)), ("a.cls", b"1")] * 2))
    with pytest.raises(UserError, match=r"a\.jpg comes twice in one sample of its tar"):
        opened(tmp_path / "t.tar", tmp_path)


def test_tars_joined_by_cat_are_refused(tmp_path, make_picture):
    one = tar_of([("a.jpg", make_picture(0))])
    (tmp_path / "t.tar").write_bytes(one + one)
    with pytest.raises(UserError, match="goes on after its end mark"):
        opened(tmp_path / "t.tar", tmp_path)


@pytest.mark.parametrize(("text", "class_ids"), [("²", ("²",)), ("--5", ("--5",)), ("7", tuple("01234567"))])
def test_only_whole_numbers_are_labels(tmp_path, make_picture, text, class_ids):
    (tmp_path / "t.tar").write_bytes(tar_of([("a.jpg", make_picture(0)), ("a.cls", text.encode())]))
    assert opened(tmp_path / "t.tar", tmp_path)[1].class_ids == class_ids


def test_a_label_far_beyond_the_samples_is_refused(tmp_path, make_picture):
    (tmp_path / "t.tar").write_bytes(tar_of([("a.jpg", make_picture(0)), ("a.cls", b"20240131")]))
    with pytest.raises(UserError, match=r"a label is 20,240,131, .* choose what holds the labels by --label-column"):
        opened(tmp_path / "t.tar", tmp_path)


def test_images_beside_tars_are_not_passed_over_in_silence(tmp_path, tree, make_picture):
    tree(tmp_path / "d", {"0.jpg": make_picture(0), "t.tar": tar_of([("a.jpg", make_picture(0))]), "t.json": b"{}"})
    with pytest.raises(UserError, match="holds tars .* and also images beside them"):
        opened(tmp_path / "d", tmp_path)
    (tmp_path / "d/0.jpg").unlink()
    assert opened(tmp_path / "d", tmp_path)[1].keys == ["t.tar/a.jpg"]


@pytest.mark.parametrize("answer", ["not there", "refused"])
def test_an_address_that_cannot_be_fetched_says_why(tmp_path, answer):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        port = served.server_port
        if answer == "refused":
            served.shutdown()
            served.server_close()
        address = f"http://127.0.0.1:{port}/x.tar"
        with pytest.raises(UserError) as error:
            opened(address, tmp_path)
        served.shutdown()
    said = str(error.value)
    assert said.startswith(f"{address} cannot be fetched (") and f"({address})" not in said


# --- ImageNet as it comes ----------------------------------------------------------------------------------------

SYNSETS = ["n02119789", "n01440764", "n03126707"]  # ILSVRC ids 1, 2, 3: not in sorted order, as in the real kit
VAL = [3, 1, 2, 1]
LABELS = [2, 1, 0, 1]  # by sorted synset


@pytest.fixture
def devkit(tmp_path):
    rows = [(i + 1, s, f"words {i}", "gloss", 0, 0, 0, 0) for i, s in enumerate(SYNSETS)]
    rows.append((4, "n00000001", "an inner node", "gloss", 3, 0, 0, 0))
    names = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    kinds = ["O"] * len(names)
    table = np.array(rows, dtype=list(zip(names, kinds, strict=True))).reshape(-1, 1)
    folder = tmp_path / "ILSVRC2012_devkit_t12/data"
    folder.mkdir(parents=True)
    scipy.io.savemat(folder / "meta.mat", {"synsets": table})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{n}\n" for n in VAL))
    return folder.parent


@pytest.fixture
def val_tar(tmp_path, make_picture):
    names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 5)]
    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar_of([(name, make_picture(n)) for n, name in enumerate(names)]))
    return path


def test_imagenets_training_tar_of_tars_is_read_in_place(tmp_path, make_picture):
    inner = {s: [(f"{s}_{n}.JPEG", make_picture(n + 10 * k)) for n in range(2)] for k, s in enumerate(SYNSETS)}
    outer = tar_of([(f"{synset}.tar", tar_of(files)) for synset, files in inner.items()])
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(outer)
    source, listing = opened(tmp_path / "ILSVRC2012_img_train.tar", tmp_path)
    assert listing.class_ids == tuple(sorted(SYNSETS))
    assert read_all(source, listing) == {f"{s}/{name}": data for s, files in inner.items() for name, data in files}
    assert listing.labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("form", ["devkit", "meta.mat", "ground truth and devkit", "synsets", "kaggle"])
def test_validation_labels_come_from_the_synsets(tmp_path, devkit, val_tar, form):
    synsets = [SYNSETS[number - 1] for number in VAL]
    (tmp_path / "synsets.txt").write_text("\n".join(synsets))
    rows = [f"ILSVRC2012_val_{n:08d},{s} 1 2 3 4 {s} 5 6 7 8" for n, s in enumerate(synsets, 1)]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]))
    flags = {
        "devkit": {"devkit": devkit},
        "meta.mat": {"devkit": devkit / "data/meta.mat"},
        "ground truth and devkit": {
            "devkit": devkit,
            "val_labels": devkit / "data/ILSVRC2012_validation_ground_truth.txt",
        },
        "synsets": {"val_labels": tmp_path / "synsets.txt"},
        "kaggle": {"val_labels": tmp_path / "LOC_val_solution.csv"},
    }[form]
    _, listing = opened(val_tar, tmp_path, **flags)
    assert listing.class_ids == tuple(sorted(SYNSETS)) and listing.labels.tolist() == LABELS


def test_the_bare_ground_truth_file_is_refused_with_the_reason(tmp_path, devkit, val_tar):
    with pytest.raises(UserError, match="ILSVRC ids .* not labels of the sorted synsets"):
        opened(val_tar, tmp_path, val_labels=devkit / "data/ILSVRC2012_validation_ground_truth.txt")
    with pytest.raises(UserError, match="carry no labels; add --devkit"):
        opened(val_tar, tmp_path)
    (tmp_path / "short.txt").write_text("n01440764\nn02119789\n")
    with pytest.raises(UserError, match="2 of 4 files .* no label in the list of 2"):
        opened(val_tar, tmp_path, val_labels=tmp_path / "short.txt")


def test_kaggles_layout_is_found_from_its_top_folder(tmp_path, tree, make_picture):
    top = tree(
        tmp_path / "kaggle",
        {
            "ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_1.JPEG": make_picture(0),
            "ILSVRC/Data/CLS-LOC/train/n03126707/n03126707_1.JPEG": make_picture(1),
            "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG": make_picture(2),
            "ILSVRC/Annotations/x.xml": b"<x/>",
            "LOC_val_solution.csv": b"ImageId,PredictionString\nILSVRC2012_val_00000001,n03126707 1 2 3 4\n"
            b"ILSVRC2012_val_00000002,n01440764 1 2 3 4\n",
        },
    )
    for data in (top, top / "ILSVRC"):
        assert opened(data, tmp_path)[1].class_ids == ("n01440764", "n03126707")
        val = opened(data, tmp_path, split="val")[1]
        assert val.keys == ["ILSVRC2012_val_00000001.JPEG"] and val.labels.tolist() == [1]
    tree(top / "ILSVRC/Data/CLS-LOC/val", {"Thumbs.db": b"x", "0.txt": b"x", "zz.txt": b"x"})
    val = opened(top, tmp_path, split="val", ignore="*.txt")[1]
    assert val.keys == ["ILSVRC2012_val_00000001.JPEG"] and val.labels.tolist() == [1]
    with pytest.raises(UserError, match=r"2 of 3 files in .* have no label"):
        opened(top, tmp_path, split="val")


def test_imagenets_tars_are_found_in_a_folder_that_holds_the_devkit_too(tmp_path, tree, make_picture):
    inner = tar_of([(f"{SYNSETS[0]}_0.JPEG", make_picture(0))])
    tars = {f"ILSVRC2012_img_{split}.tar": tar_of([(f"{SYNSETS[0]}.tar", inner)]) for split in ("train", "other")}
    tree(tmp_path / "d", {**tars, "ILSVRC2012_devkit_t12/readme.txt": b"words"})
    assert opened(tmp_path / "d", tmp_path)[1].class_ids == (SYNSETS[0],)


# --- data sets of tables -----------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path, monkeypatch, make_picture):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "ant"])})
    rows = {"image": [{"bytes": make_picture(n), "path": None} for n in range(4)], "label": [1, 0, 0, 1]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("form", ["parquet", "parquet by split", "parquet by name", "arrow", "arrow by split"])
def test_local_tables_keep_their_rows_and_label_names(tmp_path, table, form, make_picture):
    folder = tmp_path / "tables"
    folder.mkdir()
    if form == "parquet":
        table.to_parquet(folder / "x.parquet")
    elif form == "parquet by split":
        (folder / "data").mkdir()
        table.to_parquet(folder / "data/train-00000-of-00001.parquet")
        table.select([0]).to_parquet(folder / "data/test-00000-of-00001.parquet")
    elif form == "parquet by name":
        table.to_parquet(folder / "train-00000-of-00001.parquet")
        table.select([0]).to_parquet(folder / "validation-00000-of-00001.parquet")
    elif form == "arrow":
        table.save_to_disk(folder)
    else:
        datasets.DatasetDict({"train": table}).save_to_disk(folder)
    source, listing = opened(folder, tmp_path)
    assert listing.keys == ["0", "1", "2", "3"]
    assert listing.class_ids == ("dog", "ant") and listing.labels.tolist() == [1, 0, 0, 1]
    assert [source.read(listing, n) for n in range(4)] == [make_picture(n) for n in range(4)]


def test_a_table_without_an_image_column_or_with_several_label_columns_asks(tmp_path, table):
    folder = tmp_path / "tables"
    folder.mkdir()
    table.remove_columns("image").to_parquet(folder / "x.parquet")
    with pytest.raises(UserError, match="no image column among label"):
        opened(folder, tmp_path)
    fine = table.rename_column("label", "fine_label").add_column("coarse_label", [0, 0, 1, 1])
    fine = fine.cast_column("coarse_label", datasets.ClassLabel(names=["x", "y"]))
    fine.to_parquet(folder / "x.parquet")
    with pytest.raises(UserError, match=r"2 label columns \(fine_label, coarse_label\); choose one by --label-column"):
        opened(folder, tmp_path)
    assert opened(folder, tmp_path, label_column="coarse_label")[1].labels.tolist() == [0, 0, 1, 1]


def test_a_data_set_that_cannot_be_had_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="hf:nobody/nothing cannot be opened as a data set"):
        opened("hf:nobody/nothing", tmp_path)


def test_labels_of_other_kinds_of_source_need_no_validation_list(tmp_path, tree, make_picture):
    (tmp_path / "a.tar").write_bytes(tar_of([("1.jpg", make_picture(1))]))
    (tmp_path / "synsets.txt").write_text("n01440764\n")
    with pytest.raises(UserError, match="leave these flags out"):
        opened(tmp_path / "a.tar", tmp_path, val_labels=tmp_path / "synsets.txt")
