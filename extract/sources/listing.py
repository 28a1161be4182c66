"""The inputs of an extraction: key, label and place of each, sorted by key, and their cache on disk.

A listing of a million files is kept as flat arrays, so that it loads in about a second and needs no object per input.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.arrays import load_zipped
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import replacing
from pipeline.runtime.gate import check_regular, parse_json, typed

UNLABELLED = -1
_VERSION = 3


class UnreadableInputError(Exception):
    """An input that is there but whose bytes cannot be had; its argument is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MtimeSize:
    """A folder or file as it was when it was listed; if it still looks so, the listing still holds."""

    path: str
    changed_ns: int
    size: int

    @classmethod
    def of(cls, path: str | Path) -> "MtimeSize":
        status = Path(path).stat()
        return cls(path=str(path), changed_ns=status.st_mtime_ns, size=status.st_size)

    def holds(self) -> bool:
        try:
            return MtimeSize.of(self.path) == self
        except OSError:
            return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """All inputs, sorted by key; the position in it is the input's `index` in the store."""

    keys: Sequence[str]
    """A name of each input: its path relative to the data, or the like. May hold lone surrogates, as file names may."""
    labels: NDArray[np.int64]
    """[inputs]; -1 where unlabelled."""
    class_ids: tuple[str, ...] = ()
    """Folder names or synsets; the position is the label."""
    places: NDArray[np.int64]
    """[inputs, 3] container, offset, size in bytes where inputs lie in larger files, else [0, 3]."""
    containers: tuple[str, ...] = ()
    mtime_sizes: tuple[MtimeSize, ...] = ()
    notes: tuple[str, ...] = ()
    """What people should know about how the data was understood."""
    labels_from: str = ""
    """Where the labels come from, for people."""
    order: str = ""
    """How the classes were sorted, for people."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def sha256(self) -> str:
        """A fingerprint of every key, label and class, not of where the data lies."""
        digest = hashlib.sha256(_joined(self.keys))
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(_joined(self.class_ids))
        return digest.hexdigest()

    def printable_key(self, index: int) -> str:
        """The key as valid Unicode: bytes of a file name that are not UTF-8 appear as hexadecimal."""
        return printable(self.keys[index])


class Source(Protocol):
    """One kind of place that images come from; a local one, whose name alone decides, unless it says otherwise."""

    @property
    def description(self) -> str:
        """What is read, for people."""

    @property
    def identity(self) -> str:
        """Tells one source from another in the listing's cache."""

    @property
    def is_remote(self) -> bool:
        """Whether listing means fetching everything."""
        return False

    @property
    def settings(self) -> Mapping[str, Any]:
        """What else decides about which bytes are read, by the flag that says it."""
        return {}

    @property
    def as_served(self) -> str | None:
        """Tells the bytes that a server has from those that it had or will have; None where none is asked."""
        return None

    def check_unchanged(self) -> None:
        """Raise UserError if bytes that were read since the listing may be others; where nobody can tell, nothing."""
        return

    def inputs(self) -> Listing:
        """Every input, without opening it where the source allows that.

        Raises:
            UserError: there is nothing to list, or it is damaged.
        """

    def read(self, listing: Listing, index: int) -> bytes:
        """The encoded image; safe to call from many threads.

        Raises:
            UnreadableInputError: this input is bad; others may be good.
            UserError: the input was there when it was listed and is gone, or the storage fails.
        """


def sorted_listing(
    keys: Sequence[str],
    labels: Sequence[int] | NDArray[np.int64],
    *,
    places: Sequence[tuple[int, int, int]] = (),
    class_ids: tuple[str, ...] = (),
    containers: tuple[str, ...] = (),
    mtime_sizes: Sequence[MtimeSize] = (),
    notes: Sequence[str] = (),
    labels_from: str = "",
    order: str = "",
) -> Listing:
    """The listing of inputs found in any order, sorted by key in code point order."""
    by_key = sorted(range(len(keys)), key=keys.__getitem__)
    return Listing(
        keys=[keys[i] for i in by_key],
        labels=np.asarray(labels, dtype=np.int64).reshape(-1)[by_key],
        class_ids=tuple(map(printable, class_ids)),
        places=np.asarray(places, dtype=np.int64).reshape(-1, 3)[by_key if places else []],
        containers=containers,
        mtime_sizes=tuple(mtime_sizes),
        notes=tuple(notes),
        labels_from=labels_from,
        order=order,
    )


def cached_listing(source: Source, cache: Path | None) -> Listing:
    """The source's listing, from the cache if nothing that it was made from has changed since."""
    if cache is None:
        return source.inputs()
    found = _load(cache, source.identity)
    if found is None:
        found = source.inputs()
        if found.mtime_sizes:
            _save(cache, source.identity, found)
    return found


def _save(cache: Path, identity: str, listing: Listing) -> None:
    header = {
        "version": _VERSION,
        "identity": identity,
        "class_ids": listing.class_ids,
        "containers": listing.containers,
        "notes": listing.notes,
        "labels_from": listing.labels_from,
        "order": listing.order,
        "stamps": [(one.path, one.changed_ns, one.size) for one in listing.mtime_sizes],
    }
    with replacing(cache) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            keys=np.frombuffer(_joined(listing.keys), np.uint8),
            labels=listing.labels,
            places=listing.places,
        )


class _Header(msgspec.Struct, frozen=True):
    version: int
    identity: str
    class_ids: tuple[str, ...]
    containers: tuple[str, ...]
    notes: tuple[str, ...]
    labels_from: str
    order: str
    stamps: tuple[tuple[str, int, int], ...]


def _load(cache: Path, identity: str) -> Listing | None:
    """The cached listing, or None if there is none that holds: a cache is never a reason to stop."""
    try:
        check_regular(cache)
        with zipfile.ZipFile(cache) as archive:
            said = parse_json(load_zipped(archive, "header.npy").tobytes(), cache)
            header = typed(said, _Header, f"{cache} is no listing", advice="remove it")
            if (header.version, header.identity) != (_VERSION, identity):
                return None
            mtime_sizes = tuple(MtimeSize(path=path, changed_ns=at, size=size) for path, at, size in header.stamps)
            if not all(one.holds() for one in mtime_sizes):
                return None
            names = load_zipped(archive, "keys.npy").tobytes()
            found = Listing(
                keys=_split(names),
                labels=load_zipped(archive, "labels.npy"),
                class_ids=header.class_ids,
                places=load_zipped(archive, "places.npy"),
                containers=header.containers,
                mtime_sizes=mtime_sizes,
                notes=header.notes,
                labels_from=header.labels_from,
                order=header.order,
            )
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, UserError):
        return None
    if not _is_whole(found):
        return None
    leads_out = not len(found.places) and any(step in b"\0" + names for step in (b"\0/", b"\0../", b"/../"))
    return None if leads_out else found


def _is_whole(listing: Listing) -> bool:
    """Whether every input has a label, which is of a class, and a place, which is in a container."""
    labels, places, inputs = listing.labels, listing.places, len(listing)
    if labels.dtype != np.int64 or places.dtype != np.int64 or labels.shape != (inputs,):
        return False
    if places.shape not in {(0, 3), (inputs, 3)} or labels.min(initial=UNLABELLED) < UNLABELLED:
        return False
    numbers = places[:, 0]
    is_contained = numbers.min(initial=0) >= 0 and numbers.max(initial=-1) < len(listing.containers)
    return bool(is_contained and labels.max(initial=UNLABELLED) < max(len(listing.class_ids), UNLABELLED + 1))


def printable(name: str) -> str:
    """The name as valid Unicode: bytes of a file name that are not UTF-8 appear as hexadecimal."""
    return _encoded(name).decode("utf-8", "backslashreplace")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _joined(texts: Sequence[str]) -> bytes:
    return _encoded("".join(f"{text}\0" for text in texts))


def _split(data: bytes) -> list[str]:
    return data.decode("utf-8", "surrogateescape").split("\0")[:-1]
