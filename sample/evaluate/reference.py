"""Files of statistics: ADM's reference files read as they stand, and our own in the same form.

| array | what |
|---|---|
| `mu` [2048], `sigma` [2048, 2048] | Gaussian of the pooled features, for FID |
| `mu_s` [2023], `sigma_s` [2023, 2023] | Gaussian of the spatial features, for sFID |
| `count` | ours only: how many images they are of |
| `features` [count, 2048] | ours only, if asked for: what precision, recall and KID need |
| `provenance` | ours only: JSON text, what the numbers were made of |
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import Passed, parse_json, shortened, typed
from sample.evaluate.metrics import FeatureName, Gaussian
from sample.evaluate.npz import content_key, list_arrays, read_array

FORMAT = "dit-reference"
VERSION = 1
ARRAY_NAMES: dict[FeatureName, tuple[str, str]] = {"features_2048": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_WIDTHS: dict[FeatureName, int] = {"features_2048": 2048, "spatial": 2023}
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights(Passed):
    """The FID network's file."""

    sha256: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Provenance(Passed):
    """What the numbers were made of, as far as it is asked for later; empty in other projects' files."""

    inception: Weights | None = None


_NOTHING = typed({}, Provenance, "", advice="")


@dataclass(frozen=True, kw_only=True, eq=False)
class Written(Passed):
    """The JSON beside a reference, as far as it is asked for later."""

    request: str | None = None
    """What was asked for."""
    sha256: str | None = None
    """Of the reference."""


def read_written(sidecar: Path) -> Written:
    """The JSON beside a reference; nothing said where there is none.

    Raises:
        UserError: it is no JSON, or its values are of other types.
    """
    said = read_json(sidecar) if sidecar.is_file() else {}
    return typed(
        said, Written, f"{sidecar} is damaged", advice="restore it, or make the reference again by --overwrite"
    )


class StatisticsFile:
    """The statistics in an .npz, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            UserError: it is damaged, or of a version that is not known here.
        """
        self.path = path
        self._arrays = list_arrays(path)
        self.provenance = self._read_provenance()
        self.count = self._read_count()

    def key(self) -> str:
        return content_key(self.path)

    def has_gaussian(self, feature: FeatureName) -> bool:
        return all(name in self._arrays for name in ARRAY_NAMES[feature])

    def gaussian(self, feature: FeatureName) -> Gaussian:
        """The Gaussian of `features_2048` or `spatial`.

        Raises:
            UserError: it is of another width, not finite, or its arrays are damaged.
        """
        mean_name, covariance_name = ARRAY_NAMES[feature]
        width = _WIDTHS[feature]
        mean = self._numbers(mean_name, (width,))
        covariance = self._numbers(covariance_name, (width, width))
        if not np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6) or covariance.diagonal().min() < 0:
            raise UserError(
                f"{covariance_name} of {self.path} is no covariance (it must be symmetric, with a diagonal from 0 on); "
                f"make it again with --make-reference"
            )
        return Gaussian(mean=mean, covariance=covariance)

    @property
    def has_features(self) -> bool:
        return "features" in self._arrays

    def features(self) -> NDArray[np.floating]:
        """The pooled features of every image, float32 [count, 2048]."""
        rows = read_array(self.path, "features")
        if rows.ndim != 2 or rows.shape[1] != 2048 or rows.dtype.kind != "f" or not np.isfinite(rows).all():
            raise UserError(f"features of {self.path} are not finite numbers [N, 2048]; make the reference again")
        return rows.astype(np.float32)

    def _numbers(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        array = read_array(self.path, name)
        if array.shape != shape or array.dtype.kind not in "fiu":
            raise UserError(
                f"{name} of {self.path} is {array.dtype}{list(array.shape)}, but numbers {list(shape)} are needed: "
                f"it comes from another network than FID's; make it again with --make-reference"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{name} of {self.path} holds NaN or infinity; make it again with --make-reference")
        return array.astype(np.float64)

    def _read_count(self) -> int | None:
        if "count" not in self._arrays:
            return None
        count = read_array(self.path, "count")
        if count.shape != () or count.dtype.kind not in "iu" or int(count) < 1:
            raise UserError(f"count of {self.path} is no number of images; make the file again with --make-reference")
        return int(count)

    def _read_provenance(self) -> Provenance:
        if "provenance" not in self._arrays:
            return _NOTHING
        try:
            text = str(read_array(self.path, "provenance")).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"provenance of {self.path} is no text; make it again") from error
        content = parse_json(text, f"provenance of {self.path}", advice="make it again")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return _NOTHING
        if (version := content.get("version")) != VERSION:
            raise UserError(
                f"{self.path} is a reference of version {shortened(version)}, but version {VERSION} is known here; "
                f"upgrade this program or make the file again"
            )
        return typed(content, Provenance, f"provenance of {self.path} is damaged", advice="make it again")


def write_statistics(
    path: Path,
    gaussians: Mapping[FeatureName, Gaussian],
    *,
    count: int,
    features: NDArray[np.floating] | None,
    provenance: Mapping[str, Any],
) -> None:
    """Write a file of statistics; the same numbers give the same bytes."""
    arrays: dict[str, NDArray[Any]] = {}
    for feature, gaussian in gaussians.items():
        mean_name, covariance_name = ARRAY_NAMES[feature]
        arrays[mean_name], arrays[covariance_name] = gaussian.mean, gaussian.covariance
    arrays["count"] = np.asarray(count, dtype=np.int64)
    if features is not None:
        arrays["features"] = features
    text = json.dumps({"format": FORMAT, "version": VERSION, **provenance}, ensure_ascii=True)
    arrays["provenance"] = np.asarray(text)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", date_time=_ZIP_EPOCH), "w", force_zip64=True) as file:
                npy.write_array(file, np.asarray(array, order="C"), allow_pickle=False)
