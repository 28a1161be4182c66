"""Classes by name: the thousand of ImageNet (ILSVRC 2012), and any class found by how people write it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.runtime.cli import nearest
from pipeline.runtime.errors import UserError

MOST_SHOWN = 200
"""Characters of a name; ImageNet's longest has 121."""
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


def find_classes(text: str, classes: Sequence[str], class_ids: Sequence[str], *, count: int) -> list[int]:
    """The labels of a comma-separated list, in its order; a full name with commas in it is one class.

    Args:
        classes: readable names, index = label; may be empty.
        class_ids: folder names or synsets, same order; may be empty.
        count: how many classes there are.

    Raises:
        UserError: a class is unknown, ambiguous or empty; every such class is named.
    """
    words = [word.strip() for word in text.split(",")]
    long_names = {plain(name) for name in (*classes, *class_ids) if "," in name}
    labels: list[int] = []
    complaints: list[str] = []
    start = 0
    while start < len(words):
        stop = _longest_name(words, start, long_names)
        try:
            labels.append(find_class(", ".join(words[start:stop]), classes, class_ids, count=count))
        except UserError as error:
            complaints.append(str(error))
        start = stop
    if complaints:
        raise UserError("; ".join(complaints))
    return labels


def find_class(word: str, classes: Sequence[str], class_ids: Sequence[str], *, count: int) -> int:
    """The label that one word means; a bare integer is a label. Case counts only where it tells two classes apart.

    `label:8` is always a label and `name:8` always a name.

    Raises:
        UserError: no class or several classes are called so; the labels or the nearest names are given.
    """
    word = word.strip()
    meant, _, rest = word.partition(":")
    is_number = rest.strip().isascii() and rest.strip().removeprefix("-").isdigit()
    if meant in ("label", "name") and is_number:
        word = rest.strip()
    if meant != "name" and word.isascii() and word.removeprefix("-").isdigit():
        if not 0 <= int(word) < count:
            raise UserError(f"class {word} is not a label from 0 to {count - 1}")
        others = [label for label in range(count) if word in names_of(label, classes, class_ids, str)]
        if meant != "label" and others and int(word) not in others:
            raise UserError(
                f"class {word} could be the label {describe_class(int(word), classes, class_ids)} or the class of that "
                f"name, {describe_class(others[0], classes, class_ids)}; say label:{word} or name:{word}"
            )
        return int(word)
    spellings: tuple[Callable[[str], str], ...] = (str, plain)
    for spell in spellings:
        found = [label for label in range(count) if spell(word) in names_of(label, classes, class_ids, spell)]
        if len(found) == 1:
            return found[0]
        if found:
            options = ", ".join(describe_class(label, classes, class_ids) for label in found)
            raise UserError(f"class {brief(word)!r} is ambiguous: it could be {options}; give the label")
    if not word:
        raise UserError("an empty class name stands between commas; remove one comma")
    known = [name for label in range(count) for name in sorted(names_of(label, classes, class_ids, str))]
    close = nearest(word, known)
    hint = f"; did you mean {' or '.join(map(brief, close))}?" if close else f"; classes are 0 to {count - 1}"
    raise UserError(f"class {brief(word)!r} is unknown{hint}")


def brief(name: str) -> str:
    """A name as messages, tables and pictures show it: a stranger's may have a million characters."""
    return name if len(name) <= MOST_SHOWN else f"{name[: MOST_SHOWN - 1]}…"


def short_name(label: int, classes: Sequence[str], class_ids: Sequence[str]) -> str:
    """What to call a class in a picture: its readable name up to the first comma, else its folder name or label."""
    name = classes[label].partition(",")[0].strip() if 0 <= label < len(classes) else ""
    identifier = class_ids[label] if 0 <= label < len(class_ids) else ""
    return brief(name or identifier) or (str(label) if label >= 0 else "")


def describe_class(label: int, classes: Sequence[str], class_ids: Sequence[str]) -> str:
    """A label with what else is known of its class, as in `134 (n02012849, crane)`."""
    known = [names[label] for names in (class_ids, classes) if label < len(names) and names[label]]
    return f"{label} ({', '.join(map(brief, dict.fromkeys(known)))})" if known else str(label)


def plain(name: str) -> str:
    """The name in letters that do not depend on how it was written: no capitals, no underscores, one space a comma."""
    return ", ".join(part.strip() for part in name.replace("_", " ").casefold().split(","))


def names_of(
    label: int, classes: Sequence[str], class_ids: Sequence[str], spell: Callable[[str], str] = plain
) -> list[str]:
    """Everything that one class is called: its folder name, its readable name, and that up to the first comma."""
    names = [class_ids[label]] if label < len(class_ids) else []
    if label < len(classes):
        names += [classes[label], classes[label].partition(",")[0].strip()]
    return list(dict.fromkeys(spell(name) for name in names if name))


def _longest_name(words: Sequence[str], start: int, long_names: set[str]) -> int:
    """Where the class that begins at `start` ends: past every comma that belongs to its name."""
    for stop in range(len(words), start + 1, -1):
        if plain(", ".join(words[start:stop])) in long_names:
            return stop
    return start + 1
