"""Latents of another project, listed but not read: what each layout's module finds, and all that the store asks for."""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from pipeline.runtime.console import printable
from pipeline.runtime.errors import UserError

Rows = NDArray[np.float32]
"""[sample, view, values, height, width]"""
CENTER: Final = ("center",)
BOTH_VIEWS: Final = ("center", "center-hflip")
FINGERPRINT, CROP = "the VAE's fingerprint", "how images were cropped (adm-center is written)"
"""What files may not say."""
PIXELS: Final[Mapping[str, Any]] = {"pixels": [-1, 1]}
"""In a VAE's description: what its encoder was given, as nearly everywhere."""
MOST_CLASSES: Final = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Latents of another project."""

    origin: str
    """The last component of where they lie."""
    names: Sequence[str]
    """One per sample, in the order in which samples are counted."""
    prefix: str = ""
    """What a sample's key in the store has before its name."""
    labels: NDArray[np.int64]
    """One per sample; −1 for all where there are none."""
    class_ids: Sequence[str] = ()
    """Names that the files give their classes, index = label; none where labels are bare numbers."""
    kind: str
    """`moments` or `point`."""
    views: tuple[str, ...] = CENTER
    shape: tuple[int, int, int]
    """[channels, height, width] of one latent; moments have twice as many values."""
    rows: Callable[[NDArray[np.int64]], list[NDArray[Any]]]
    """Some samples as they were saved, each [view, values, height, width] of any float type; raises UserError."""
    unscaled: Callable[[Rows, Mapping[str, Any]], Rows]
    """What the store holds of such rows, given the VAE's description; not finite where the values make no sense."""
    vae: Mapping[str, Any]
    """As which VAE's they are taken if nobody says another: the one of the project's own script."""
    overrides: Mapping[str, Any]
    """What is true of them whichever VAE it was, for its description."""
    channels: int | None
    """Of that VAE's latents; None where there are several."""
    downsample: int = 8
    """Pixels along one side of a cell of that VAE."""
    unknown: tuple[str, ...]
    """What the files do not say."""


def as_views(array: NDArray[Any], where: object, *, views: int, like: tuple[int, ...] | None = None) -> NDArray[Any]:
    """One sample as [view, values, height, width]; a file of one view may leave the first axis out.

    Raises:
        UserError: it is none, or not of the shape `like` that the first sample has.
    """
    shape = array.shape if array.ndim == 4 else (1, *array.shape)
    if len(shape) != 4 or shape[0] != views or 0 in shape or not np.issubdtype(array.dtype, np.floating):
        raise UserError(
            f"{where} is no latent of shape [{views}, channels, height, width] but {array.dtype} "
            f"[{', '.join(map(str, array.shape[:8]))}]; check the folder"
        )
    if like is not None and shape != like:
        raise UserError(
            f"{where} is not [{', '.join(map(str, like))}] like the first sample; remove or mend what does not belong "
            f"there"
        )
    return array.reshape(shape)


_DAMAGE = (OSError, ValueError, EOFError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error, SafetensorError)


@contextmanager
def reading(where: object, kind: str, advice: str) -> Iterator[None]:
    """Turn what is wrong with a file or the disk inside the block into a UserError that names the file."""
    try:
        yield
    except _DAMAGE as error:
        raise UserError(f"{where} cannot be read as {kind} ({printable(str(error)[:300])}); {advice}") from error
