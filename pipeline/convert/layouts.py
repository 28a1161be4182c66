"""How other projects lay out their latents: one row each, told apart by names of files and folders alone.

A layout is a row of LAYOUTS and the function that the row names, which lists the files as a `Source`; what becomes of
them is the same for all (`imports.py`). No torch here: `--help` shows the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.convert.source import Source
from pipeline.latents.names import MANIFEST_FILE
from pipeline.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutSpec:
    """One project's layout."""

    help: str
    """What it looks like, for people."""
    suits: Callable[[Path], bool]
    """Whether a path looks like it, by names alone."""
    module: str
    """Of this package."""
    function: str = "listed"
    """In the module: gives the Source of a path, or raises UserError."""

    def listed(self, path: Path) -> Source:
        """The latents in a path.

        Raises:
            UserError: they are not there, do not fit together, or are damaged.
        """
        found: Source = getattr(import_module(f"pipeline.convert.{self.module}"), self.function)(path)
        return found


def _is_features(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*_features"))


def _is_repa(path: Path) -> bool:
    return (path / "vae-sd").is_dir() or path.absolute().name in {"vae-sd", "vae-sd.zip"}


def _is_edm2(path: Path) -> bool:
    is_zip = path.suffix.lower() == ".zip" and path.exists() and not path.is_dir()
    return is_zip or (path / "dataset.json").exists()


def _is_lightningdit(path: Path) -> bool:
    is_store = (path / MANIFEST_FILE).exists()
    return path.is_dir() and not is_store and any(path.glob("*.safetensors"))


def _is_mar(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*/*.npz"))


LAYOUTS: dict[str, LayoutSpec] = {
    "fast-dit": LayoutSpec(
        help="fast-DiT's folder *_features beside one *_labels, a .npy per image in each",
        suits=_is_features,
        module="features",
    ),
    "repa": LayoutSpec(
        help="REPA's folder vae-sd of img-mean-std-*.npy with dataset.json",
        suits=_is_repa,
        module="mean_std",
        function="listed_repa",
    ),
    "edm2": LayoutSpec(
        help="EDM2's zip or folder of img-mean-std-*.npy with dataset.json",
        suits=_is_edm2,
        module="mean_std",
        function="listed_edm2",
    ),
    "lightningdit": LayoutSpec(
        help="LightningDiT's folder of *.safetensors with latents_stats.pt",
        suits=_is_lightningdit,
        module="lightningdit",
    ),
    "mar": LayoutSpec(help="MAR's class folders of .npz (moments, moments_flip)", suits=_is_mar, module="mar"),
}

if TYPE_CHECKING:
    LayoutName = str
else:
    LayoutName = Literal[tuple(LAYOUTS)]
LAYOUTS_HELP = ", ".join(f"{name} ({layout.help})" for name, layout in LAYOUTS.items())


def find_layout(path: Path) -> str:
    """The name of the first layout that a path looks like.

    Raises:
        UserError: it looks like none, or is not there.
    """
    found = next((name for name, layout in LAYOUTS.items() if layout.suits(path)), None)
    if found is None:
        what = "holds no latents that are known here" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; what can become a store is: {LAYOUTS_HELP}; check --from")
    return found
