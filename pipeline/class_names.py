"""The thousand classes of ImageNet (ILSVRC 2012): synset and readable names, in the order of their labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_TABLE = Path(__file__).parent / "assets" / "imagenet-1k-classes.tsv"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageNetClass:
    """One row of the table."""

    synset: str
    """WordNet id, as `n01440764`; sorted, these give the labels."""
    names: str
    """Readable names, commas between them, as `tench, Tinca tinca`."""


@cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """The thousand classes; the position is the label."""
    rows = (line.split("\t") for line in _TABLE.read_text(encoding="utf-8").splitlines())
    return tuple(ImageNetClass(synset=synset, names=names) for _, synset, names in rows)


def readable_names(class_ids: Sequence[str]) -> tuple[str, ...]:
    """A readable name for every class: ImageNet's for its synsets, the id itself for anything else."""
    names = {row.synset: row.names for row in imagenet_classes()}
    return tuple(names.get(class_id, class_id) for class_id in class_ids)


def synsets_of(names: Sequence[str]) -> tuple[str, ...] | None:
    """The synsets in label order if these are ImageNet's thousand readable names in label order, else None."""
    rows = imagenet_classes()
    same = len(names) == len(rows) and all(name == row.names for name, row in zip(names, rows, strict=True))
    return tuple(row.synset for row in rows) if same else None
