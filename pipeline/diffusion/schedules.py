"""Noise schedules: how much noise each timestep adds, which timesteps a respaced process keeps, and what follows.

Timestep 0 is the cleanest, T - 1 the noisiest. All tables are float64 (float32 where a device has no other); a kernel
rounds what it looks up.
"""

import dataclasses
import math
from functools import lru_cache
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.diffusion.process import Schedule
from pipeline.runtime.devices import widest_float
from pipeline.runtime.errors import UserError

PerStep = Float[Tensor, " step"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """Everything about a process that depends on the timestep alone, one entry per step, float64.

    Equation numbers are those of Ho et al. 2020 (arXiv 2006.11239).
    """

    timestep_map: Int[Tensor, " step"]
    """The original process's timestep at every step; the network is fed these."""
    betas: PerStep
    """Variance that the step adds."""
    alphas_cumprod: PerStep
    """alpha_bar_t, the product of 1 - beta up to t: the share of x_0's variance in x_t."""
    alphas_cumprod_prev: PerStep
    """alpha_bar_(t-1), and 1 at the first step."""
    posterior_variance: PerStep
    """Variance of q(x_(t-1) | x_t, x_0): (1 - alpha_bar_(t-1)) / (1 - alpha_bar_t) · beta_t (equation 7)."""
    posterior_log_variance_clipped: PerStep
    """Its logarithm; the first step's, minus infinity, is replaced by the second's."""
    fixed_large_log_variance: PerStep
    """The logarithm of beta, the first step's likewise replaced by the posterior's second."""
    posterior_mean_coef1: PerStep
    """Weight of x_0 in the mean of q(x_(t-1) | x_t, x_0) (equation 7)."""
    posterior_mean_coef2: PerStep
    """Weight of x_t in that mean."""


def betas_of(schedule: Schedule, steps: int) -> PerStep:
    """The variance that every timestep adds.

    linear: from 0.0001 to 0.02 over 1000 steps (Ho et al. 2020), scaled so that other counts end as noisy.
    cosine: alpha_bar_t = cos²((t / T + 0.008) / 1.008 · π / 2), betas at most 0.999 (Nichol & Dhariwal 2021, eq. 17).
    """
    if schedule == "linear":
        return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64).clamp(max=0.999)
    alpha_bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(alpha_bar)]
    return torch.tensor(betas, dtype=torch.float64)


def kept_timesteps(steps: int, respacing: str) -> tuple[int, ...]:
    """The timesteps that a respaced process keeps, ascending, by the release's rules.

    "N": N timesteps spread evenly from the first to the last (a lone one is the last, as only that one denoises
    noise). "A,B,C": equal sections of the process, beginning with the cleanest, with A, B, C timesteps each.
    "ddimN": every k-th timestep from 0, for the whole number k that gives N.

    Raises:
        UserError: the process has no such subset of timesteps.
    """
    counts = respacing.removeprefix("ddim").split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise UserError(f'the respacing {respacing!r} is none of "N", "A,B,C" and "ddimN" with numbers above 0')
    if respacing.startswith("ddim"):
        return _by_stride(steps, int(counts[0]))
    if counts == ["1"]:
        return (steps - 1,)
    return _by_sections(steps, [int(count) for count in counts])


def _by_stride(steps: int, count: int) -> tuple[int, ...]:
    for stride in range(1, steps + 1):
        if len(range(0, steps, stride)) == count:
            return tuple(range(0, steps, stride))
    raise UserError(f"no whole stride keeps {count} of {steps} timesteps; choose a count that divides {steps}")


def _by_sections(steps: int, counts: list[int]) -> tuple[int, ...]:
    size, longer = divmod(steps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise UserError(f"cannot keep {count} of {length} timesteps; the process has {steps} in all")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        kept += [start + round(stride * i) for i in range(count)]
        start += length
    return tuple(kept)


@lru_cache(maxsize=64)
def tables_of(schedule: Schedule, steps: int, kept: tuple[int, ...] | None, device: torch.device) -> Tables:
    """The tables of a process on the kept timesteps (None for all), made once per device.

    A respaced process has the original's alpha_bar at the timesteps it keeps (Nichol & Dhariwal 2021, section 4).
    """
    betas = betas_of(schedule, steps)
    timestep_map = torch.arange(steps) if kept is None else torch.tensor(kept)
    if kept is not None:
        alpha_bar = (1 - betas).cumprod(0)[timestep_map]
        betas = 1 - alpha_bar / _shifted(alpha_bar)
    alpha_bar = (1 - betas).cumprod(0)
    alpha_bar_prev = _shifted(alpha_bar)
    variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
    # A process of one step has no second entry to borrow; its variance is never drawn from.
    second = variance[1:2] if len(variance) > 1 else betas[:1]
    tables = Tables(
        timestep_map=timestep_map,
        betas=betas,
        alphas_cumprod=alpha_bar,
        alphas_cumprod_prev=alpha_bar_prev,
        posterior_variance=variance,
        posterior_log_variance_clipped=torch.cat([second, variance[1:]]).log(),
        fixed_large_log_variance=torch.cat([second, betas[1:]]).log(),
        posterior_mean_coef1=betas * alpha_bar_prev.sqrt() / (1 - alpha_bar),
        posterior_mean_coef2=(1 - alpha_bar_prev) * (1 - betas).sqrt() / (1 - alpha_bar),
    )
    values = {field.name: getattr(tables, field.name) for field in dataclasses.fields(tables)}
    widest = widest_float(device)
    return Tables(**{name: (v.to(widest) if v.is_floating_point() else v).to(device) for name, v in values.items()})


def _shifted(alpha_bar: PerStep) -> PerStep:
    return torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
