"""Samplers for a flow: the velocity's differential equation solved from noise (t = 1) to data (t = 0)."""

import torch

from pipeline.diffusion.denoiser import Denoise, Latents, precise
from pipeline.diffusion.flow import RectifiedFlow
from pipeline.diffusion.sampler import Draw, OnStep, check_request


@torch.no_grad()
def euler(
    process: RectifiedFlow,
    denoise: Denoise,
    noise: Latents,
    draw: Draw,  # noqa: ARG001 - every sampler has the same signature
    *,
    steps: int,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Latents:
    """x_0 by equal steps along the velocity; one evaluation each, error of first order in the step."""
    check_request("euler", steps=steps, eta=eta)
    x = precise(noise)
    for k in range(steps):
        t = x.new_full((len(x),), 1 - k / steps)
        velocity = process.velocity(denoise, x, t)
        if on_step is not None:
            on_step(k, steps, process.predict_x_start(velocity, x, t))
        x = x - velocity / steps
    return x


@torch.no_grad()
def heun(
    process: RectifiedFlow,
    denoise: Denoise,
    noise: Latents,
    draw: Draw,  # noqa: ARG001 - every sampler has the same signature
    *,
    steps: int,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Latents:
    """x_0 by equal steps along the mean of the velocities at both ends; two evaluations each, error of second order.

    The last step takes one evaluation: at t = 0 itself training has hardly been.
    """
    check_request("heun", steps=steps, eta=eta)
    x = precise(noise)
    for k in range(steps):
        t = x.new_full((len(x),), 1 - k / steps)
        velocity = process.velocity(denoise, x, t)
        if on_step is not None:
            on_step(k, steps, process.predict_x_start(velocity, x, t))
        if k < steps - 1:
            velocity = (velocity + process.velocity(denoise, x - velocity / steps, t - 1 / steps)) / 2
        x = x - velocity / steps
    return x
