"""What a checkpoint says of itself: its config.json, checked once and typed from then on."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from pipeline.checkpoint.folder import FORMAT, VERSION
from pipeline.diffusion.process import Process, make_process
from pipeline.dit.config import DiTConfig
from pipeline.recorded import LatentGrid, RecordedImage, RecordedVae
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import Count, Finite, Passed, shortened, typed


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStatistics:
    """How a class token is fed: (numbers − mean) / std."""

    mean: tuple[Finite, ...]
    std: tuple[Annotated[float, Meta(gt=0, le=1e300)], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Training(Passed):
    """What of a training the program asks for later; the other settings are for people."""

    batch_size: Count | None = None
    samples: Count | None = None
    views: tuple[str, ...] = ()
    ema_sigma: tuple[Finite, ...] = ()
    """Relative widths of the power-function averages that the checkpoint holds."""
    data_identity: str | None = None
    class_token: TokenStatistics | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointInfo(Passed):
    """What a checkpoint's config.json says."""

    step: Count
    model: dict[str, Any]
    """As `DiTConfig.to_json` gives it."""
    diffusion: dict[str, Any]
    """As a process's `to_json` gives it."""
    classes: tuple[str, ...]
    class_ids: tuple[str, ...]
    latent: LatentGrid
    vae: RecordedVae
    image: RecordedImage
    training: Training

    def __post_init__(self) -> None:
        faults = [
            f"{key} is {shortened(list(values))}, but must be {self.latent.channels} numbers, one for each channel"
            for key, values in self.vae.factors_by_channel()
            if len(values) != self.latent.channels
        ]
        try:
            _ = self.network, self.process
        except (UserError, TypeError) as error:
            faults.append(str(error))
        if faults:
            raise ValueError("; ".join(faults))

    @cached_property
    def network(self) -> DiTConfig:
        """The network's configuration."""
        return DiTConfig.from_json(self.model)

    @cached_property
    def process(self) -> Process:
        """What it was trained for."""
        return make_process(self.diffusion)


def make_info(values: Mapping[str, Any], *, origin: object = "this checkpoint", **changes: Any) -> CheckpointInfo:
    """What config.json says with these values, other ones under some keys; checked.

    Raises:
        UserError: values are missing or of another type, or describe no network or process; names all of them.
    """
    return typed({**values, **changes}, CheckpointInfo, f"{origin} is damaged", advice="restore the checkpoint")


def read_info(folder: Path) -> CheckpointInfo:
    """The checked content of a checkpoint folder's config.json.

    Raises:
        UserError: it is missing, damaged, of another format or an unknown version.
    """
    path = folder / "config.json"
    info = read_json(path)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise UserError(
            f"{path} has format {shortened(found)}, not {FORMAT!r}; it does not describe a checkpoint of this project"
        )
    if (version := info.get("version")) != VERSION:
        raise UserError(
            f"{path} is a {FORMAT} of version {shortened(version)}, but this program reads version {VERSION}; "
            f"update dit-pipeline, or convert the checkpoint with the version that wrote it"
        )
    return make_info(info, origin=path)
