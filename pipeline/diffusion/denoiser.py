"""What a process asks of a network: `denoise(x_t, t)`, its output taken apart in full precision."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.runtime.errors import UserError

Latents = Float[Tensor, "batch channel height width"]
PerSample = Float[Tensor, " batch"]

NetworkFn = Callable[[Tensor, Tensor], Tensor]
"""(x_t [N, C, H, W], the network's timesteps [N]) → [N, C, H, W], or [N, 2C, H, W] with a learned variance."""


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is: a process does no arithmetic in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def check_batch(x_start: Tensor, t: Tensor, noise: Tensor) -> None:
    """Nothing, if there are one timestep and one noise per sample; a batch of one would broadcast in silence.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if noise.shape != x_start.shape or t.shape != x_start.shape[:1]:
        raise ValueError(
            f"x_start has shape {list(x_start.shape)}, so noise must have it too and t be [{len(x_start)}]; "
            f"they have {list(noise.shape)} and {list(t.shape)}"
        )


def split_output(output: Tensor, x_t: Latents, *, learns_variance: bool) -> tuple[Latents, Latents | None]:
    """The prediction and, for a learned variance, the variance channels that follow it; in x_t's precision.

    Raises:
        ValueError: the network's output has another shape than the process needs.
    """
    batch, channels, *grid = x_t.shape
    wanted = [batch, channels * (2 if learns_variance else 1), *grid]
    if list(output.shape) != wanted:
        kind = "a learned variance" if learns_variance else "a fixed variance"
        raise ValueError(f"the network gave {list(output.shape)}, but a process with {kind} needs {wanted}")
    output = output.to(x_t.dtype)
    return (output[:, :channels], output[:, channels:]) if learns_variance else (output, None)


def mean_over_sample(values: Latents) -> PerSample:
    """Each sample's mean over its channels and cells."""
    return values.flatten(1).mean(1)


def check_settings(kind: type, values: Mapping[str, Any]) -> None:
    """Nothing, if every key is a field of that process, of its type, and every choice among words is one of them.

    Raises:
        UserError: some are not; each is named.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    hints = get_type_hints(kind)
    wrong = [f"{name} is no setting of it (they are {', '.join(names)})" for name in values if name not in names]
    for name in (name for name in names if name in values):
        value, choices = values[name], get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        if choices and value not in choices:
            wrong.append(f"{name} is {value!r} but must be one of {', '.join(choices)}")
        if hints[name] is int and type(value) is not int:
            wrong.append(f"{name} is {value!r} but must be a whole number")
        if hints[name] == tuple[int, ...] | None and not (value is None or _are_whole(value)):
            wrong.append(f"{name} is {value!r} but must be whole numbers")
    if wrong:
        raise UserError(f"this {kind.__name__} cannot be made: {'; '.join(wrong)}")


def _are_whole(value: object) -> bool:
    return isinstance(value, tuple) and all(type(number) is int for number in value)
