"""Few-step samplers over diffusers' schedulers, built from the process's own betas and prediction type.

Both solve the probability-flow equation of the diffusion process and draw nothing. diffusers is imported late: it
takes seconds, and no other sampler needs it.
"""

import warnings
from typing import Any

import torch

from pipeline.diffusion.denoiser import Denoise, Latents, precise, split_output
from pipeline.diffusion.gaussian import GaussianDiffusion
from pipeline.diffusion.sampler import Draw, OnStep, check_request

_PREDICTION_TYPES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


@torch.no_grad()
def dpm_solver(
    process: GaussianDiffusion,
    denoise: Denoise,
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
    denoise: Denoise,
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
    scheduler: Any, process: GaussianDiffusion, denoise: Denoise, noise: Latents, steps: int, on_step: OnStep | None
) -> Latents:
    with warnings.catch_warnings():  # NumPy 2 asks torch's tensors for a `copy` keyword that they do not have yet
        warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
        scheduler.set_timesteps(steps)
    x = precise(noise)
    for k, step in enumerate(scheduler.timesteps):
        t = torch.full((len(x),), int(step), device=x.device)
        output = denoise(x, process.network_timesteps(t))
        prediction, _ = split_output(output, x, learns_variance=process.learns_variance)
        if on_step is not None:
            on_step(k, steps, process.predict_x_start(prediction, x, t))
        x = scheduler.step(prediction, step, x, return_dict=False)[0]
    return x
