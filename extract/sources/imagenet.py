"""ImageNet as it comes: labels of its validation images, and where Kaggle's layout keeps things.

The official ground truth file holds ILSVRC ids (1 … 1000 in the development kit's own order), which are not positions
among the sorted synsets; read as labels they would give every image a wrong class without any error.
"""

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import read_regular, shortened

SYNSET = re.compile(r"n\d{8}")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_ID = re.compile(r"[0-9]{1,9}")
_SOLUTION = "LOC_val_solution.csv"
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLabels:
    """Labels of images that no folder names."""

    label_of: Mapping[str, int]
    """By the file's stem, as `ILSVRC2012_val_00000001`."""
    class_ids: tuple[str, ...]


def labels_from_files(val_labels: Path | None, devkit: Path | None) -> ImageLabels | None:
    """The validation labels that --val-labels and --devkit tell, or None where neither is given.

    Raises:
        UserError: a file is missing or malformed, or the ground truth file stands alone.
    """
    if devkit is not None:
        synset_of_id = _synsets_of_ids(_find(devkit, "meta.mat", "--devkit"))
        numbers = _lines(val_labels or _find(devkit, _GROUND_TRUTH, "--devkit"))
        unknown = [number for number in numbers if not _ID.fullmatch(number) or int(number) not in synset_of_id]
        if unknown:
            raise UserError(
                f"{val_labels or devkit} names class {shortened(unknown[0])}, which the development kit's meta.mat "
                "does not have; give --devkit its own ground truth file"
            )
        return _numbered([synset_of_id[int(number)] for number in numbers], set(synset_of_id.values()))
    if val_labels is None:
        return None
    lines = _lines(val_labels)
    if val_labels.suffix.lower() == ".csv":
        return _from_solution(lines, val_labels)
    if lines and all(line.isdigit() for line in lines):
        raise UserError(
            f"{val_labels} holds bare numbers: they are ILSVRC ids in the development kit's order, not labels of the "
            "sorted synsets; add --devkit FOLDER (with meta.mat), or give a file with one synset a line"
        )
    synsets = [line.strip() for line in lines]
    wrong = [number for number, synset in enumerate(synsets, 1) if not SYNSET.fullmatch(synset)]
    if wrong or not synsets:
        line = f"line {wrong[0]} is {shortened(lines[wrong[0] - 1])}" if wrong else "it is empty"
        raise UserError(f"{val_labels} must hold one synset a line, as n01440764, but {line}")
    return _numbered(synsets, set(synsets))


def kaggle_folder(data: Path, split: str) -> Path | None:
    """The folder of the split in Kaggle's layout under DATA, or None."""
    candidates = (data / inside / split for inside in _KAGGLE)
    return next((folder for folder in candidates if folder.is_dir()), None)


def kaggle_labels(images: Path) -> ImageLabels | None:
    """The labels in Kaggle's solution file above a folder of validation images, or None if there is none."""
    for folder in [images, *images.absolute().parents][:5]:
        if (folder / _SOLUTION).is_file():
            return _from_solution(_lines(folder / _SOLUTION), folder / _SOLUTION)
    return None


def listed_labels(keys: Sequence[str], label_of: Mapping[str, int], where: str) -> list[int]:
    """The label of every image by its stem.

    Raises:
        UserError: the list does not name some image.
    """
    stems = [key.rpartition("/")[2].partition(".")[0] for key in keys]
    missing = [key for key, stem in zip(keys, stems, strict=True) if stem not in label_of]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(keys)} files in {where} have no label in the list of {len(label_of)} "
            f"(the first is {missing[0]}); give the list that belongs to these images, or leave files out by --ignore"
        )
    return [label_of[stem] for stem in stems]


def hash_of_labels(label_of: Mapping[str, int]) -> str:
    """A short fingerprint of a list of labels."""
    return hashlib.sha256(repr(sorted(label_of.items())).encode()).hexdigest()


def _numbered(synsets: Sequence[str], all_synsets: Iterable[str]) -> ImageLabels:
    class_ids = tuple(sorted(all_synsets))
    label = {synset: number for number, synset in enumerate(class_ids)}
    return ImageLabels(
        label_of={f"ILSVRC2012_val_{number:08d}": label[synset] for number, synset in enumerate(synsets, 1)},
        class_ids=class_ids,
    )


def _from_solution(lines: Sequence[str], path: Path) -> ImageLabels:
    """Kaggle's solution: `ImageId,PredictionString`, where the second begins with the synset."""
    try:
        rows = list(csv.reader(io.StringIO("\n".join(lines))))
    except csv.Error:  # fields of more than 131,072 characters
        rows = []
    pairs = [(row[0], (row[1].split() or [""])[0]) for row in rows[1:] if len(row) > 1]
    if not pairs or len(pairs) != len(rows) - 1 or not all(SYNSET.fullmatch(synset) for _, synset in pairs):
        raise UserError(f"{path} is not Kaggle's solution file: its lines must be like `ILSVRC2012_val_1,n01440764 …`")
    class_ids = tuple(sorted({synset for _, synset in pairs}))
    label = {synset: number for number, synset in enumerate(class_ids)}
    return ImageLabels(label_of={stem: label[synset] for stem, synset in pairs}, class_ids=class_ids)


def _synsets_of_ids(path: Path) -> dict[int, str]:
    """ILSVRC id → synset of the leaf classes in the development kit's `meta.mat` (its others are inner nodes)."""
    from scipy.io import loadmat

    try:
        rows = loadmat(path, squeeze_me=True)["synsets"].reshape(-1)
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if int(row["num_children"]) == 0}
    except Exception as error:  # scipy's reader raises many kinds
        raise UserError(f"{path} is not the meta.mat of ImageNet's development kit ({error})") from error


def _find(devkit: Path, name: str, flag: str) -> Path:
    """The file of that name: in the kit's folder, in its `data`, or beside the meta.mat that was given."""
    if devkit.is_file():
        if name in {devkit.name, "meta.mat"}:
            return devkit
        devkit = devkit.parent
    for path in (devkit / name, devkit / "data" / name, *sorted(devkit.glob(f"*/data/{name}"))):
        if path.is_file():
            return path
    raise UserError(f"{flag} {devkit} has no {name}; name the folder that ILSVRC2012_devkit_t12.tar.gz unpacks to")


def _lines(path: Path) -> list[str]:
    try:
        return read_regular(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list of labels: {error}") from error
