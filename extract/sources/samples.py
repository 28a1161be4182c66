"""WebDataset's samples among the members of a tar: files that share a name, wherever in the tar they lie."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from pipeline.image_names import IMAGE_SUFFIXES
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import check_length, parse_json

LINK = -1
IMAGE_EXTENSIONS = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES) | {"img", "image"}
LABEL_EXTENSIONS = ("cls", "label", "class")
LABEL_KEYS = ("label", "cls", "class", "class_id", "label_id")
_LARGEST_LABEL = 200
_LOOKED_AT = 100
_LARGEST_JSON = 1 << 22


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int
    size: int
    """In bytes; LINK for a link or a sparse file, which has no contents of its own to read."""


Sample = dict[str, Member]
"""The members of a sample by extension."""


def grouped(members: Iterable[Member]) -> tuple[list[Sample], int]:
    """The samples of a tar in the order of their first members, and how many of them lie scattered in it.

    A sample's members share their path up to the first dot of the file name. Neighbours come together as in webdataset;
    members that lie apart do too, unless the extension is taken: then another sample of the same name begins.

    Raises:
        UserError: a name comes twice in one sample.
    """
    samples: list[Sample] = []
    of_key: dict[str, tuple[int, Sample]] = {}
    scattered: set[int] = set()
    last = ""
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = f"{folder}/{stem}", extension.lower()
        number, sample = of_key.get(key, (-1, {}))
        if extension in sample and key == last:
            raise UserError(
                f"{member.name} comes twice in one sample of its tar; give every sample a name of its own, so that "
                "none hides another"
            )
        if number < 0 or extension in sample:
            number, sample = len(samples), {}
            samples.append(sample)
            of_key[key] = number, sample
        elif key != last:
            scattered.add(number)
        sample[extension] = member
        last = key
    return samples, len(scattered)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Finds the image and the label in a sample."""

    image_extension: str | None
    """What --image-column says."""
    label_extension: str | None
    """What --label-column says, or what was found; None where nothing tells a label."""
    label_key: str | None = None
    """The key in a .json member that holds the label."""

    def split(self, sample: Sample) -> Iterator[Sample]:
        """The sample, or several where dots are part of the files' names (`a.v1.jpg`, `a.v1.cls`, `a.v2.jpg`, …)."""
        images = self._images(sample)
        labels = [name for name in sample if self._is_label(name)]
        if len(images) < 2 or len(labels) < 2:
            yield sample
            return
        parts: dict[str, Sample] = {}
        for name, member in sample.items():
            stem, _, extension = name.rpartition(".")
            parts.setdefault(stem, {})[extension] = member
        yield from parts.values()

    def image(self, sample: Sample) -> Member:
        """The sample's image; where it has none, its first member, which is then left out as no image.

        Raises:
            UserError: several could be meant.
        """
        images = self._images(sample)
        if len(images) > 1:
            raise UserError(
                f"{sample[images[0]].name} and {sample[images[1]].name} are images of the same sample, since a name "
                "ends at its first dot; choose one by --image-column EXTENSION, or rename the files where the dot is "
                "part of their names"
            )
        return sample[images[0]] if images else next(iter(sample.values()))

    def label(self, sample: Sample, descriptor: int) -> object:
        """What the sample's label member says, or None where it has none.

        Raises:
            UserError: the member is a link, or no JSON.
        """
        names = [name for name in sample if self._is_label(name)]
        member = sample[names[0]] if names else None
        if member is None:
            return None
        if member.size == LINK:
            raise UserError(
                f"{member.name} is a link in its tar; pack it with its contents, by tar --hard-dereference -h"
            )
        if self.label_key is None:
            return os.pread(descriptor, min(member.size, _LARGEST_LABEL), member.offset).decode("utf-8", "replace")
        return json_of(member, descriptor).get(self.label_key)

    def _images(self, sample: Sample) -> list[str]:
        if self.image_extension is not None:
            wanted = self.image_extension.lower().removeprefix(".")
            return [wanted] if wanted in sample else [name for name in sample if name.endswith(f".{wanted}")]
        return [name for name in sample if name.rpartition(".")[2] in IMAGE_EXTENSIONS]

    def _is_label(self, name: str) -> bool:
        wanted = self.label_extension
        return wanted is not None and (name == wanted or name.endswith(f".{wanted}"))


def reader_for(
    samples: Sequence[Sample], descriptor: int, image_extension: str | None, label_extension: str | None
) -> Reader:
    """Where labels are: as --label-column says, or found among the members.

    `--label-column json:KEY` is a key of the .json members; without the flag a member of LABEL_EXTENSIONS, then a key
    of LABEL_KEYS in .json members, is taken.
    """
    image = image_extension
    if label_extension is not None:
        kind, colon, key = label_extension.partition(":")
        wanted = kind.lower().removeprefix(".")
        return Reader(image_extension=image, label_extension=wanted, label_key=key if colon else None)
    last = {name.rpartition(".")[2] for sample in samples for name in sample}
    for wanted in LABEL_EXTENSIONS:
        if wanted in last:
            return Reader(image_extension=image, label_extension=wanted)
    objects = (member for sample in samples for name, member in sample.items() if name.endswith("json"))
    some = [json_of(member, descriptor, strict=False) for member in islice(objects, _LOOKED_AT) if member.size != LINK]
    keys = [key for key in LABEL_KEYS if any(content.get(key) is not None for content in some)]
    if keys:
        return Reader(image_extension=image, label_extension="json", label_key=keys[0])
    return Reader(image_extension=image, label_extension=None)


def json_of(member: Member, descriptor: int, *, strict: bool = True) -> dict[str, object]:
    """The object in a .json member.

    Raises:
        UserError: it is none, and `strict`.
    """
    origin, advice = f"{member.name} in its tar", "mend it, or leave labels out by --layout flat"
    try:
        check_length(member.size, origin, most=_LARGEST_JSON, advice=advice)
        content = parse_json(os.pread(descriptor, member.size, member.offset), origin, advice=advice)
    except UserError:
        if strict:
            raise
        content = None
    if isinstance(content, dict):
        return content
    if strict:
        raise UserError(f"{origin} is no JSON object; its label cannot be read")
    return {}
