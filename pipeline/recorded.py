"""What a store's manifest and a checkpoint's config.json both say: the VAE, the images and the grid of latents."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from msgspec import Meta

from pipeline.runtime.gate import Finite, Passed

Side: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 20)]
"""Of a latent in cells, of an image or a cell in pixels; a number of channels."""
Factor: TypeAlias = Finite | tuple[Finite, ...]
"""One for all channels, or one for each."""
if TYPE_CHECKING:
    LatentKind = str
else:
    LatentKind = Literal["moments", "point"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedVae(Passed):
    """What `Vae.describe` gave: enough to find the VAE again, and to know that it is this one."""

    name: str | None = None
    """`demo`, a Hub name, or a folder's last component."""
    sha256: str | None = None
    """`fingerprint` of its folder, where known."""
    scaling_factor: Factor
    """What centred latents are multiplied by."""
    shift_factor: Factor | None = None
    """What is subtracted from latents first; None is 0."""
    pixels: tuple[int, int] | None = None
    """Between what its encoder was given pixels, where another project made the latents."""
    recorded: dict[str, Any] | None = None
    """What a pipeline's checkpoint said of it, where its own copy stands in for it."""

    def __post_init__(self) -> None:
        scale = self.scaling_factor
        if 0 in (scale if isinstance(scale, tuple) else (scale,)):
            raise ValueError("scaling_factor is 0")

    @property
    def class_name(self) -> str:
        """Its class in diffusers, where known."""
        return str(self.get("class") or "class not recorded")

    def factors_by_channel(self) -> list[tuple[str, tuple[float, ...]]]:
        """(key, numbers) of the factors that are one for each channel."""
        factors = {"vae.scaling_factor": self.scaling_factor, "vae.shift_factor": self.shift_factor}
        return [(key, factor) for key, factor in factors.items() if isinstance(factor, tuple)]


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedImage(Passed):
    """How images were made of the files."""

    size: Side
    """Pixels on a side."""
    crop: str
    """`adm-center` or `random-resized`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentGrid:
    """What a latent is, however it is stored."""

    kind: LatentKind
    """`moments`: mean and log-variance of the posterior, 2C values per cell; `point`: one latent, C values."""
    channels: Side
    """C, the channels of a latent drawn from it."""
    height: Side
    """Cells from top to bottom."""
    width: Side
    """Cells from left to right."""
    downsample: Side
    """Pixels along one side of a cell."""
