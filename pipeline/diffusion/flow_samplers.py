"""Samplers of a flow on any of its paths: one with noise, and one of second order for one pass a step.

They are rows of SAMPLERS in `samplers`, and like it load without torch.
"""

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.diffusion.denoiser import Latents, NetworkFn
    from pipeline.diffusion.flow import RectifiedFlow
else:
    Latents = NetworkFn = RectifiedFlow = object

SDE_LAST_STEP = 0.04


def sde(
    process: RectifiedFlow,
    denoise: NetworkFn,
    noise: Latents,
    draw: Callable[[int], Latents],
    *,
    steps: int,
    on_step: Callable[[int, int, Latents], None],
) -> Latents:
    """x_0 by Euler and Maruyama's steps along the reverse SDE of SiT (arXiv 2401.08740, equations 4 and 5).

    dx = (v - ½ w · score) dt + sqrt(w) dW with w = 2 sigma(t), as SiT's and REPA's tables were sampled; as the score is
    -epsilon / sigma, the drift is v + epsilon. Steps, equal but for the time shift, lead to (shifted) t = 0.04, and one
    along the drift alone to 0. They start where the process's ODE does.
    """
    first = process.ends[1]
    equal = [first - k * (first - SDE_LAST_STEP) / max(steps - 1, 1) for k in range(steps)]
    times = [*(process.times or map(process.shifted, equal)), 0.0]
    x = process.start(noise)
    for k, (at, following) in enumerate(itertools.pairwise(times)):
        t, (alpha, sigma) = process.timesteps(at, x), _mixed_at(process, at)
        velocity = process.velocity(denoise, x, t)
        x_start = process.predict_x_start(velocity, x, t)
        on_step(k, steps, x_start)
        epsilon, dt = (x - alpha * x_start) / sigma, at - following
        x = x - dt * (velocity + epsilon)
        if k < steps - 1:
            x = x + (2 * sigma * dt) ** 0.5 * draw(k)
    return x


def dpm_solver_flow(
    process: RectifiedFlow,
    denoise: NetworkFn,
    noise: Latents,
    draw: Callable[[int], Latents],
    *,
    steps: int,
    on_step: Callable[[int, int, Latents], None],
) -> Latents:
    """x_0 by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) on steps equal but for the time shift.

    With lambda = log(alpha / sigma), h a step of it and r the step before by this one,
    x ← sigma' / sigma · x - alpha' (e^-h - 1) · (x_0 + (x_0 - x_0 of the step before) / 2r).
    At both ends of time lambda is infinite: the first step, the second, whose r is, and the last are of first order.
    """
    times = process.step_times(steps)
    x = process.start(noise)
    before, ratio_before = None, 0.0
    for k, (at, following) in enumerate(itertools.pairwise(times)):
        (alpha, sigma), (alpha_next, sigma_next) = _mixed_at(process, at), _mixed_at(process, following)
        t = process.timesteps(at, x)
        x_start = process.predict_x_start(process.velocity(denoise, x, t), x, t)
        on_step(k, steps, x_start)
        ratio = alpha * sigma_next / (sigma * alpha_next)  # e^-h
        expected = x_start
        if before is not None and k < steps - 1 and k > 1:
            expected = x_start + math.log(ratio) / math.log(ratio_before) / 2 * (x_start - before)
        x = sigma_next / sigma * x + alpha_next * (1 - ratio) * expected
        before, ratio_before = x_start, ratio
    return x


def _mixed_at(process: RectifiedFlow, at: float) -> tuple[float, float]:
    """(alpha, sigma) of x_t = alpha · x_0 + sigma · noise at a time."""
    import torch

    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    t, none = process.timesteps(at, one), torch.zeros_like(one)
    return float(process.q_sample(one, t, none)), float(process.q_sample(none, t, one))
