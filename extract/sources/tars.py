"""Images inside tars, read in place at recorded offsets: WebDataset shards, and ImageNet's two official tars.

A tar is walked once, header by header, when it is listed; afterwards an image is one `pread`. Tars behind a URL are
copied whole first (`pipeline.runtime.remote_copies`), as the shuffled order reads every tar from end to end many times;
with --remote-tars stream the copies keep headers and labels alone, and an image is one ranged request.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.sources.archives import dataset_json_in, labels_by_names
from extract.sources.dataset_json import DATASET_JSON, check_member, labelled_by_dataset_json
from extract.sources.folders import gone, storage_failed
from extract.sources.imagenet import VAL_IMAGE, ImageLabels, hash_of_labels, listed_labels
from extract.sources.labels import AS_TEXT, numbered_labels
from extract.sources.listing import UNLABELLED, Listing, MtimeSize, Source, UnreadableInputError, sorted_listing
from extract.sources.litter import LeftOut, rule_against_path
from extract.sources.mistaken import refuse_containers
from extract.sources.samples import LINK, Member, Reader, grouped, reader_for
from extract.sources.tar_files import part_of, tar_members, without_images
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import MOST_IMAGE_BYTES
from pipeline.runtime.remote_copies import check_unchanged, fetch, local_place
from pipeline.runtime.remote_files import is_url

_CLASS_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_LISTING_THREADS = 8
_WEBDATASETS_OWN = re.compile(r"__[^/]*__")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """One row for each sample."""

    keys: list[str]
    places: list[tuple[int, int, int]]
    texts: list[object]
    """What the label member says."""
    names: list[str]
    """The image's name in its tar."""
    columns: list[int]
    """How many members the sample has."""
    others: set[str]
    """Extensions of members that are neither image nor label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TarSource(Source):
    """Images inside one or many tars."""

    addresses: tuple[str, ...]
    """Paths or URLs."""
    copies: Path
    """Folder for copies of what lies behind URLs."""
    names: tuple[str, ...]
    """How keys call the tars."""
    image_extension: str | None = None
    label_extension: str | None = None
    ignored: tuple[str, ...] = ()
    val_labels: ImageLabels | None = None
    """Labels of ImageNet's validation tar."""
    layout: str = "auto"
    """What --layout says."""
    split: str = "train"
    streamed: bool = False
    """Whether copies of what lies behind URLs keep no images, which are read from there one by one."""

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(local_place(address, self.copies) for address in self.addresses)

    @property
    def is_remote(self) -> bool:
        return any(is_url(address) for address in self.addresses)

    @property
    def settings(self) -> Mapping[str, Any]:
        names = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()
        return {"tars": names, "image-column": self.image_extension, "label-column": self.label_extension}

    @property
    def description(self) -> str:
        first = self.addresses[0]
        return f"tar {first}" if len(self.addresses) == 1 else f"{len(self.addresses)} tars from {first} on"

    @property
    def identity(self) -> str:
        labels = hash_of_labels(self.val_labels.label_of) if self.val_labels else ""
        chosen = (
            self.image_extension or "",
            self.label_extension or "",
            *self.ignored,
            labels,
            self.layout,
            self.split,
        )
        streamed = ["streamed"] if self.streamed else []  # places in thin copies are none in whole ones
        return "\n".join(["tars", *self.addresses, *chosen, *filter(None, [self.as_served]), *streamed])

    @property
    def as_served(self) -> str | None:
        """Tells the bytes that a server has from those that it had or will have; None for tars on a disk."""
        return "\n".join(path.name for path in self.paths) if self.is_remote else None

    def inputs(self) -> Listing:
        if self.streamed and (first := next(filter(is_url, self.addresses), None)) is not None:
            part_of(first, 0, tarfile.BLOCKSIZE)  # a server that gives no parts says so before anything is fetched
        advice = "give --source-cache a folder on a larger disk"
        advice += "" if self.streamed else ", or --remote-tars stream, which keeps a few at a time"
        fetch(self.addresses, self.copies, thin=without_images if self.streamed else None, advice=advice)
        mtime_sizes = [_mtime_size(path) for path in self.paths]
        if len(self.paths) == 1 and self._is_imagenet_train():
            return _list_imagenet_train(self.paths[0], mtime_sizes, self.ignored)
        say(f"listing {self.description}")
        left_out = LeftOut()
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            walked = list(pool.map(lambda path: list(tar_members(path)), self.paths))
        walked = [list(self._kept(members, left_out)) for members in walked]
        if len(self.paths) == 1 and walked[0] and all(_is_val_image(m) for m in walked[0]):
            return self._list_imagenet_val(walked[0], mtime_sizes)
        if self.val_labels is not None:
            raise UserError(
                f"--val-labels and --devkit are for ImageNet's validation images, but {self.paths[0]} holds others; "
                "leave these flags out"
            )
        names = [member.name for members in walked for member in members]
        if self.image_extension is None:
            refuse_containers(self.description, names)
        told = dataset_json_in(names) if len(walked) == 1 and self.layout in ("auto", "dataset-json") else None
        if told is not None and (found := self._list_labelled(told, walked[0], mtime_sizes, left_out)) is not None:
            return found
        if self.layout == "dataset-json":
            raise UserError(f"--layout dataset-json: {self.paths[0]} holds no {DATASET_JSON} with labels in it")
        return self._list_samples(walked, mtime_sizes, left_out)

    def _kept(self, members: Iterable[Member], left_out: LeftOut) -> Iterator[Member]:
        for member in members:
            rule = rule_against_path(member.name, self.ignored)
            if rule is None and _WEBDATASETS_OWN.fullmatch(member.name):
                rule = "WebDataset's own members"
            if rule is None:
                yield member
            else:
                left_out.add(rule, member.name)

    def _is_imagenet_train(self) -> bool:
        first = next(iter(tar_members(self.paths[0])), None)
        return first is not None and _CLASS_TAR.fullmatch(first.name) is not None

    def _list_imagenet_val(self, members: Sequence[Member], mtime_sizes: Sequence[MtimeSize]) -> Listing:
        if self.val_labels is None:
            raise UserError(
                f"{self.paths[0]} holds ImageNet's validation images, which carry no labels; add --devkit FOLDER, or "
                "--val-labels with a file of one synset a line or Kaggle's LOC_val_solution.csv"
            )
        keys = [member.name for member in members]
        return sorted_listing(
            keys,
            listed_labels(keys, self.val_labels.label_of, str(self.paths[0])),
            places=[(0, member.offset, member.size) for member in members],
            class_ids=self.val_labels.class_ids,
            containers=(str(self.paths[0]),),
            mtime_sizes=mtime_sizes,
            labels_from="the list of validation labels",
            order=AS_TEXT,
        )

    def _list_labelled(
        self, told: str, members: Sequence[Member], mtime_sizes: Sequence[MtimeSize], left_out: LeftOut
    ) -> Listing | None:
        """The images that a dataset.json is about; None where it is another program's."""
        place_of = {member.name: (0, member.offset, member.size) for member in members}
        _, offset, size = place_of[told]
        where = f"{self.paths[0]}/{told}"
        check_member(size, where)
        with self.paths[0].open("rb") as file:
            data = os.pread(file.fileno(), max(size, 0), offset)
        found = labelled_by_dataset_json(data, list(place_of), where, told.removesuffix(DATASET_JSON))
        if found is None:
            return None
        return sorted_listing(
            [f"{self.names[0]}/{key}" for key in found.keys],
            found.labels.values,
            places=[place_of[key] for key in found.keys],
            class_ids=found.labels.class_ids,
            containers=(str(self.paths[0]),),
            mtime_sizes=mtime_sizes,
            notes=[*found.notes, *left_out.notes()],
            labels_from=DATASET_JSON if found.labels.class_ids else "",
            order=found.labels.order,
        )

    def _list_samples(
        self, walked: Sequence[Sequence[Member]], mtime_sizes: Sequence[MtimeSize], left_out: LeftOut
    ) -> Listing:
        found = _Found(keys=[], places=[], texts=[], names=[], columns=[], others=set())
        scattered = 0
        labels_from: set[str] = set()
        for container, (path, name, members) in enumerate(zip(self.paths, self.names, walked, strict=True)):
            with path.open("rb", buffering=0) as file:
                samples, apart = grouped(members)
                scattered += apart
                reader = reader_for(samples, file.fileno(), self.image_extension, self.label_extension)
                if self.layout == "flat":
                    reader = Reader(image_extension=self.image_extension, label_extension=None)
                if reader.label_extension is not None:
                    key = f" key {reader.label_key!r} of" if reader.label_key else ""
                    labels_from.add(f"the{key} .{reader.label_extension} members")
                for sample in (part for whole in samples for part in reader.split(whole)):
                    image = reader.image(sample)
                    found.keys.append(f"{name}/{image.name}")
                    found.places.append((container, image.offset, image.size))
                    found.texts.append(reader.label(sample, file.fileno()))
                    found.names.append(image.name)
                    found.columns.append(len(sample))
                    found.others.update(name for name, member in sample.items() if member is not image)
        if not found.keys:
            left = "; ".join(left_out.notes())
            raise UserError(
                f"{self.paths[0]} holds no files{f' ({left})' if left else ''}; "
                "--data must name tars with images in them"
            )
        notes = [f"{scattered} samples lie scattered in their tar; joined by name"] if scattered else []
        labels = numbered_labels(found.texts, str(self.paths[0]))
        told = ", ".join(sorted(labels_from))
        kept: Sequence[int] = range(len(found.keys))
        if not labels.class_ids and self.layout != "flat":
            labels, told, kept, more = labels_by_names(
                found.names,
                [place[0] for place in found.places],
                [name.rpartition("/")[2].removesuffix(".tar") for name in self.names],
                left_out,
                are_alone=all(columns == 1 for columns in found.columns),
                layout=self.layout,
                split=self.split,
                where=self.paths[0],
            )
            notes += more
            if not labels.class_ids and found.others:
                some = ", ".join(f".{extension}" for extension in sorted(found.others)[:4])
                notes.append(
                    f"no labels are told by the {some} members beside the images; --label-column EXTENSION, or "
                    "json:KEY, takes them from one"
                )
        missing = sum(label == UNLABELLED for label in labels.values)
        if labels.class_ids and missing:
            notes.append(f"{missing} of {len(labels.values)} samples carry no label")
        return sorted_listing(
            [found.keys[k] for k in kept],
            labels.values,
            places=[found.places[k] for k in kept],
            class_ids=labels.class_ids,
            containers=tuple(map(str, self.paths)),
            mtime_sizes=mtime_sizes,
            notes=[*notes, *left_out.notes()],
            labels_from=told,
            order=labels.order,
        )

    def check_unchanged(self) -> None:
        """Raise UserError if what images are read from one by one has other bytes by now."""
        if self.streamed:
            check_unchanged(self.addresses, self.copies)

    def read(self, listing: Listing, index: int) -> bytes:
        container, offset, size = (int(number) for number in listing.places[index])
        if size == LINK:
            raise UnreadableInputError("a link in the tar, without contents; pack it with tar --hard-dereference -h")
        if size > MOST_IMAGE_BYTES:
            raise UnreadableInputError(f"it has {size:,} bytes in its tar, more than any image here may have")
        if self.streamed and is_url(self.addresses[container]):
            if not size:
                raise UnreadableInputError("zero bytes")
            return part_of(self.addresses[container], offset, size)
        path = listing.containers[container]
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                data = os.pread(descriptor, size, offset)
                while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
                    data += more
            finally:
                os.close(descriptor)
        except FileNotFoundError as error:
            raise UserError(gone(path)) from error
        except OSError as error:
            raise UserError(storage_failed(path, error)) from error
        if len(data) < size:
            raise UserError(f"{path} is shorter than when it was listed; bring the whole file back and run again")
        if not data:
            raise UnreadableInputError("zero bytes")
        return data


def _list_imagenet_train(path: Path, mtime_sizes: Sequence[MtimeSize], ignored: tuple[str, ...]) -> Listing:
    """The training tar: one tar per class inside it, named by its synset."""
    say(f"listing the class tars in {path}; every image's place is looked up once, and kept")
    class_tars: list[tuple[str, Member]] = []
    for member in tar_members(path):
        match = _CLASS_TAR.fullmatch(member.name)
        if match is None:
            raise UserError(f"{path} holds class tars and also {member.name}; it is not ImageNet's training tar")
        class_tars.append((match[1], member))
    class_ids = tuple(sorted(synset for synset, _ in class_tars))
    if len(set(class_ids)) != len(class_ids):
        raise UserError(f"{path} holds the same class twice; fetch it again")
    label = {synset: number for number, synset in enumerate(class_ids)}

    def members_of(class_tar: tuple[str, Member]) -> list[tuple[str, int, tuple[int, int, int]]]:
        synset, outer = class_tar
        inner = tar_members(path, outer.offset, outer.size)
        kept = [one for one in inner if rule_against_path(one.name, ignored) is None]
        return [(f"{synset}/{one.name}", label[synset], (0, one.offset, one.size)) for one in kept]

    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        found = [row for rows in pool.map(members_of, class_tars) for row in rows]
    if not found:
        raise UserError(f"{path} holds class tars without any file; fetch it again")
    return sorted_listing(
        [key for key, _, _ in found],
        [number for _, number, _ in found],
        places=[place for _, _, place in found],
        class_ids=class_ids,
        containers=(str(path),),
        mtime_sizes=mtime_sizes,
        labels_from="the class tars' names",
        order=AS_TEXT,
    )


def _mtime_size(path: Path) -> MtimeSize:
    try:
        return MtimeSize.of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check --data") from error


def _is_val_image(member: Member) -> bool:
    return VAL_IMAGE.fullmatch(_base(member.name)) is not None


def _base(name: str) -> str:
    return name.rpartition("/")[2]
