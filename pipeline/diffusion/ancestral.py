"""Samplers that walk the respaced process itself: the paper's ancestral sampler and DDIM."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.diffusion.denoiser import Denoise, Latents, precise
from pipeline.diffusion.gaussian import GaussianDiffusion
from pipeline.diffusion.sampler import Draw, OnStep, check_request


@torch.no_grad()
def ddpm(
    process: GaussianDiffusion,
    denoise: Denoise,
    noise: Latents,
    draw: Draw,
    *,
    steps: int,
    eta: float = 0.0,
    on_step: OnStep | None = None,
    clip: bool = False,
) -> Latents:
    """x_0 by drawing from every p(x_(t-1) | x_t) in turn (Ho et al. 2020, algorithm 2); the last step draws nothing."""
    check_request("ddpm", steps=steps, most=process.num_timesteps, eta=eta)
    process = process.respaced(str(steps))
    x = precise(noise)
    for k, t in enumerate(_backwards(process, x)):
        step = process.step_back(denoise(x, process.network_timesteps(t)), x, t, clip=clip)
        if on_step is not None:
            on_step(k, steps, step.x_start)
        x = step.mean if k == steps - 1 else step.mean + (0.5 * step.log_variance).exp() * draw(k)
    return x


@torch.no_grad()
def ddim(
    process: GaussianDiffusion,
    denoise: Denoise,
    noise: Latents,
    draw: Draw,
    *,
    steps: int,
    eta: float = 0.0,
    on_step: OnStep | None = None,
    clip: bool = False,
) -> Latents:
    """x_0 by the implicit process (Song et al. 2021, arXiv 2010.02502, equation 12).

    x_(t-1) = sqrt(alpha_bar_(t-1)) · x_0 + sqrt(1 - alpha_bar_(t-1) - sigma²) · epsilon + sigma · noise, where
    sigma = eta · sqrt(posterior variance): nothing is drawn at eta 0, as much as in DDPM at 1. Here t - 1 is the
    respaced process's previous step, so the last step ends at x_0 itself.
    """
    check_request("ddim", steps=steps, most=process.num_timesteps)
    process = process.respaced(str(steps))
    x = precise(noise)
    for k, t in enumerate(_backwards(process, x)):
        x_start = process.step_back(denoise(x, process.network_timesteps(t)), x, t, clip=clip).x_start
        if on_step is not None:
            on_step(k, steps, x_start)
        epsilon = process.predict_epsilon(x_start, x, t)
        alpha_bar_prev = process.tables.alphas_cumprod_prev[steps - 1 - k].item()
        variance = eta**2 * process.tables.posterior_variance[steps - 1 - k].item()
        x = alpha_bar_prev**0.5 * x_start + max(1 - alpha_bar_prev - variance, 0.0) ** 0.5 * epsilon
        if variance > 0:
            x = x + variance**0.5 * draw(k)
    return x


def _backwards(process: GaussianDiffusion, x: Latents) -> Iterator[Tensor]:
    """The process's steps from noise to data, each as one entry per sample."""
    for i in reversed(range(process.num_timesteps)):
        yield torch.full((len(x),), i, device=x.device)
