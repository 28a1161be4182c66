"""Labels from what data calls its classes, and the order in which names become labels."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from extract.sources.imagenet import SYNSET
from extract.sources.listing import UNLABELLED
from extract.sources.litter import LeftOut
from pipeline.runtime.errors import UserError

AS_NUMBERS, AS_TEXT, AS_GIVEN = "sorted as numbers", "sorted as text", "in the order that the data gives"
BY_LABEL = "the number is the label"
SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"})
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".mpo"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".avif", ".heic", ".heif", ".jxl"),
)
"""Of the kinds in docs/images.md; they tell which member or folder is meant, never what is decoded."""
_WHOLE = re.compile(r"-?[0-9]+(?:\.0*)?")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]*)?")
_NAMED_BY_SYNSET = re.compile(r"(?:.*_)?(n\d{8})|(n\d{8})_.*")
_MOST_LABELS = 100_000
_STRAY = "\ufeff\0 \t\r\n"
"""What is no part of a class's name at its ends: byte order marks, padding, line ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """A label for every input, and what the labels are called."""

    values: Sequence[int]
    class_ids: tuple[str, ...] = ()
    order: str = ""
    """How the classes were sorted."""


def in_order(names: Iterable[str]) -> tuple[list[str], str]:
    """Class names in the order of their labels, and how they were sorted: by value if all are numbers, else as text."""
    distinct = set(names)
    if distinct and all(_NUMBER.fullmatch(name) for name in distinct):
        return sorted(distinct, key=lambda name: (Decimal(name), name)), AS_NUMBERS
    return sorted(distinct), AS_TEXT


def labels_of_names(names: Sequence[str]) -> Labels:
    """Labels of inputs whose classes are called by names, numbers among them too: each name is a class."""
    class_ids, order = in_order(names)
    label = {name: number for number, name in enumerate(class_ids)}
    return Labels(values=[label[name] for name in names], class_ids=tuple(class_ids), order=order)


def numbered_labels(values: Sequence[object], where: str = "the data") -> Labels:
    """Labels for what data says of its inputs: whole numbers stay, names are sorted and counted, None is unlabelled.

    A float that is whole is that number, NaN and empty text are None. Byte order marks, line ends and spaces at the
    ends of a name are not part of it.

    Raises:
        UserError: a label is a list or another structure, or far beyond the number of samples.
    """
    texts = [_text_of(value, where) for value in values]
    if all(_WHOLE.fullmatch(text) for text in texts if text is not None and text.casefold() != "nan"):
        texts = [None if text is not None and text.casefold() == "nan" else text for text in texts]
    named = [text for text in texts if text is not None]
    if not all(_WHOLE.fullmatch(text) for text in named):
        labelled = labels_of_names(named)
        rest = iter(labelled.values)
        filled = [UNLABELLED if text is None else next(rest) for text in texts]
        return Labels(values=filled, class_ids=labelled.class_ids, order=labelled.order)
    labels = [UNLABELLED if text is None else max(int(text.partition(".")[0]), UNLABELLED) for text in texts]
    count = max(labels, default=UNLABELLED) + 1
    if count > max(_MOST_LABELS, len(texts)):
        raise UserError(
            f"a label is {count - 1:,}, which makes far more classes than the {len(texts):,} samples can fill; "
            f"choose what holds the labels by --label-column"
        )
    return Labels(values=labels, class_ids=tuple(map(str, range(count))), order=BY_LABEL if count else "")


def _text_of(value: object, where: str) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, list | tuple | dict):
        raise UserError(
            f"a label in {where} is a {type(value).__name__} ({str(value)[:60]}), but an image has one class; choose "
            "what holds a single label by --label-column"
        )
    return str(value).strip(_STRAY) or None


def synset_in_name(path: str) -> str | None:
    """The synset in a file's own name, as in `n01440764_18_n01440764.JPEG` and `n01440764_10026.JPEG`, or None."""
    stem = path.rpartition("/")[2].partition(".")[0]
    found = _NAMED_BY_SYNSET.fullmatch(stem)
    return (found[1] or found[2]) if found else None


def synsets_in_names(paths: Sequence[str]) -> list[str] | None:
    """The synset in every file's name, or None if one has none."""
    found: list[str] = []
    for path in paths:
        synset = synset_in_name(path)
        if synset is None:
            return None
        found.append(synset)
    return found or None


def class_folders(paths: Sequence[str], split: str, left_out: LeftOut) -> tuple[Sequence[int], list[str] | None]:
    """Which paths inside an archive are read, and the class folder of each; None where folders tell no classes.

    Folders that all paths share are passed over; of folders that are all named like splits the one of --split is
    entered, and then the same again. Every path must lie in a folder, and there must be two folders at least.
    """
    parts = [[part for part in path.split("/") if part not in ("", ".")] for path in paths]
    kept: Sequence[int] = range(len(parts))
    depth = 0
    while kept and all(len(parts[k]) > depth + 1 for k in kept):
        here = {parts[k][depth] for k in kept}
        if len(here) > 1 and split in here and all(name.casefold() in SPLITS for name in here):
            for k in kept:
                if parts[k][depth] != split:
                    left_out.add(f"of other splits than {split}", paths[k])
            kept = [k for k in kept if parts[k][depth] == split]
        elif len(here) > 1:
            return kept, [parts[k][depth] for k in kept]
        depth += 1
    return range(len(parts)), None


def are_synsets(names: Iterable[str]) -> bool:
    """Whether all are called by synsets."""
    return all(SYNSET.fullmatch(name) for name in names)
