"""Every sampler, one function and one row of SAMPLERS: all that help, checks, defaults and previews know of it.

All functions share one signature, that of `SamplerSpec.__call__`. This file loads without torch, so that a command's
options can ask the table; the shapes of what goes in and out are checked by the process's own methods.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.diffusion.flow_samplers import dpm_solver_flow, sde
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.diffusion.denoiser import Latents, NetworkFn
    from pipeline.diffusion.flow import RectifiedFlow
    from pipeline.diffusion.gaussian import GaussianDiffusion
    from pipeline.diffusion.process import Process
else:
    Tensor = Latents = NetworkFn = RectifiedFlow = GaussianDiffusion = Process = object

Draw = Callable[[int], Latents]
"""k → standard normals [N, C, H, W] for the k-th step, counted from 0 at the noisy end."""

OnStep = Callable[[int, int, Latents], None]
"""Told (k, number of steps, the x_0 predicted at step k) as every step is made."""


def told_no_one(k: int, steps: int, x_start: Latents) -> None:
    """An `OnStep` for whom it does not matter how far a sampler is."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplerSpec:
    """A way of running a process backwards: latents x_0 from noise."""

    function: Callable[..., Latents]
    objective: str
    """The objective whose networks it samples from."""
    help: str
    """What it is, in a few words for the command's help."""
    takes_eta: bool = False
    """Whether --eta says how much noise it adds."""
    spares_steps: int = 0
    """How many fewer steps than the process has it can make at most."""

    def most_steps(self, process: Process) -> int | None:
        """The most steps it can make of the process; None if there is no limit."""
        return None if process.num_timesteps is None else process.num_timesteps - self.spares_steps

    def __call__(
        self,
        process: Process,
        denoise: NetworkFn,
        noise: Latents,
        draw: Draw,
        *,
        steps: int,
        eta: float = 0.0,
        timesteps: Sequence[int | float] | None = None,
        on_step: OnStep = told_no_one,
    ) -> Latents:
        """The x_0 [N, C, H, W] that the starting noise leads to, without gradients.

        Args:
            process: the whole process of the checkpoint; the sampler respaces it by itself.
            denoise: the network, mostly guided; called with its own timesteps.
            noise: standard normals, the noisy end of time.
            draw: further noise, for the samplers that use any.
            steps: how many steps back are made.
            eta: how much of that noise is added, by the samplers that take it.
            timesteps: where they begin, from noise to data: a flow's times, or timesteps of a diffusion's training; as
                the sampler chooses, where none are given.
            on_step: told the progress, and what the result looks like so far.

        Raises:
            UserError: the steps are out of range, or eta is given to a sampler that has none.
        """
        import torch

        check_request(self, process, steps=steps, eta=eta, timesteps=timesteps)
        if timesteps is not None:
            process = process.with_timesteps(timesteps)
        options = {"eta": eta} if self.takes_eta else {}
        with torch.no_grad():
            return self.function(process, denoise, noise, draw, steps=steps, on_step=on_step, **options)


def check_request(
    spec: SamplerSpec, process: Process, *, steps: int, eta: float = 0.0, timesteps: Sequence[int | float] | None = None
) -> None:
    """Raise UserError unless the sampler can make these steps of the process, and takes eta if any is given."""
    name, most = name_of(spec), spec.most_steps(process)
    if steps < 1:
        raise UserError(f"--steps {steps} must be at least 1")
    if timesteps is not None:
        process.with_timesteps(timesteps)
        if steps != len(timesteps):
            raise UserError(f"--steps {steps} does not fit the {len(timesteps)} of --timesteps; leave it away")
    elif most is not None and steps > most:
        raise UserError(f"--steps {steps} is more than --sampler {name} can take here: at most {most}")
    if eta != 0 and not spec.takes_eta:
        raise UserError(f"--eta {eta} is for --sampler {takes_eta()}, not {name}; drop one of the two")


def name_of(spec: SamplerSpec) -> str:
    """The sampler's name in the table."""
    return next(name for name, known in SAMPLERS.items() if known is spec)


def ddpm(
    process: GaussianDiffusion,
    denoise: NetworkFn,
    noise: Latents,
    draw: Draw,
    *,
    steps: int,
    on_step: OnStep = told_no_one,
    clip: bool = False,
) -> Latents:
    """x_0 by drawing from every p(x_(t-1) | x_t) in turn (Ho et al. 2020, algorithm 2); the last step draws nothing."""
    process = process.respaced(str(steps))
    x = process.start(noise)
    for k, t in enumerate(_backwards(process, x)):
        step = process.p_mean_variance(denoise(x, process.network_timesteps(t)), x, t, clip=clip)
        on_step(k, steps, step.x_start)
        x = step.mean if k == steps - 1 else step.mean + (0.5 * step.log_variance).exp() * draw(k)
    return x


def ddim(
    process: GaussianDiffusion,
    denoise: NetworkFn,
    noise: Latents,
    draw: Draw,
    *,
    steps: int,
    eta: float = 0.0,
    on_step: OnStep = told_no_one,
    clip: bool = False,
) -> Latents:
    """x_0 by the implicit process (Song et al. 2021, arXiv 2010.02502, equation 12).

    x_(t-1) = sqrt(alpha_bar_(t-1)) · x_0 + sqrt(1 - alpha_bar_(t-1) - sigma²) · epsilon + sigma · noise, where
    sigma = eta · sqrt(posterior variance): nothing is drawn at eta 0, as much as in DDPM at 1. Here t - 1 is the
    respaced process's previous step, so the last step ends at x_0 itself.
    """
    process = process.respaced(str(steps))
    x = process.start(noise)
    for k, t in enumerate(_backwards(process, x)):
        x_start = process.p_mean_variance(denoise(x, process.network_timesteps(t)), x, t, clip=clip).x_start
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
        yield process.timesteps(i, x)


def dpm_solver(
    process: GaussianDiffusion,
    denoise: NetworkFn,
    noise: Latents,
    draw: Draw,
    *,
    steps: int,
    on_step: OnStep = told_no_one,
) -> Latents:
    """x_0 by DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), multistep, second order: diffusers' scheduler."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    settings = _solver_settings(process, steps)
    scheduler = _started(DPMSolverMultistepScheduler(**settings, algorithm_type="dpmsolver++", solver_order=2), steps)
    x = process.start(noise)
    for k, timestep in enumerate(scheduler.timesteps):
        prediction, x_start = _predict(process, denoise, x, int(timestep))
        on_step(k, steps, x_start)
        x = scheduler.step(prediction, timestep, x, return_dict=False)[0]
    return x


def unipc(
    process: GaussianDiffusion,
    denoise: NetworkFn,
    noise: Latents,
    draw: Draw,
    *,
    steps: int,
    on_step: OnStep = told_no_one,
) -> Latents:
    """x_0 by UniPC (Zhao et al. 2023, arXiv 2302.04867), second order with its corrector, B(h) = e^h - 1.

    On diffusers' timesteps and, on a CPU, bit for bit what its scheduler gives. That one has its coefficients on the
    device of x, where a GPU waits six times a step for them; here they are float32 numbers on the CPU, each computed
    alone, as the logarithms of a whole vector may differ in their last bits.
    """
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    scheduler = _started(UniPCMultistepScheduler(**_solver_settings(process, steps), solver_order=2), steps)
    points = [_Point.at(ratio) for ratio in scheduler.sigmas]  # of every step and the end
    x = start = process.start(noise)
    x_starts: list[Tensor] = []  # of the two steps before
    order = 1
    for k, timestep in enumerate(scheduler.timesteps):
        prediction, expected = _predict(process, denoise, x, int(timestep))
        on_step(k, steps, expected)
        x_start = points[k].x_start(process, prediction, x)

        # corrector: the step that led here once more, now that its end is known
        if k > 0:
            first, weight, slope, coefficients = _unipc_step(points[: k + 1], start, x_starts, order)
            change = coefficients[-1] * (x_start - x_starts[-1])
            x = first - weight * (change if slope is None else coefficients[0] * slope + change)

        # predictor: the first step and the last are of first order
        x_starts = [*x_starts[-1:], x_start]
        start, order = x, min(2, k + 1, steps - k)
        first, weight, slope = _unipc_step(points[: k + 2], start, x_starts, order)[:3]
        x = first if slope is None else first - weight * (0.5 * slope)
    return x


class _Point(NamedTuple):
    """A moment of the process as float32 numbers: x_t = alpha · x_0 + sigma · epsilon, lambda = log(alpha / sigma)."""

    alpha: Tensor
    sigma: Tensor
    log_ratio: Tensor

    @classmethod
    def at(cls, sigma_per_alpha: Tensor) -> "_Point":
        alpha = 1 / (sigma_per_alpha**2 + 1) ** 0.5
        sigma = sigma_per_alpha * alpha
        return cls(alpha, sigma, alpha.log() - sigma.log())

    def x_start(self, process: GaussianDiffusion, prediction: Latents, x: Latents) -> Latents:
        """x_0 as the network's prediction has it, from these very numbers."""
        if process.prediction == "x0":
            return prediction
        if process.prediction == "v":
            return self.alpha * x - self.sigma * prediction
        return (x - self.sigma * prediction) / self.alpha


def _unipc_step(
    points: list[_Point], x: Latents, x_starts: list[Tensor], order: int
) -> tuple[Latents, Tensor, Latents | None, list[Any]]:
    """The step from the last but one of the points to the last, in the parts that predictor and corrector are made of.

    x after it to first order; the weight of what both take off that; for the second order the slope of x_0 over the
    step before; and the corrector's coefficients, of that slope and of the one over this step.
    """
    import torch

    *earlier, here, there = points
    h = there.log_ratio - here.log_ratio
    growth = (-h).expm1()
    weight = there.alpha * growth
    first_order = there.sigma / here.sigma * x - weight * x_starts[-1]
    if order == 1:
        return first_order, weight, None, [0.5]
    ratio = (earlier[-1].log_ratio - here.log_ratio) / h
    phi_2 = growth / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    system = torch.stack([torch.ones(2), torch.stack([ratio, torch.ones(())])])
    coefficients = torch.linalg.solve(system, torch.stack([phi_2 / growth, phi_3 * 2 / growth]))
    return first_order, weight, (x_starts[-2] - x_starts[-1]) / ratio, list(coefficients)


def _solver_settings(process: GaussianDiffusion, steps: int) -> dict[str, Any]:
    """What diffusers' schedulers have to know of the process."""
    return {
        "num_train_timesteps": process.num_timesteps,
        "trained_betas": process.betas.numpy(),
        "prediction_type": process.diffusers_scheduler()["prediction_type"],
        "timestep_spacing": "trailing" if steps == process.num_timesteps else "linspace",  # which spares the last
    }


def _started(scheduler: Any, steps: int) -> Any:
    """The scheduler, its timesteps set."""
    with warnings.catch_warnings():  # NumPy 2 asks torch's tensors for a `copy` keyword that they do not have yet
        warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
        scheduler.set_timesteps(steps)
    return scheduler


def _predict(process: GaussianDiffusion, denoise: NetworkFn, x: Latents, timestep: int) -> tuple[Latents, Latents]:
    """The network's prediction at x, and the x_0 that the process makes of it."""
    from pipeline.diffusion.denoiser import split_output

    t = process.timesteps(timestep, x)
    output = denoise(x, process.network_timesteps(t))
    prediction, _ = split_output(output, x, learns_variance=process.learns_variance)
    return prediction, process.predict_x_start(prediction, x, t)


def euler(
    process: RectifiedFlow,
    denoise: NetworkFn,
    noise: Latents,
    draw: Draw,
    *,
    steps: int,
    on_step: OnStep = told_no_one,
) -> Latents:
    """x_0 by steps along the velocity, equal but for the time shift; one evaluation each, error of first order."""
    x = process.start(noise)
    for k, (at, per_unit) in enumerate(process.steps_back(steps)):
        t = process.timesteps(at, x)
        velocity = process.velocity(denoise, x, t)
        on_step(k, steps, process.predict_x_start(velocity, x, t))
        x = x - velocity / per_unit
    return x


def heun(
    process: RectifiedFlow,
    denoise: NetworkFn,
    noise: Latents,
    draw: Draw,
    *,
    steps: int,
    on_step: OnStep = told_no_one,
) -> Latents:
    """x_0 by such steps along the mean of the velocities at both ends; two evaluations each, error of second order.

    The last step takes one evaluation: at t = 0 itself training has hardly been.
    """
    x = process.start(noise)
    for k, (at, per_unit) in enumerate(process.steps_back(steps)):
        t = process.timesteps(at, x)
        velocity = process.velocity(denoise, x, t)
        on_step(k, steps, process.predict_x_start(velocity, x, t))
        if k < steps - 1:
            end = process.timesteps(at, x, less=1 / per_unit)
            velocity = (velocity + process.velocity(denoise, x - velocity / per_unit, end)) / 2
        x = x - velocity / per_unit
    return x


SAMPLERS: dict[str, SamplerSpec] = {
    "ddpm": SamplerSpec(function=ddpm, objective="ddpm", help="ancestral, learned variance"),
    "ddim": SamplerSpec(function=ddim, objective="ddpm", help="deterministic unless --eta", takes_eta=True),
    "dpm++": SamplerSpec(function=dpm_solver, objective="ddpm", help="good from 20 steps", spares_steps=1),
    "unipc": SamplerSpec(function=unipc, objective="ddpm", help="good from 20 steps", spares_steps=1),
    "heun": SamplerSpec(function=heun, objective="flow", help="second order, two passes a step"),
    "euler": SamplerSpec(function=euler, objective="flow", help="first order"),
    "sde": SamplerSpec(function=sde, objective="flow", help="with noise, as SiT's and REPA's tables: 250 steps"),
    "dpm++2m": SamplerSpec(function=dpm_solver_flow, objective="flow", help="second order, one pass a step"),
}
"""By name; the first one of an objective is its default."""


def takes_eta() -> str:
    """The names of the samplers that --eta is for."""
    return " or ".join(name for name, spec in SAMPLERS.items() if spec.takes_eta)


def samplers_for(process: Process) -> tuple[str, ...]:
    """The names of the samplers that suit the process, its default first."""
    return tuple(name for name, spec in SAMPLERS.items() if spec.objective == process.sampled_as)


def default_sampler(process: Process) -> str:
    """The sampler to take when none is named: the paper's for diffusion, Heun's for a flow."""
    return samplers_for(process)[0]


def samplers_help() -> str:
    """All samplers in a sentence for the help of --sampler."""
    by_objective: dict[str, list[str]] = {}
    for name, spec in SAMPLERS.items():
        by_objective.setdefault(spec.objective, []).append(f"{name} ({spec.help})")
    lists = [f"for {objective} checkpoints {', '.join(names)}" for objective, names in by_objective.items()]
    return f"Sampler: {'; '.join(lists)}. Default: the first of its checkpoint's."
