"""Which class each image is asked to show: by class in rows, random, balanced, or from a file."""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.classes import find_class, find_classes
from pipeline.randomness import Permutation, derive_seed
from pipeline.runtime.arrays import load_member, load_npy
from pipeline.runtime.bounds import MOST_IMAGES
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import check_regular, read_regular
from sample.options import ImageOptions

UNLABELLED = -1
SHOWN_CLASSES = 20  # with more than this, a plain command shows a few of them
DRAWN_CLASSES = 8
SAMPLES_PER_CLASS = 8
_SOON_DRAWN = 1_000_000
"""Samples whose classes are drawn within some seconds, each by the SHA-256 of its number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownClasses:
    """The classes of a checkpoint."""

    count: int
    """0 for an unconditional network."""
    names: Sequence[str] = ()
    """Readable names, index = label; may be empty."""
    ids: Sequence[str] = ()
    """Folder names or synsets, same order; may be empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenLabels:
    """One label per image, and the rule that gave them."""

    values: NDArray[np.int64]
    """Label of image k at position k; -1 where the network knows no classes."""
    rule: dict[str, Any]
    """What the sidecar says about them."""

    def __len__(self) -> int:
        return len(self.values)

    def with_values(self) -> dict[str, Any]:
        """The rule, and the labels themselves where a file gave them, which nothing else would tell."""
        return {**self.rule, "values": self.values.tolist()} if self.rule["rule"] == "file" else self.rule

    def of_batch(self, first: int, count: int) -> NDArray[np.int64]:
        """The labels of images first … first + count − 1; past the end the last one, as padding."""
        return self.values[np.minimum(np.arange(first, first + count), len(self) - 1)]


def choose_labels(options: ImageOptions, known: KnownClasses, *, seed: int) -> ChosenLabels:
    """The label of every image. With the rules random and balanced it depends on (seed, k) alone.

    Raises:
        UserError: an unknown or ambiguous class, classes asked of an unconditional network, a bad file.
    """
    if known.count == 0:
        return _unlabelled(options)
    if options.labels not in {None, "random", "balanced"}:
        return _from_file(Path(options.labels or ""), options.num_samples, known)
    named = None if options.classes is None else _named(options.classes, known)
    if options.num_samples is None:
        classes = _classes_to_show(known, seed) if named is None else named
        count = options.samples_per_class or SAMPLES_PER_CLASS
        if len(classes) * count > MOST_IMAGES:
            raise UserError(
                f"{count} images of each of {len(classes)} classes are {len(classes) * count}, more than "
                f"the {MOST_IMAGES} of one job; ask for fewer, or make several jobs with other seeds"
            )
        values = np.repeat(np.asarray(classes, dtype=np.int64), count)
        return _chosen(values, {"rule": "by-class", "classes": classes, "samples_per_class": count})
    rule = options.labels or "random"
    classes = list(range(known.count)) if named is None else named
    positions = np.arange(options.num_samples)
    if rule == "random":
        if options.num_samples > _SOON_DRAWN:
            say(f"drawing the classes of {options.num_samples:,} samples; a million take some seconds")
        positions = np.array([derive_seed(seed, "sample-label", int(k)) for k in positions], dtype=np.int64)
    values = np.asarray(classes, dtype=np.int64)[positions % len(classes)]
    return _chosen(values, {"rule": rule, "classes": "all" if named is None else classes})


def labels_of(values: NDArray[np.int64], known: KnownClasses) -> ChosenLabels:
    """Labels that stand in a file beside what they are of.

    Raises:
        UserError: the checkpoint has no such classes.
    """
    if known.count == 0:
        return _chosen(np.full(len(values), UNLABELLED, dtype=np.int64), {"rule": "unconditional"})
    if values.min() < 0 or values.max() >= known.count:
        raise UserError(
            f"the latents' labels reach from {values.min()} to {values.max()}, but the checkpoint's are 0 to "
            f"{known.count - 1}; say which with --classes or --labels"
        )
    return _chosen(values, {"rule": "file"})


def _named(text: str, known: KnownClasses) -> list[int]:
    try:
        return find_classes(text, known.names, known.ids, count=known.count)
    except UserError as error:
        raise UserError(f"--classes: {error}") from error


def _chosen(values: NDArray[np.int64], rule: dict[str, Any]) -> ChosenLabels:
    digest = hashlib.sha256(np.ascontiguousarray(values, dtype="<i8").tobytes()).hexdigest()
    return ChosenLabels(values=values, rule={**rule, "samples": len(values), "sha256": digest})


def _unlabelled(options: ImageOptions) -> ChosenLabels:
    if options.classes is not None or options.labels is not None:
        flag = "--classes" if options.classes is not None else "--labels"
        raise UserError(f"{flag} asks for classes, but this checkpoint is unconditional; leave {flag} away")
    count = options.num_samples or options.samples_per_class or SAMPLES_PER_CLASS**2
    return _chosen(np.full(count, UNLABELLED, dtype=np.int64), {"rule": "unconditional"})


def _classes_to_show(known: KnownClasses, seed: int) -> list[int]:
    """All classes, or a few drawn by the seed where a picture of all would not be readable."""
    if known.count <= SHOWN_CLASSES:
        return list(range(known.count))
    drawn = Permutation(known.count, seed, "sample-classes")[np.arange(DRAWN_CLASSES)]
    return sorted(int(label) for label in drawn)


def _from_file(path: Path, num_samples: int | None, known: KnownClasses) -> ChosenLabels:
    values = _read_labels(path, known)
    count = len(values) if num_samples is None else num_samples
    if count > len(values) or not len(values):
        raise UserError(
            f"--labels {path} holds {len(values)} labels, but {max(count, 1)} are needed; lower --num-samples"
        )
    values = values[:count]
    if values.min() < 0 or values.max() >= known.count:
        raise UserError(
            f"--labels {path} holds labels from {values.min()} to {values.max()}, "
            f"but the checkpoint's are 0 to {known.count - 1}; correct the file"
        )
    return _chosen(values, {"rule": "file"})


def _read_labels(path: Path, known: KnownClasses) -> NDArray[np.int64]:
    try:
        check_regular(path)
        if path.suffix not in {".npy", ".npz"}:
            return _labels_of_lines(path, read_regular(path).decode("utf-8-sig").splitlines(), known)
        content = load_member(path, "arr_1") if zipfile.is_zipfile(path) else load_npy(path)
    except FileNotFoundError as error:
        raise UserError(f"--labels {path} is neither random nor balanced nor a file; check the path") from error
    except (OSError, ValueError, KeyError, UnicodeDecodeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"--labels {path} cannot be read as labels ({error}); see dit-sample --help") from error
    if content.ndim != 1 or content.dtype.kind not in "iu":
        raise UserError(
            f"--labels {path} holds {content.dtype}{list(content.shape)}, but one row of integers is needed"
        )
    return content.astype(np.int64)


def _labels_of_lines(path: Path, lines: Sequence[str], known: KnownClasses) -> NDArray[np.int64]:
    """One class a line; empty lines are passed over. Each distinct spelling is looked up once."""
    words = [line.strip() for line in lines if line.strip()]
    labels: dict[str, int] = {}
    complaints: list[str] = []
    for word in dict.fromkeys(words):
        try:
            labels[word] = find_class(word, known.names, known.ids, count=known.count)
        except UserError as error:
            complaints.append(str(error))
    if complaints:
        shown = "; ".join(complaints[:5]) + (f"; and {len(complaints) - 5} more" if len(complaints) > 5 else "")
        raise UserError(f"--labels {path}: {shown}")
    return np.array([labels[word] for word in words], dtype=np.int64)
