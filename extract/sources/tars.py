"""Images inside tars, read in place at recorded offsets: WebDataset shards, and ImageNet's two official tars.

A tar is walked once, header by header, when it is listed; afterwards an image is one `pread`. Tars behind a URL are
copied whole first (`extract.sources.remote`), because the shuffled order reads every tar from end to end many times.
"""

import fnmatch
import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from extract.sources.folders import gone, storage_failed
from extract.sources.imagenet import VAL_IMAGE, ImageLabels, hash_of_labels, listed_labels
from extract.sources.listing import UNLABELLED, Listing, MtimeSize, UnreadableInputError, sorted_listing
from extract.sources.remote import fetch, is_remote, local_place
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError

_IMAGE_EXTENSIONS = {"jpg", "jpeg", "jpe", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "img", "image"}
_CLASS_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_LISTING_THREADS = 8
_LINK = -1
_AFTER_THE_END = 1 << 16
_MOST_LABELS = 100_000
_NUMBER = re.compile(r"-?[0-9]+")


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int
    size: int
    """In bytes; _LINK for a link or a sparse file, which has no contents of its own to read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TarSource:
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

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(local_place(address, self.copies) for address in self.addresses)

    @property
    def is_remote(self) -> bool:
        return any(is_remote(address) for address in self.addresses)

    @property
    def settings(self) -> Mapping[str, Any]:
        names = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        return {"tars": names, "image-column": self.image_extension, "label-column": self.label_extension}

    @property
    def description(self) -> str:
        first = self.addresses[0]
        return f"tar {first}" if len(self.addresses) == 1 else f"{len(self.addresses)} tars from {first} on"

    @property
    def identity(self) -> str:
        labels = hash_of_labels(self.val_labels.label_of) if self.val_labels else ""
        chosen = (self.image_extension or "", self.label_extension or "", *self.ignored, labels)
        return "\n".join(["tars", *self.addresses, *chosen, *filter(None, [self.as_served])])

    @property
    def as_served(self) -> str | None:
        """Tells the bytes that a server has from those that it had or will have; None for tars on a disk."""
        return "\n".join(path.name for path in self.paths) if self.is_remote else None

    def inputs(self) -> Listing:
        fetch(self.addresses, self.copies)
        mtime_sizes = [_mtime_size(path) for path in self.paths]
        if len(self.paths) == 1 and self._is_imagenet_train():
            return _list_imagenet_train(self.paths[0], mtime_sizes, self.ignored)
        say(f"listing {self.description}")
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            walked = list(pool.map(lambda path: list(self._kept(tar_members(path))), self.paths))
        if len(self.paths) == 1 and walked[0] and all(VAL_IMAGE.fullmatch(_base(m.name)) for m in walked[0]):
            return self._list_imagenet_val(walked[0], mtime_sizes)
        if self.val_labels is not None:
            raise UserError(
                f"--val-labels and --devkit are for ImageNet's validation images, but {self.paths[0]} holds others; "
                "leave these flags out"
            )
        return self._list_webdataset(walked, mtime_sizes)

    def _kept(self, members: Iterable[Member]) -> Iterator[Member]:
        for member in members:
            base = _base(member.name)
            if not base.startswith((".", "__")) and not any(fnmatch.fnmatch(base, one) for one in self.ignored):
                yield member

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
        )

    def _list_webdataset(self, walked: Sequence[Sequence[Member]], mtime_sizes: Sequence[MtimeSize]) -> Listing:
        keys: list[str] = []
        places: list[tuple[int, int, int]] = []
        texts: list[str | None] = []
        for container, (path, name, members) in enumerate(zip(self.paths, self.names, walked, strict=True)):
            with path.open("rb", buffering=0) as file:
                for sample in _samples(members):
                    image = self._image_of(sample)
                    keys.append(f"{name}/{image.name}")
                    places.append((container, image.offset, image.size))
                    texts.append(self._label_text(sample, file.fileno()))
        if not keys:
            raise UserError(f"{self.paths[0]} holds no files; --data must name tars with images in them")
        labels, class_ids = numbered_labels(texts)
        missing = sum(text is None for text in texts)
        notes = [f"{missing} of {len(texts)} samples carry no label"] if class_ids and missing else []
        return sorted_listing(
            keys,
            labels,
            places=places,
            class_ids=class_ids,
            containers=tuple(map(str, self.paths)),
            mtime_sizes=mtime_sizes,
            notes=notes,
        )

    def _image_of(self, sample: dict[str, Member]) -> Member:
        """The sample's image; where it has none, its first member, which is then left out as no image."""
        if self.image_extension is not None:
            wanted = self.image_extension.lower().removeprefix(".")
            return sample.get(wanted, next(iter(sample.values())))
        images = [member for name, member in sample.items() if name.rpartition(".")[2] in _IMAGE_EXTENSIONS]
        if len(images) > 1:
            raise UserError(
                f"{images[0].name} and {images[1].name} are images of the same sample; choose one by "
                "--image-column EXTENSION"
            )
        return images[0] if images else next(iter(sample.values()))

    def _label_text(self, sample: dict[str, Member], descriptor: int) -> str | None:
        member = sample.get((self.label_extension or "cls").lower().removeprefix("."))
        if member is None:
            return None
        if member.size == _LINK:
            raise UserError(
                f"{member.name} is a link in its tar; pack it with its contents, by tar --hard-dereference -h"
            )
        return os.pread(descriptor, min(member.size, 200), member.offset).decode("utf-8", "replace").strip()

    def read(self, listing: Listing, index: int) -> bytes:
        container, offset, size = (int(number) for number in listing.places[index])
        if size == _LINK:
            raise UnreadableInputError("a link in the tar, without contents; pack it with tar --hard-dereference -h")
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


def numbered_labels(texts: Sequence[str | int | None]) -> tuple[list[int], tuple[str, ...]]:
    """Labels and class ids for what the data calls its classes: whole numbers stay, names are sorted and counted."""
    named = [text for text in texts if text is not None]
    if all(_NUMBER.fullmatch(str(text)) for text in named):
        labels = [UNLABELLED if text is None else max(int(text), UNLABELLED) for text in texts]
        count = max(labels, default=UNLABELLED) + 1
        if count > max(_MOST_LABELS, len(texts)):
            raise UserError(
                f"a label is {count - 1:,}, which makes far more classes than the {len(texts):,} samples can fill; "
                f"choose what holds the labels by --label-column"
            )
        return labels, tuple(str(label) for label in range(count))
    class_ids = tuple(sorted({str(text) for text in named}))
    label = {name: number for number, name in enumerate(class_ids)}
    return [UNLABELLED if text is None else label[str(text)] for text in texts], class_ids


def tar_members(path: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """The files and links of a tar, in order, offsets counted from the start of the file at `path`.

    Args:
        path: the file.
        start: where the tar begins in it.
        size: how many bytes the tar has; None, up to the end of the file.

    Raises:
        UserError: the file is missing, is no tar, is compressed, or is cut off.
    """
    try:
        with path.open("rb") as file:
            window = _Window(file, start, os.fstat(file.fileno()).st_size - start if size is None else size)
            with tarfile.open(fileobj=cast("IO[bytes]", window), mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined] # tarfile would keep a million objects
                    if member.isreg() and not member.issparse():
                        yield Member(member.name, start + member.offset_data, member.size)
                    elif member.isreg() or member.issym() or member.islnk():
                        yield Member(member.name, start + member.offset_data, _LINK)
                window.seek(archive.offset)
                if window.read(512) != bytes(512):
                    raise UserError(f"{path} is cut off: its end mark is missing; fetch it again")
                if any(window.read(_AFTER_THE_END)):
                    raise UserError(
                        f"{path} goes on after its end mark, as tars that were joined by cat do; give each as a file "
                        f"of its own"
                    )
    except tarfile.TarError as error:
        raise UserError(f"{path} cannot be read as an uncompressed tar ({error}); unpack or fetch it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the path and its rights") from error


class _Window:
    """A part of an open file that looks like a file of its own."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def read(self, count: int) -> bytes:
        data = os.pread(
            self._file.fileno(), max(0, min(count, self._size - self._position)), self._start + self._position
        )
        self._position += len(data)
        return data

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def tell(self) -> int:
        return self._position


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
        kept = (one for one in inner if not any(fnmatch.fnmatch(_base(one.name), name) for name in ignored))
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
    )


def _samples(members: Iterable[Member]) -> Iterator[dict[str, Member]]:
    """Neighbours that share their path up to the first dot of the file name, by extension: WebDataset's samples.

    The grouping is webdataset's own. The walk is not: its reader takes every byte of a tar to list it (4,000 samples of
    110 kB: 446 MB and 0.8 s of CPU time, here 4 MB and 0.3 s), and tells no offsets, by which samples are then read in
    another order than they lie in.
    """
    from webdataset.tariterators import group_by_keys

    def split(name: str) -> tuple[str, str]:
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        return f"{folder}/{stem}", extension

    named = ({"fname": member.name, "data": member, "__url__": ""} for member in members)
    try:
        for sample in group_by_keys(named, keys=split):
            yield {extension: member for extension, member in sample.items() if isinstance(member, Member)}
    except ValueError as error:
        raise UserError(
            f"{str(error.args[0]).partition(': duplicate')[0]} comes twice in one sample of its tar; give every sample "
            "a name of its own, so that none hides another"
        ) from error


def _mtime_size(path: Path) -> MtimeSize:
    try:
        return MtimeSize.of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check --data") from error


def _base(name: str) -> str:
    return name.rpartition("/")[2]
