"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) as a wrapper around the network.

guided = unconditional + scale · (conditional - unconditional)
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.diffusion.denoiser import NetworkFn, at_least_float32, on_host
from pipeline.runtime.errors import UserError


def classifier_free_guidance(
    model: Callable[..., Tensor],
    y: Int[Tensor, " batch"] | None,
    *,
    scale: float = 1.0,
    null_class: int | None = None,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    time_scale: float = 1000.0,
    noise_first: bool = False,
) -> NetworkFn:
    """A `denoise(x_t, t)` for samples of the classes y, guided by the scale.

    It costs one forward pass on the batch with scale 1 and where all samples are outside the interval; elsewhere one
    on twice the batch, conditional half first, and samples outside keep their conditional half. Variance channels are
    always the conditional ones.

    Args:
        model: the network, `model(x, t, y)`.
        y: labels; None for an unconditional network.
        null_class: the label that means "no class"; None if the network has none.
        channels: how many of the predicted channels are guided, the first ones; None for all. The release's samples
            were made with 3 of 4.
        interval: where guidance applies, as shares of time from data (0) to noise (1), both ends included
            (Kynkäänniemi et al. 2024, arXiv 2404.07724); None for everywhere.
        time_scale: what the network is fed at the end of its time (`process.time_scale`).
        noise_first: whether its time runs from noise to data (`process.noise_first`).

    Raises:
        UserError: the scale is not 1, but the network has no classes or no null class, or the interval does not rise
            within 0 … 1.
    """
    if scale == 1:
        return lambda x_t, t: model(x_t, t, y)
    labels, null_labels = _labels_to_guide_between(model, y, null_class, scale)
    low, high = _checked_interval(interval)
    low, high = (1 - high, 1 - low) if noise_first else (low, high)

    def is_inside(t: Tensor) -> Tensor:
        return (t >= low * time_scale) & (t <= high * time_scale)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        inside = None
        if interval is not None:
            if not is_inside(on_host(t)).any():
                return model(x_t, t, labels)
            inside = is_inside(t)
        both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, null_labels]))
        conditional, unconditional = at_least_float32(both).chunk(2)
        count = x_t.shape[1] if channels is None else min(channels, x_t.shape[1])
        mixed = _mix(conditional[:, :count], unconditional[:, :count], scale, inside)
        return torch.cat([mixed, conditional[:, count:]], dim=1)

    return denoise


def _mix(
    conditional: Float[Tensor, "batch channel height width"],
    unconditional: Float[Tensor, "batch channel height width"],
    scale: float,
    inside: Tensor | None,
) -> Float[Tensor, "batch channel height width"]:
    mixed = unconditional + scale * (conditional - unconditional)
    return mixed if inside is None else torch.where(inside[:, None, None, None], mixed, conditional)


def _labels_to_guide_between(
    model: Callable[..., Tensor], y: Tensor | None, null_class: int | None, scale: float
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
