"""What `dit-extract` says about its data before the first image is encoded: how it was understood."""

import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from extract.sources.labels import BY_LABEL
from extract.sources.listing import Listing
from pipeline.classes import brief

_SHOWN = 4


def lines(description: str, listing: Listing, classes: Sequence[str]) -> Iterator[str]:
    """One line each: the source and its inputs, the labels, the classes with their counts, and every note.

    Args:
        description: what kind of source it is, and where.
        listing: what was found.
        classes: readable names, index = label.
    """
    yield f"{description}: {len(listing):,} inputs, {len(classes) or 'no'} classes"
    if not classes:
        yield "labels: none; every sample is unlabelled (-1)"
    else:
        order = f"; classes {listing.order}" if listing.order and listing.order != BY_LABEL else ""
        by_number = f" ({BY_LABEL})" if listing.order == BY_LABEL else ""
        yield f"labels: from {listing.labels_from or 'the data'}{by_number}{order}"
        yield f"classes: {_counts(listing, classes)}"
        yield from _alike(listing.class_ids or classes)
    yield from listing.notes


def _alike(names: Sequence[str]) -> Iterator[str]:
    """A line for classes that a person would take for one, as copies from another system or by hand make them."""
    by_reading: dict[str, list[str]] = {}
    for name in names:
        by_reading.setdefault(unicodedata.normalize("NFC", name.strip()).casefold(), []).append(name)
    pairs = [group for group in by_reading.values() if len(group) > 1]
    if pairs:
        shown = ", ".join(ascii(brief(name)) for name in pairs[0])
        more = f", and {len(pairs) - 1:,} more such" if len(pairs) > 1 else ""
        yield f"classes that differ only in case, spaces or the encoding of accents: {shown}{more}; are they one?"


def _counts(listing: Listing, classes: Sequence[str]) -> str:
    """The first classes and the last one by label, with their inputs, and how many have none."""
    counts = np.bincount(listing.labels[listing.labels >= 0], minlength=len(classes))
    shown = [*range(min(_SHOWN, len(classes)))]
    last = [len(classes) - 1] if len(classes) > _SHOWN else []
    parts = [_one(label, listing, classes, int(counts[label])) for label in (*shown, *last)]
    if len(classes) > _SHOWN + 1:
        parts.insert(_SHOWN, "…")
    empty = int((counts[: len(classes)] == 0).sum())
    return ", ".join(parts) + (f"; {empty:,} of them without inputs" if empty else "")


def _one(label: int, listing: Listing, classes: Sequence[str], count: int) -> str:
    name = listing.class_ids[label] if label < len(listing.class_ids) else classes[label]
    return f"{label}: {brief(name)} ({count:,})" if name != str(label) else f"{label} ({count:,})"
