"""What a process asks of a network: `denoise(x_t, t)`, its output taken apart in full precision."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "batch channel height width"]
PerSample = Float[Tensor, " batch"]

NetworkFn = Callable[[Tensor, Tensor], Tensor]
"""(x_t [N, C, H, W], the network's timesteps [N]) → [N, C, H, W], or [N, 2C, H, W] with a learned variance."""


def known_on_host(t: Tensor, same: Tensor) -> Tensor:
    """The times t of a batch; on a device, with what they all are as [1] on the CPU, where no one waits to read it."""
    if t.device.type != "cpu":
        t.same_on_host = same  # type: ignore[attr-defined]
    return t


def on_host(t: Tensor) -> Tensor:
    """Times that tell what is in t: t itself, or its like on the CPU if whoever made t left one."""
    return getattr(t, "same_on_host", t)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is: a process does no arithmetic in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def check_batch(x_start: Tensor, t: Tensor, noise: Tensor) -> None:
    """Raise ValueError unless there are one timestep and one noise per sample: a batch of one would broadcast."""
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
