"""Labels from what data calls its classes, and the order in which names become labels."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from extract.sources.imagenet import SYNSET
from extract.sources.listing import UNLABELLED
from pipeline.runtime.errors import UserError

AS_NUMBERS, AS_TEXT, AS_GIVEN = "sorted as numbers", "sorted as text", "in the order that the data gives"
BY_LABEL = "the number is the label"
SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"})
PARTS = frozenset(
    "images image imgs img jpegimages photos pictures data dataset labels annotations masks segmentations "  # noqa: SIM905 (a list of words)
    "segmentationclass segmentationobject imagesets captions metadata meta tables lists docs scripts logs".split()
)
"""Names of folders that are parts of a data set rather than classes of it."""
_WHOLE = re.compile(r"-?[0-9]+(?:\.0*)?")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]*)?")
_NAMED_BY_SYNSET = re.compile(r"(?:.*_)?(n\d{8})|(n\d{8})_.*")
_LIST = re.compile(r"[\[({].*[\])}]|-?[0-9.]+(?:\s*[,;]\s*-?[0-9.]+)+", re.DOTALL)
_MOST_LABELS, _MOST_DIGITS = 100_000, 18
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
        UserError: a label is a list or another structure, no text, or far beyond the number of samples.
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
    labels = [UNLABELLED if text is None else _whole(text) for text in texts]
    count = max(labels, default=UNLABELLED) + 1
    if count > max(_MOST_LABELS, len(texts)):
        told = f"{count - 1:,}" if count <= 10**_MOST_DIGITS else f"a number of more than {_MOST_DIGITS} digits"
        raise UserError(
            f"a label is {told}, which makes far more classes than the {len(texts):,} samples can fill; "
            f"choose what holds the labels by --label-column"
        )
    return Labels(values=labels, class_ids=tuple(map(str, range(count))), order=BY_LABEL if count else "")


def _whole(text: str) -> int:
    """The label that a whole number is, without what no label needs of its digits: Python reads 4,300 of them."""
    digits = text.partition(".")[0].lstrip("-0") or "0"
    return UNLABELLED if text.startswith("-") and digits != "0" else int(digits[: _MOST_DIGITS + 1])


def _text_of(value: object, where: str) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, list | tuple | dict):
        raise UserError(_no_label(value, where, type(value).__name__))
    text = plain_name(str(value))
    if _LIST.fullmatch(text) and not _is_name_in_brackets(text):
        raise UserError(_no_label(text, where, "list"))
    if any(char < " " or char == "\ufffd" or "\ud800" <= char <= "\udfff" for char in text):
        raise UserError(
            f"a label in {where} is no text ({text[:20]!r}); write it as digits or a name, or leave labels out by "
            "--layout flat"
        )
    return text or None


def plain_name(text: str) -> str:
    """A name without what is no part of it at its ends."""
    return text.strip(_STRAY)


def _is_name_in_brackets(text: str) -> bool:
    """Whether a text in brackets is a name all the same, as `[cat]` is: no list of numbers, of texts, no object."""
    return text[0] in "[({" and not re.search(r"[,;:\"']|^[\[({]\s*(?:-?[0-9.]++\s*+)*+[\])}]$", text)


def _no_label(value: object, where: str, kind: str) -> str:
    return (
        f"a label in {where} is a {kind} ({str(value)[:60]}), but an image has one class; choose what holds a single "
        "label by --label-column, or leave labels out by --layout flat"
    )


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


def looks_like_classes(names: Iterable[str]) -> bool:
    """Whether names are rather those of classes than of splits, parts or numbered shards."""
    plain = [name for name in names if not is_split(name) and name.casefold() not in PARTS]
    return len(plain) > 1 and (are_synsets(plain) or not any(char.isdigit() for name in plain for char in name))


def is_split(name: str) -> bool:
    """Whether a folder is named like a split, as `val` and COCO's `val2017` are."""
    return name.casefold().rstrip("0123456789_-") in SPLITS


def are_synsets(names: Iterable[str]) -> bool:
    """Whether all are called by synsets."""
    return all(SYNSET.fullmatch(name) for name in names)
