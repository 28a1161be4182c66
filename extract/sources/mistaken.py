"""What is more likely a mistake than a wish: folders that are no classes, and files that hold images but are none.

Each refusal says what was found, what is probably meant, and how to say that it is meant as it is.
"""

import fnmatch
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from extract.sources.dataset_json import DATASET_JSON
from extract.sources.labels import PARTS, is_split
from extract.sources.listing import printable
from pipeline.image_names import named_like_image
from pipeline.runtime.errors import UserError

COMPRESSED = (
    "*.tar.gz",
    "*.tgz",
    "*.tar.bz2",
    "*.tbz2",
    "*.tar.xz",
    "*.tar.zst",
    "*.7z",
    "*.rar",
    "*.gz",
    "*.xz",
    "*.zst",
)
_CONVERT = "write their images as files in class folders, or as WebDataset tars, first"
_SCRIPT = f'{_CONVERT} (docs/sources.md, "Images inside other files", has a script)'
CONTAINERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("*.mds", "*.mds.*"), "MosaicML's streaming shards (MDS)", _SCRIPT),
    (("*.tfrecord*", "*.tfrec", "*-of-[0-9][0-9][0-9][0-9][0-9]"), "TFRecord files", _SCRIPT),
    (("*.mdb", "*.lmdb"), "an LMDB database", _SCRIPT),
    (("*.beton",), "FFCV's files", _CONVERT),
    (("*.rec",), "MXNet's RecordIO files", _CONVERT),
    (("*.h5", "*.hdf5"), "HDF5 files", _CONVERT),
    (("*-ubyte",), "MNIST's own files", _CONVERT),
    (("*.npz", "*.npy", "*.mat"), "arrays", _CONVERT),
    (("*.pkl", "*.pickle", "data_batch_?", "test_batch"), "pickles, as CIFAR's are, which are never opened", _CONVERT),
    (COMPRESSED, "compressed archives", "unpack it first: a tar that is not compressed is read in place"),
    (("*.zip",), "zips", "name one of them in --data, or unpack them"),
    (("*.tar",), "tars", "name the folder they lie in, or the tars themselves, in --data"),
    (
        ("*.parquet", "*.arrow"),
        "tables",
        "name the folder they lie in in --data; tables of images, or of paths and labels, are read",
    ),
)
"""Files that hold images and are none: how they are named, what they are, and what to do about them."""
_LABEL_COLUMNS = frozenset(
    "label labels class classes cls category target synset species breed "  # noqa: SIM905 (a list of words)
    "label_id class_id category_id class_name label_name class_label".split()
)
_LISTS = (".csv", ".tsv", ".jsonl", ".ndjson")
_PLAIN = (".txt", ".lst", ".csv", ".tsv", ".json")
_MOST_PLAIN = 20
_LARGEST_JSON = 1 << 28
_LOOKED_AT = 3


def container_of(name: str) -> tuple[str, str] | None:
    """What a file is that holds images and is none, and what to do about it, as far as its name tells."""
    base = name.rpartition("/")[2].casefold()
    rows = ((what, advice) for patterns, what, advice in CONTAINERS if any(fnmatch.fnmatch(base, p) for p in patterns))
    return next(rows, None)


def refuse_containers(
    where: str, names: Sequence[str], looks_like_image: Callable[[str], bool] = lambda _name: False
) -> None:
    """Raise UserError for files that hold images where no file is one.

    Args:
        where: what holds them, for messages.
        names: all that there is.
        looks_like_image: whether a file is one by its first bytes; asked of a few.
    """
    if any(map(named_like_image, names)) or any(map(looks_like_image, names[:20])):
        return
    for name in sorted(names):
        if (found := container_of(name)) is not None:
            what, advice = found
            raise UserError(f"{where} holds {what} ({printable(name)}) and no images; {advice}")


def refuse_hub_cache(folder: Path) -> None:
    """Raise UserError for a repository in the Hub's cache, which is read by one of its snapshots."""
    if not all((folder / name).is_dir() for name in ("blobs", "snapshots")):
        return
    snapshots = sorted(
        (path for path in (folder / "snapshots").iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime
    )
    named = f"name {snapshots[-1]} in --data" if snapshots else "it holds no snapshot; fetch the data again"
    raise UserError(f"{folder} is a repository in the Hub's cache, whose files lie in snapshots; {named}")


def refuse_label_list(root: Path, names: Iterable[str], beside: Iterable[Path]) -> None:
    """Raise UserError for a list that tells labels of images that would be unlabelled, by a column or line by line.

    Args:
        root: where the images are.
        names: what lies there.
        beside: what lies beside the root and may be about it.
    """
    images = set(names)
    files = [*(root / name for name in sorted(images)), *beside]
    plain = {path for path in files if path.suffix.lower() in _PLAIN}
    if len(plain) > _MOST_PLAIN:  # one for each image, as captions are
        plain = set()
    for path in files:
        found = sorted(_columns(path) & _LABEL_COLUMNS) if path.name.lower().endswith(_LISTS) else []
        if found or (path in plain and _tells_labels(path, images)):
            told = f"has a column {found[0]!r}" if found else "tells a label of each image"
            raise UserError(
                f"{path} {told}, but lists are not read, and the images would be unlabelled; put "
                "them in class folders, or make a parquet table of the list (a column of paths such as file_name, one "
                "of labels), or read them without labels by --layout flat"
            )


def _tells_labels(path: Path, images: Collection[str]) -> bool:
    """Whether a file without columns is a list of images with their labels: `0.jpg 3`, {"0.jpg": 3}, COCO's."""
    try:
        if path.suffix.lower() == ".json":
            content = json.loads(path.read_bytes()) if path.stat().st_size < _LARGEST_JSON else None
            if not isinstance(content, dict):
                return False
            pairs = [(str(name), label) for name, label in itertools.islice(content.items(), _LOOKED_AT)]
            return {"annotations", "categories"} <= content.keys() or _are_labels(pairs, images)
        with path.open("rb") as file:
            lines = [file.readline(1 << 12).decode("utf-8-sig") for _ in range(_LOOKED_AT)]
    except (OSError, ValueError, RecursionError):
        return False
    words = [re.split(r"[,;\t ]+", line.strip()) for line in lines if line.strip()]
    return all(len(pair) == 2 for pair in words) and _are_labels([(name, label) for name, label in words], images)


def _are_labels(pairs: Sequence[tuple[str, object]], images: Collection[str]) -> bool:
    """Whether each pair is the name of an image here, with or without its folder, and one word or number."""
    return bool(pairs) and all(
        name.rpartition("/")[2] in images and isinstance(label, str | int) and len(str(label).split()) == 1
        for name, label in pairs
    )


def _columns(path: Path) -> set[str]:
    """The names of a list's columns, lower case; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            first = file.readline(1 << 16).decode("utf-8-sig").strip()
        if path.suffix.lower() not in (".csv", ".tsv"):
            content = json.loads(first)
            return {str(key).casefold() for key in content} if isinstance(content, dict) else set()
    except (OSError, ValueError, RecursionError):
        return set()
    return {part.strip(" '\"").casefold() for part in re.split(r"[,;\t]", first)}


def refuse_wrappers(
    root: Path, names: Sequence[str], keys: Sequence[str], is_image: Callable[[str], bool]
) -> Iterator[str]:
    """Refuse folders that are more likely parts of a data set than its classes; what is said if they are not.

    Args:
        root: where they are.
        names: the folders.
        keys: every file in them.
        is_image: whether a file is one.

    Raises:
        UserError: they are.
    """
    meant = "if these are the classes, say --layout class-folders"
    read_as = f"{root} would be read as {some(names, 'class')}"
    inner, first, with_json = _look_into(keys)

    def are_classes(below: str, classes: Sequence[str]) -> UserError:
        shown = ", ".join(printable(name) for name in classes[:3])
        return UserError(
            f"{read_as}, but {below} holds folders itself ({shown}, …), which look like the classes; name "
            f"{root / below} in --data, or {meant}"
        )

    if with_json:
        raise UserError(
            f"{read_as}, but {min(with_json)} holds a {DATASET_JSON}, which tells the labels of its images; name "
            f"{root / min(with_json)} in --data, or {meant}"
        )
    wrappers = [name for name in names if len(inner[name]) > 1 and "" not in inner[name]]
    if len(names) == 1 and not wrappers and (deeper := _deeper(keys)) is not None:
        raise are_classes(*deeper)
    if (len(names) == 1 and wrappers) or (wrappers and any(name.casefold() in PARTS for name in wrappers)):
        probably = next((name for name in wrappers if name.casefold() in PARTS), wrappers[0])
        raise are_classes(probably, sorted(inner[probably]))
    if names and all(name.casefold() in PARTS for name in names):
        what = "which look like parts of one data set" if len(names) > 1 else "which looks like a part of a data set"
        with_images = [name for name in names if any(map(is_image, first[name]))] or list(names)
        raise UserError(
            f"{read_as}, {what}; name the folder of the images in --data, as {root / with_images[0]}, or {meant}"
        )
    without = [name for name in names if first[name] and not any(map(is_image, first[name]))]
    if without and len(without) < len(names) and all(name.casefold() in PARTS for name in without):
        raise UserError(
            f"{root} has {some(without, 'folder')} that would be a class, but hold no images; leave them out "
            f"by --ignore {','.join(without[:3])}, or {meant}"
        )
    shared = set.intersection(*(inner[name] for name in names)) - {""} if len(wrappers) == len(names) > 1 else set()
    if len(shared) > 1 and not all(map(is_split, names)):
        yield (
            f"each class folder holds the same folders ({', '.join(sorted(shared)[:3])}), which are not read as "
            "classes; if they are, name one of the outer folders in --data"
        )


def _look_into(keys: Sequence[str]) -> tuple[dict[str, set[str]], dict[str, list[str]], set[str]]:
    """Of each folder that files lie in: its folders ("" for files) and its first files; which have a dataset.json."""
    inner: dict[str, set[str]] = defaultdict(set)
    first: dict[str, list[str]] = defaultdict(list)
    with_json = set()
    for key in keys:
        name, _, rest = key.partition("/")
        folder, slash, _ = rest.partition("/")
        inner[name].add(folder if slash else "")
        if rest == DATASET_JSON:
            with_json.add(name)
        if len(first[name]) < _LOOKED_AT or (len(first[name]) <= _LOOKED_AT and named_like_image(rest)):
            first[name].append(key)
    return inner, first, with_json


def _deeper(keys: Sequence[str]) -> tuple[str, list[str]] | None:
    """The folder, below those that all files share, that holds several folders and no file; None if there is none."""
    folders = [key.split("/")[:-1] for key in keys]
    depth = 1
    while all(len(parts) > depth for parts in folders) and len({parts[depth] for parts in folders}) == 1:
        depth += 1
    if depth == 1 or any(len(parts) <= depth for parts in folders):
        return None
    return "/".join(folders[0][:depth]), sorted({parts[depth] for parts in folders})


def some(names: Collection[str], what: str) -> str:
    """How many there are, and the first of them."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:3]) + (", …" if len(ordered) > 3 else "")
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{len(ordered)} {plural if len(ordered) > 1 else what} ({shown})"
