"""Random trees of every layout of docs/sources.md, with all that lies about on disks, against a plain reading.

Each picture has bytes of its own, so that what a source reads is compared by content: which picture has which class.
"""

import json
import random
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from extract.options import SourceOptions
from extract.sources.selection import open_source
from pipeline.image_names import IMAGE_SUFFIXES, LITTER
from pipeline.runtime.errors import UserError
from tests.extract.test_sources import tar_of

IMAGE = b"\xff\xd8\xff\xe0 looks like a picture "
TEXTS = ("cat", "dog", "a.b", "ü", "x y", "[bus]", "10th", "Train")
LITTERED = (*LITTER, "THUMBS.DB", ".hidden", "._0.jpg", "Lost+Found", "@EADIR")
STEMS = ("0", "1", "10", "a.v1", "a.v2", "a", "b.0.5", "__tag__3", "é", "x y", "n.n")
SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in (".heic", ".heif", ".jxl", ".avif"))


@dataclass
class Made:
    """What a builder left, and what a plain reading of it is."""

    place: Path
    of_bytes: dict[bytes, str | None]
    """The class of every picture."""
    classes: list[str]
    """In the order of their labels."""
    flags: dict[str, str] = field(default_factory=dict)


@st.composite
def samples(draw):
    """(class, stem) of some pictures: classes called by words, numbers or synsets; and a source of chance."""
    family = draw(st.sampled_from([TEXTS, [str(n) for n in range(13)], ["n01440764", "n01443537", "n01484850"]]))
    pairs = st.tuples(st.sampled_from(family), st.sampled_from(STEMS))
    return draw(st.lists(pairs, min_size=1, max_size=9, unique=True)), random.Random(draw(st.integers(0, 1 << 30)))


def in_order(names):
    """As the page says: numbers as numbers, else text."""
    distinct = set(names)
    return sorted(distinct, key=(lambda name: (int(name), name)) if all(map(str.isdigit, distinct)) else str)


def picture(number):
    return IMAGE + str(number).encode()


def write(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def packed(path, files, chance):
    """A tar or a zip of the files, in any order."""
    members = list(files.items())
    chance.shuffle(members)
    if path.suffix == ".tar":
        path.write_bytes(tar_of(members))
    else:
        with zipfile.ZipFile(path, "w", chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name, data in members:
                archive.writestr(name, data)
    return path


def littered(files, chance, *, stores=True):
    """The files, and among them what is never data."""
    found, folders = dict(files), sorted({"", *(name.rpartition("/")[0] for name in files)})
    for _ in range(chance.randrange(5)):
        folder = chance.choice(folders)
        name = "/".join(filter(None, [folder, chance.choice(LITTERED), chance.choice(["", "0.jpg", "deep/1.png"])]))
        if not any(other.startswith(f"{name}/") or name.startswith(f"{other}/") for other in found):
            found.setdefault(name, IMAGE + b"litter")
    if stores and chance.random() < 0.3:
        found |= {"latents/manifest.json": b'{"format": "dit-latents"}', "latents/train-00000.safetensors": b"x"}
    if stores and chance.random() < 0.3:
        found |= {"run/config.yaml": b"", "run/checkpoints/a": b"", "run/samples/0.png": IMAGE}
    return found


# --- builders: a layout each


def class_files(pairs, chance):
    """{path: bytes} of class folders, some with folders in them."""
    several = len({name for name, _ in pairs}) > 1
    inner = ("", "in/", "in/deep/") if several else ("",)
    return {
        f"{name}/{chance.choice(inner)}{stem}{chance.choice(SUFFIXES)}": picture(number)
        for number, (name, stem) in enumerate(pairs)
    }


def by_class(pairs):
    return {picture(number): name for number, (name, _) in enumerate(pairs)}, in_order(name for name, _ in pairs)


def class_folders(top, pairs, chance):
    files = littered(class_files(pairs, chance), chance)
    if chance.random() < 0.5:
        files["LICENSE"] = b"words"
    root = top / chance.choice(["d", "d/train"])
    write(root, files)
    return Made(top / "d", *by_class(pairs))


def links_to_class_folders(top, pairs, chance):
    write(top / "real", class_files(pairs, chance))
    (top / "d").mkdir()
    for name in {name for name, _ in pairs}:
        (top / "d" / name).symlink_to(top / "real" / name)
    first = in_order(name for name, _ in pairs)[0]
    (top / "d" / first / "again").symlink_to(top / "d")
    return Made(top / "d", *by_class(pairs))


def archived_class_folders(suffix):
    def build(top, pairs, chance):
        pairs = [
            *pairs,
            ("n01440764" if pairs[0][0].startswith("n0") else "7" if pairs[0][0].isdigit() else "eel", "z"),
        ]
        if len({name for name, _ in pairs}) == 1:
            pairs[-1] = ("n01443537" if pairs[0][0].startswith("n0") else "8", "z")
        folder = chance.choice(["", "set/", "set/train/", "train/"])
        files = {folder + name: data for name, data in class_files(pairs, chance).items()}
        if "train/" in folder:
            files[folder.replace("train/", "val/") + "cat/0.jpg"] = IMAGE
        if chance.random() < 0.5:
            files["README.txt"] = b"words"
        files = littered(files, chance, stores=False)
        if suffix == ".tar":  # names that share what stands before the first dot would be one sample
            files = {name.replace("a.v", "a-v").replace("b.0.5", "b"): data for name, data in files.items()}
        return Made(packed(top / f"d{suffix}", files, chance), *by_class(pairs))

    return build


def dataset_json(kind):
    def build(top, pairs, chance):
        files = {f"{number // 2:05d}/img{number}.png": picture(number) for number in range(len(pairs))}
        labels = [chance.randrange(4) for _ in pairs]
        told = [chance.choice([str, lambda name: name.replace("/", "\\")])(name) for name in files]
        rows = [[name, chance.choice([int, float])(label)] for name, label in zip(told, labels, strict=True)]
        content = {"labels": chance.choice([rows, dict(rows)])}
        mark = chance.choice(["", "\ufeff"])
        files = littered(files | {"dataset.json": (mark + json.dumps(content)).encode()}, chance, stores=not kind)
        folder = chance.choice(["", "afhq/"]) if kind else ""
        files = {folder + name: data for name, data in files.items()}
        expected = {picture(number): str(label) for number, label in enumerate(labels)}
        if not kind:
            write(top / "d", files)
            return Made(top / "d", expected, [str(n) for n in range(max(labels) + 1)])
        place = packed(top / f"d{kind}", files, chance)
        return Made(place, expected, [str(n) for n in range(max(labels) + 1)])

    return build


def webdataset(top, pairs, chance):
    """Odd names, labels of any kind, members in any order, in one tar or several, in a folder or not."""
    numbers = all(name.isdigit() for name, _ in pairs)
    kind = chance.choice(["cls", "CLS", "label", "class", "json"])
    ends = ("", "\r\n", " ", "\n") if kind != "json" else ("",)
    tars = [[] for _ in range(chance.randrange(1, 3))]
    for number, (name, stem) in enumerate(pairs):
        key = (
            f"{chance.choice(['', 'sub/', 'sub.d/er/'])}{number}-{stem}"
            if chance.random() < 0.5
            else f"k{number}/{stem}"
        )
        suffix = chance.choice(SUFFIXES)
        told = f"{chance.choice(['', '.0'])}" if numbers else ""
        text = chance.choice(["", "\ufeff"]) + name + told + chance.choice(ends)
        value = json.dumps({"caption": "c", "label": (int(name) if numbers else name)}) if kind == "json" else text
        image = (f"{key}{chance.choice([suffix, suffix.upper()])}", picture(number))
        chance.choice(tars).append([image, (f"{key}.{kind}", value.encode())])
    tars = [tar for tar in tars if tar]
    (top / "d").mkdir()
    for number, tar in enumerate(tars):
        chance.shuffle(tar)
        order = chance.choice(["grouped", "images first", "any"])
        members = [member for sample in tar for member in sample]
        if order == "images first":
            members.sort(key=lambda member: not member[1].startswith(IMAGE))
        elif order == "any":
            chance.shuffle(members)
        members += [("__worker__", b"x"), ("._0.jpg", b"x")] if chance.random() < 0.5 else []
        (top / f"d/{number}.tar").write_bytes(tar_of(members))
    (top / "d/logs").mkdir()
    write(top / "d", {".DS_Store": b"x", "latents/manifest.json": b'{"format": "dit-latents"}', "latents/0.tar": b"x"})
    place = top / "d/0.tar" if len(tars) == 1 and chance.random() < 0.5 else top / "d"
    expected, classes = by_class(pairs)
    return Made(place, expected, [str(n) for n in range(int(classes[-1]) + 1)] if numbers else classes)


def class_tars(top, pairs, chance):
    (top / "d").mkdir()
    for name in {name for name, _ in pairs}:
        files = {f"{name}_{number}.JPEG": picture(number) for number, pair in enumerate(pairs) if pair[0] == name}
        packed(top / f"d/{name}.tar", files, chance)
    return Made(top / "d", *by_class(pairs), {"layout": "class-tars"})


def flat(top, pairs, chance):
    """Without labels, or with synsets in the names of files."""
    are_synsets = pairs[0][0].startswith("n0")
    names = [
        f"{name}_{number}_{name}.JPEG" if are_synsets else f"{number}.jpg" for number, (name, _) in enumerate(pairs)
    ]
    files = dict(zip(names, map(picture, range(len(pairs))), strict=True))
    kind = chance.choice(["", ".tar", ".zip"])
    if kind:
        place = packed(top / f"d{kind}", files, chance)
    else:
        place = top / "d"
        write(place, littered(files, chance))
    if are_synsets:
        return Made(place, *by_class(pairs))
    return Made(place, dict.fromkeys(files.values()), [])


def wrapped(top, pairs, chance):
    """Refused, as nothing tells the classes from folders of parts; and read where it is said what is meant."""
    files = class_files([*pairs, (f"{pairs[0][0]}0", "w"), (f"{pairs[0][0]}1", "w")], chance)
    folder = chance.choice(["images", "data", "some/where", "archive"])
    write(top / "d", littered({f"{folder}/{name}": data for name, data in files.items()}, chance))
    with pytest.raises(UserError, match=rf"name {top / 'd' / folder} in --data.*--layout class-folders"):
        read(top / "d", {})
    everything = {data: folder.split("/")[0] for data in files.values()}
    return Made(top / "d", everything, [folder.split("/")[0]], {"layout": "class-folders"})


def tables(top, pairs, chance):
    """Rows with bytes, or with paths, in one or several files of a split, and what `save_to_disk` writes."""
    numbers = all(name.isdigit() for name, _ in pairs)
    labels = [chance.choice([int, float])(name) if numbers else name for name, _ in pairs]
    labels = list(map(float, labels)) if any(isinstance(label, float) for label in labels) else labels
    expected, classes = by_class(pairs)
    classes = [str(n) for n in range(int(classes[-1]) + 1)] if numbers else classes
    kind = chance.choice(["bytes", "binary", "paths", "save_to_disk"])
    images = [{"bytes": picture(number), "path": None} for number in range(len(pairs))]
    (top / "d").mkdir()
    if kind == "save_to_disk":
        names = in_order(name for name, _ in pairs)
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        values = [names.index(name) for name, _ in pairs]
        datasets.Dataset.from_dict({"image": images, "label": values}, features=kinds).save_to_disk(top / "d")
        return Made(top / "d", expected, names)
    if kind == "paths":
        write(top / "d/imgs", {f"{number}.jpg": picture(number) for number in range(len(pairs))})
    column = {
        "bytes": ("image", images),
        "binary": ("jpg", [image["bytes"] for image in images]),
        "paths": ("file_name", [f"imgs/{number}.jpg" for number in range(len(pairs))]),
    }[kind]
    rows = pa.table({column[0]: column[1], "label": labels})
    if kind == "bytes" and len(pairs) > 1:
        for part, (start, end) in enumerate(((0, 1), (1, len(pairs)))):
            parquet.write_table(rows.slice(start, end - start), top / f"d/train-{part:05d}-of-00002.parquet")
        parquet.write_table(rows.slice(0, 1), top / "d/test-00000-of-00001.parquet")
        write(top / "d", {"README.md": b"# Pets", "assets/logo.png": IMAGE})
    else:
        parquet.write_table(rows, top / "d/rows.parquet")
    return Made(top / "d", expected, classes)


LAYOUTS = {
    "class folders": class_folders,
    "links": links_to_class_folders,
    "class folders in a tar": archived_class_folders(".tar"),
    "class folders in a zip": archived_class_folders(".zip"),
    "dataset.json": dataset_json(""),
    "dataset.json in a tar": dataset_json(".tar"),
    "dataset.json in a zip": dataset_json(".zip"),
    "WebDataset": webdataset,
    "class tars": class_tars,
    "flat": flat,
    "wrapped": wrapped,
    "tables": tables,
}
EXAMPLES = {"tables": 12, "WebDataset": 60, "class folders": 40}


def read(place, flags):
    """The class of every picture by its bytes, how many there are, and all classes in the order of their labels."""
    source = open_source(SourceOptions(data=str(place), **flags), place.parent / "copies")
    listing = source.inputs()
    named = [listing.class_ids[label] if label >= 0 else None for label in listing.labels.tolist()]
    found = {source.read(listing, number): name for number, name in enumerate(named)}
    return found, len(listing), list(listing.class_ids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_trees_are_read_as_a_plain_reading_does(layout, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    @given(given=samples())
    @settings(
        max_examples=EXAMPLES.get(layout, 25),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def compare(given):
        top = Path(tempfile.mkdtemp(dir=tmp_path))
        try:
            made = LAYOUTS[layout](top, *given)
            found, count, classes = read(made.place, made.flags)
            assert (found, count) == (made.of_bytes, len(made.of_bytes))
            assert classes == made.classes
        finally:
            shutil.rmtree(top)

    compare()
