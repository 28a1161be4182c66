"""Guidance: away from a weaker prediction, whatever that one comes from, as a wrapper around the network.

guided = weaker + scale · (prediction - weaker)

Where the weaker prediction comes from is a `GuidanceSource`: of the same network without a class that is
classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), of a smaller or less trained network for the same class
autoguidance (Karras et al. 2024, arXiv 2406.02507, equation 3).
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.diffusion.denoiser import NetworkFn, at_least_float32, on_host
from pipeline.runtime.errors import UserError

Network = Callable[..., Tensor]
"""`model(x, t, y)`."""


@runtime_checkable
class GuidanceSource(Protocol):
    """A network for samples of known classes, and something that predicts the same less well."""

    def alone(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's own output, where guidance rests."""
        ...

    def both(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(The network's output, the weaker one), of which the first C channels are the prediction."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class NullClass:
    """The same network told "no class": both from one pass on twice the batch, conditional half first."""

    model: Network
    y: Int[Tensor, " batch"]
    null_y: Int[Tensor, " batch"]

    def alone(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The conditional output."""
        return self.model(x_t, t, self.y)

    def both(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(conditional, unconditional)."""
        output = self.model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([self.y, self.null_y]))
        conditional, unconditional = output.chunk(2)
        return conditional, unconditional


@dataclasses.dataclass(frozen=True, slots=True)
class OtherNetwork:
    """Another network for the same classes, one pass of each; y is None where the two are unconditional."""

    model: Network
    y: Int[Tensor, " batch"] | None
    guide: Network

    def alone(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output."""
        return self.model(x_t, t, self.y)

    def both(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(the network's output, the guide's)."""
        return self.model(x_t, t, self.y), self.guide(x_t, t, self.y)


@runtime_checkable
class TwoHeaded(Protocol):
    """A network that says what its middle thinks, too."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The network's output."""
        ...

    def forward_with_middle(self, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """(The network's output, its middle head's) from one pass."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class MiddleHead:
    """The same network's middle head: both from one pass on the batch itself (arXiv 2512.24176)."""

    model: TwoHeaded
    y: Int[Tensor, " batch"] | None

    def alone(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output."""
        return self.model(x_t, t, self.y)

    def both(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(the network's output, its middle head's)."""
        return self.model.forward_with_middle(x_t, t, self.y)


def guided(
    source: GuidanceSource,
    *,
    scale: float = 1.0,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    time_scale: float = 1000.0,
    noise_first: bool = False,
) -> NetworkFn:
    """A `denoise(x_t, t)`, guided by the scale away from the weaker prediction of the source.

    With scale 1, and where all samples are outside the interval, it costs no more than the network alone; elsewhere
    samples outside keep its prediction. Variance channels are always the network's.

    Args:
        channels: how many of the predicted channels are guided, the first ones; None for all. The release's samples
            were made with 3 of 4.
        interval: where guidance applies, as shares of time from data (0) to noise (1), both ends included
            (Kynkäänniemi et al. 2024, arXiv 2404.07724); None for everywhere.
        time_scale: what the network is fed at the end of its time (`process.time_scale`).
        noise_first: whether its time runs from noise to data (`process.noise_first`).

    Raises:
        UserError: the interval does not rise within 0 … 1.
    """
    low, high = _checked_interval(interval)
    low, high = (1 - high, 1 - low) if noise_first else (low, high)
    if scale == 1:
        return source.alone

    def is_inside(t: Tensor) -> Tensor:
        return (t >= low * time_scale) & (t <= high * time_scale)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        inside = None
        if interval is not None:
            if not is_inside(on_host(t)).any():
                return source.alone(x_t, t)
            inside = is_inside(t)
        output, weaker = map(at_least_float32, source.both(x_t, t))
        count = x_t.shape[1] if channels is None else min(channels, x_t.shape[1])
        mixed = _mix(output[:, :count], weaker[:, :count], scale, inside)
        return torch.cat([mixed, output[:, count:]], dim=1)

    return denoise


def classifier_free_guidance(
    model: Network,
    y: Int[Tensor, " batch"] | None,
    *,
    scale: float = 1.0,
    null_class: int | None = None,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    time_scale: float = 1000.0,
    noise_first: bool = False,
) -> NetworkFn:
    """A `denoise(x_t, t)` for samples of the classes y, `guided` away from the network's output for no class.

    Args:
        y: labels; None for an unconditional network.
        null_class: the label that means "no class"; None if the network has none.

    Raises:
        UserError: the scale is not 1, but the network has no classes or no null class; or as `guided`.
    """
    if scale == 1:
        return lambda x_t, t: model(x_t, t, y)
    source = NullClass(model, *_labels_to_guide_between(model, y, null_class, scale))
    return guided(
        source, scale=scale, channels=channels, interval=interval, time_scale=time_scale, noise_first=noise_first
    )


def _mix(
    prediction: Float[Tensor, "batch channel height width"],
    weaker: Float[Tensor, "batch channel height width"],
    scale: float,
    inside: Tensor | None,
) -> Float[Tensor, "batch channel height width"]:
    mixed = weaker + scale * (prediction - weaker)
    return mixed if inside is None else torch.where(inside[:, None, None, None], mixed, prediction)


def _labels_to_guide_between(
    model: Network, y: Tensor | None, null_class: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    config = getattr(model, "config", None)
    if y is None or (config is not None and config.num_classes == 0):
        raise UserError(f"guidance {scale} needs classes, but this network is unconditional; use --guidance 1")
    if null_class is None or (config is not None and null_class >= config.label_rows):
        raise UserError(
            f"guidance {scale} needs a null class, but this network was trained without label dropout and has none; "
            f"use --guidance 1"
        )
    return y, torch.full_like(y, null_class)


def _checked_interval(interval: tuple[float, float] | None) -> tuple[float, float]:
    low, high = interval or (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise UserError(f"the guidance interval is {low} to {high}, but must rise from 0 (data) to 1 (noise) at most")
    return low, high
