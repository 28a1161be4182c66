"""The one signature that all samplers share."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.diffusion.denoiser import Latents, NetworkFn, at_least_float32, split_output
from pipeline.diffusion.flow import RectifiedFlow
from pipeline.diffusion.gaussian import GaussianDiffusion
from pipeline.diffusion.process import Process
from pipeline.runtime.errors import UserError

Draw = Callable[[int], Latents]
"""k → standard normals [N, C, H, W] for the k-th step, counted from 0 at the noisy end."""

OnStep = Callable[[int, int, Latents], None]
"""Told (k, number of steps, the x_0 predicted at step k) as every step is made."""


class Sampler(Protocol):
    """Latents x_0 from noise, by running a process backwards."""

    def __call__(
        self,
        process: Any,
        denoise: NetworkFn,
        noise: Latents,
        draw: Draw,
        *,
        steps: int,
        eta: float = 0.0,
        on_step: OnStep | None = None,
    ) -> Latents:
        """The x_0 [N, C, H, W] that the starting noise leads to.

        Args:
            process: the whole process of the checkpoint; the sampler respaces it by itself.
            denoise: the network, mostly guided; called with its own timesteps.
            noise: standard normals, the noisy end of time.
            draw: further noise, for the samplers that use any.
            steps: how many steps back are made.
            eta: how much of that noise DDIM adds; other samplers refuse any.
            on_step: told the progress, and what the result looks like so far.
        """
        ...


def check_request(sampler: str, *, steps: int, most: int | None = None, eta: float = 0.0) -> None:
    """Nothing, if the sampler can make that many steps and no eta is asked of it.

    Args:
        sampler: its name, for the message.
        steps: the steps asked for.
        most: the most steps it can make; None if there is no limit.
        eta: what was given to a sampler that has no eta.

    Raises:
        UserError: the steps are out of range, or eta is not 0.
    """
    if steps < 1 or (most is not None and steps > most):
        limit = "at least 1" if most is None else f"1 to {most}"
        raise UserError(f"--steps is {steps}, but the sampler {sampler} takes {limit}")
    if eta != 0:
        raise UserError(f"the sampler {sampler} has no eta, but {eta} was given; leave --eta out or use --sampler ddim")


@torch.no_grad()
def ddpm(
    process: GaussianDiffusion,
    denoise: NetworkFn,
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
    x = at_least_float32(noise)
    for k, t in enumerate(_backwards(process, x)):
        step = process.p_mean_variance(denoise(x, process.network_timesteps(t)), x, t, clip=clip)
        if on_step is not None:
            on_step(k, steps, step.x_start)
        x = step.mean if k == steps - 1 else step.mean + (0.5 * step.log_variance).exp() * draw(k)
    return x


@torch.no_grad()
def ddim(
    process: GaussianDiffusion,
    denoise: NetworkFn,
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
    x = at_least_float32(noise)
    for k, t in enumerate(_backwards(process, x)):
        x_start = process.p_mean_variance(denoise(x, process.network_timesteps(t)), x, t, clip=clip).x_start
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


_PREDICTION_TYPES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


@torch.no_grad()
def dpm_solver(
    process: GaussianDiffusion,
    denoise: NetworkFn,
    noise: Latents,
    draw: Draw,  # noqa: ARG001 - every sampler has the same signature
    *,
    steps: int,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Latents:
    """x_0 by DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), multistep, second order."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    check_request("dpm++", steps=steps, most=process.num_timesteps - 1, eta=eta)
    scheduler = DPMSolverMultistepScheduler(**_settings(process), algorithm_type="dpmsolver++", solver_order=2)
    return _solve(scheduler, process, denoise, noise, steps, on_step)


@torch.no_grad()
def unipc(
    process: GaussianDiffusion,
    denoise: NetworkFn,
    noise: Latents,
    draw: Draw,  # noqa: ARG001 - every sampler has the same signature
    *,
    steps: int,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Latents:
    """x_0 by UniPC (Zhao et al. 2023, arXiv 2302.04867), second order, with its corrector."""
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    check_request("unipc", steps=steps, most=process.num_timesteps - 1, eta=eta)
    scheduler = UniPCMultistepScheduler(**_settings(process), solver_order=2)
    return _solve(scheduler, process, denoise, noise, steps, on_step)


def _settings(process: GaussianDiffusion) -> dict[str, Any]:
    return {
        "num_train_timesteps": process.num_timesteps,
        "trained_betas": process.betas.numpy(),
        "prediction_type": _PREDICTION_TYPES[process.prediction],
        "timestep_spacing": "linspace",
    }


def _solve(
    scheduler: Any, process: GaussianDiffusion, denoise: NetworkFn, noise: Latents, steps: int, on_step: OnStep | None
) -> Latents:
    with warnings.catch_warnings():  # NumPy 2 asks torch's tensors for a `copy` keyword that they do not have yet
        warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
        scheduler.set_timesteps(steps)
    x = at_least_float32(noise)
    for k, step in enumerate(scheduler.timesteps):
        t = torch.full((len(x),), int(step), device=x.device)
        output = denoise(x, process.network_timesteps(t))
        prediction, _ = split_output(output, x, learns_variance=process.learns_variance)
        if on_step is not None:
            on_step(k, steps, process.predict_x_start(prediction, x, t))
        x = scheduler.step(prediction, step, x, return_dict=False)[0]
    return x


@torch.no_grad()
def euler(
    process: RectifiedFlow,
    denoise: NetworkFn,
    noise: Latents,
    draw: Draw,  # noqa: ARG001 - every sampler has the same signature
    *,
    steps: int,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Latents:
    """x_0 by equal steps along the velocity; one evaluation each, error of first order in the step."""
    check_request("euler", steps=steps, eta=eta)
    x = at_least_float32(noise)
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
    denoise: NetworkFn,
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
    x = at_least_float32(noise)
    for k in range(steps):
        t = x.new_full((len(x),), 1 - k / steps)
        velocity = process.velocity(denoise, x, t)
        if on_step is not None:
            on_step(k, steps, process.predict_x_start(velocity, x, t))
        if k < steps - 1:
            velocity = (velocity + process.velocity(denoise, x - velocity / steps, t - 1 / steps)) / 2
        x = x - velocity / steps
    return x


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm++": dpm_solver,
    "unipc": unipc,
    "euler": euler,
    "heun": heun,
}


def samplers_for(process: Process) -> tuple[str, ...]:
    """The names of the samplers that suit the process, its default first."""
    return ("heun", "euler") if isinstance(process, RectifiedFlow) else ("ddpm", "ddim", "dpm++", "unipc")


def default_sampler(process: Process) -> str:
    """The sampler to take when none is named: the paper's for diffusion, Heun's for a flow."""
    return samplers_for(process)[0]
