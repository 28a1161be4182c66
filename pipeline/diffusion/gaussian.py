"""Gaussian diffusion (Ho et al. 2020, arXiv 2006.11239): its steps back, and the variational bound that trains them."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.diffusion.denoiser import (
    Latents,
    NetworkFn,
    PerSample,
    at_least_float32,
    check_batch,
    known_on_host,
    mean_over_sample,
    on_host,
    split_output,
)
from pipeline.diffusion.process import Loss, Prediction, Schedule, Variance
from pipeline.diffusion.schedules import PerStep, Tables, kept_timesteps, tables_of
from pipeline.runtime.bounds import ReverseSteps, are_within
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import shortened

BITS_PER_NAT = 1 / math.log(2)
DIFFUSERS_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
"""What diffusers' schedulers call the predictions."""
Timesteps = Int[Tensor, " batch"]
LogVariances = Float[Tensor, "batch #channel #height #width"]
"""Of each value, or one for all values of a sample."""


class StepBack(NamedTuple):
    """p(x_(t-1) | x_t) as a normal, and the x_0 it was made from."""

    mean: Latents
    log_variance: LogVariances
    x_start: Latents


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GaussianDiffusion:
    """A noising process over `num_timesteps` steps and the network's task in undoing it.

    Every method counts t in this process's own steps, 0 … num_timesteps - 1. `denoise` is always called with the
    original process's timesteps, `timestep_map[t]`: a network never notices that its process was respaced.
    """

    schedule: Schedule = "linear"
    """How the noise grows: linear as in the paper, or cosine."""
    steps: int = 1000
    """Timesteps of the original process, T."""
    prediction: Prediction = "epsilon"
    """What the network's first C channels mean: the noise, the clean latents, or v."""
    variance: Variance = "learned-range"
    """Variance of a step back: interpolated by the network's last C channels, or the smallest or largest fixed one."""
    loss: Loss = "mse"
    """What is trained: the squared error (with the bound for a learned variance), or the bound alone."""
    kept: tuple[int, ...] | None = None
    """Original timesteps that a respaced process keeps, ascending; None keeps all."""

    def __post_init__(self) -> None:
        if not are_within([self.steps], ReverseSteps):
            raise UserError(
                f"this process cannot be made: steps is {self.steps} but must be at least 1 and at most 100,000"
            )
        if self.kept is not None and not _rises_within(self.kept, self.steps):
            raise UserError(
                f"this process cannot be made: kept must rise within 0 … {self.steps - 1}, not {shortened(self.kept)}"
            )

    objective: ClassVar[str] = "ddpm"
    sampled_as: ClassVar[str] = "ddpm"  # whose samplers it takes
    preview_sampler: ClassVar[str] = "ddim"
    noise_first: ClassVar[bool] = False  # whether the time that the network is fed runs from noise to data

    @property
    def tables(self) -> Tables:
        """All tables of the process, on the CPU."""
        return self._tables(torch.device("cpu"))

    @property
    def num_timesteps(self) -> int:
        """Steps of this process, after respacing."""
        return self.steps if self.kept is None else len(self.kept)

    @property
    def time_scale(self) -> float:
        """What the network is fed at the noisy end of time."""
        return float(self.steps)

    @property
    def learns_variance(self) -> bool:
        """Whether the network gives C variance channels after the C predicted ones."""
        return self.variance == "learned-range"

    def start(self, noise: Latents) -> Latents:
        """Where a sampler starts: the noise, in full precision."""
        return at_least_float32(noise)

    def timesteps(self, step: int, x: Latents) -> Timesteps:
        """One of this process's steps as an entry per sample of x."""
        return known_on_host(torch.full((len(x),), step, device=x.device), torch.tensor([step]))

    @property
    def timestep_map(self) -> Int[Tensor, " step"]:
        """The original timestep of every step of this process."""
        return self.tables.timestep_map

    @property
    def betas(self) -> PerStep:
        """Variance that each step adds, float64."""
        return self.tables.betas

    @property
    def alphas_cumprod(self) -> PerStep:
        """alpha_bar_t: the share of x_0's variance in x_t, float64."""
        return self.tables.alphas_cumprod

    @property
    def posterior_variance(self) -> PerStep:
        """Variance of q(x_(t-1) | x_t, x_0), float64."""
        return self.tables.posterior_variance

    @property
    def posterior_log_variance_clipped(self) -> PerStep:
        """Its logarithm, the first entry replaced by the second, float64."""
        return self.tables.posterior_log_variance_clipped

    def to_json(self) -> dict[str, Any]:
        """Every setting; `make_process` is the inverse."""
        values = {"objective": self.objective, **dataclasses.asdict(self)}
        kept = values.pop("kept")
        return values if kept is None else {**values, "kept": list(kept)}

    def diffusers_scheduler(self) -> dict[str, Any]:
        """The settings of diffusers' DDIM with this process's own betas."""
        cosine = {"beta_schedule": "squaredcos_cap_v2"}
        linear = {"beta_schedule": "linear", "beta_start": 0.1 / self.steps, "beta_end": 20 / self.steps}
        return {
            "_class_name": "DDIMScheduler",
            **(cosine if self.schedule == "cosine" else linear),
            "clip_sample": False,
            "num_train_timesteps": self.steps,
            "prediction_type": DIFFUSERS_PREDICTIONS[self.prediction],
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "timestep_spacing": "leading",
        }

    def respaced(self, respacing: str) -> "GaussianDiffusion":
        """The same process on a subset of its timesteps: "N", "A,B,C" or "ddimN" (see `kept_timesteps`).

        Raises:
            UserError: the process has no such subset.
        """
        chosen = kept_timesteps(self.num_timesteps, respacing)
        kept = chosen if self.kept is None else tuple(self.kept[i] for i in chosen)
        return dataclasses.replace(self, kept=kept)

    def with_timesteps(self, timesteps: Sequence[int | float]) -> "GaussianDiffusion":
        """The same process on these of the original timesteps, given from noise to data.

        Raises:
            UserError: they do not fall, are not whole, or are none of its own.
        """
        own = range(self.steps) if self.kept is None else self.kept
        rising = tuple(int(t) for t in reversed(timesteps))
        if list(reversed(timesteps)) != list(rising) or not _rises_within(rising, self.steps) or set(rising) - {*own}:
            raise UserError(
                f"--timesteps {','.join(f'{t:g}' for t in timesteps)} must be whole numbers that fall, each of "
                f"{own[-1]} (noise) … {own[0]} (data), which this checkpoint's process has {len(own)} of"
            )
        return dataclasses.replace(self, kept=rising)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Timesteps:
        """Uniform steps of this process, on the generator's device."""
        return torch.randint(self.num_timesteps, (count,), generator=generator, device=generator.device)

    def network_timesteps(self, t: Timesteps) -> Timesteps:
        """What the network is fed at the process's steps t: the original timesteps."""
        fed = self._tables(t.device).timestep_map[t]
        return fed if on_host(t) is t else known_on_host(fed, self.timestep_map[on_host(t)])

    def q_sample(self, x_start: Latents, t: Timesteps, noise: Latents) -> Latents:
        """x_t ~ q(x_t | x_0), made from the given standard normals (Ho et al. 2020, equation 4).

        Raises:
            ValueError: x_start, t and noise do not belong together.
        """
        check_batch(x_start, t, noise)
        alpha_bar = self._at("alphas_cumprod", t)
        return (
            _like(alpha_bar.sqrt(), x_start) * at_least_float32(x_start)
            + _like((1 - alpha_bar).sqrt(), x_start) * noise
        )

    def predict_x_start(self, prediction: Latents, x_t: Latents, t: Timesteps) -> Latents:
        """x_0 as the network's prediction has it (v: Salimans & Ho 2022, arXiv 2202.00512, section 4)."""
        if self.prediction == "x0":
            return prediction
        alpha_bar = self._at("alphas_cumprod", t)
        if self.prediction == "v":
            return _like(alpha_bar.sqrt(), x_t) * x_t - _like((1 - alpha_bar).sqrt(), x_t) * prediction
        return _like((1 / alpha_bar).sqrt(), x_t) * x_t - _like((1 / alpha_bar - 1).sqrt(), x_t) * prediction

    def predict_epsilon(self, x_start: Latents, x_t: Latents, t: Timesteps) -> Latents:
        """The noise that leads from x_0 to x_t: (x_t - sqrt(alpha_bar_t) · x_0) / sqrt(1 - alpha_bar_t)."""
        alpha_bar = self._at("alphas_cumprod", t)
        return (_like((1 / alpha_bar).sqrt(), x_t) * x_t - x_start) / _like((1 / alpha_bar - 1).sqrt(), x_t)

    def output_for(self, x_start: Latents, x_t: Latents, t: Timesteps) -> Latents:
        """What a network would give at x_t that knows x_0: the inverse of `predict_x_start`."""
        epsilon = self.predict_epsilon(x_start, x_t, t)
        if self.prediction == "v":
            alpha_bar = self._at("alphas_cumprod", t)
            return _like(alpha_bar.sqrt(), x_t) * epsilon - _like((1 - alpha_bar).sqrt(), x_t) * x_start
        return x_start if self.prediction == "x0" else epsilon

    def p_mean_variance(self, output: Tensor, x_t: Latents, t: Timesteps, *, clip: bool = False) -> StepBack:
        """p(x_(t-1) | x_t) for the network's output at x_t.

        The mean is that of q(x_(t-1) | x_t, x_0) (Ho et al. 2020, equation 7); a learned log-variance lies between
        the posterior's and beta's (Nichol & Dhariwal 2021, equation 15).

        Args:
            clip: keep the predicted x_0 within [-1, 1], which suits pixels, not latents.

        Raises:
            ValueError: the output's channels are not those of this process.
        """
        prediction, fraction = split_output(output, x_t, learns_variance=self.learns_variance)
        x_start = self.predict_x_start(prediction, x_t, t)
        if clip:
            x_start = x_start.clamp(-1, 1)
        return StepBack(self._posterior_mean(x_start, x_t, t), self._log_variance(fraction, x_t, t), x_start)

    def training_losses(
        self, denoise: NetworkFn, x_start: Latents, t: Timesteps, noise: Latents
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Per sample: `loss`, what is trained; `mse`, the squared error; `vb`, the bound's term at t in bits.

        With "mse", loss = mse + vb, where vb sees the mean with its gradient stopped, so that it trains the variance
        alone (Nichol & Dhariwal 2021, section 3.1); vb is 0 for a fixed variance. "rescaled-mse" has vb · T / 1000
        in place of vb. With "kl", loss = vb, through the mean too; "rescaled-kl" has T · vb, an estimate of the whole
        bound.

        Raises:
            ValueError: x_start, t and noise do not belong together, or the network's output has other channels.
        """
        x_start, noise = at_least_float32(x_start), at_least_float32(noise)
        x_t = self.q_sample(x_start, t, noise)
        output = denoise(x_t, self.network_timesteps(t))
        prediction, fraction = split_output(output, x_t, learns_variance=self.learns_variance)
        mse = mean_over_sample((self._target(x_start, t, noise) - prediction).square())
        if self.loss in ("kl", "rescaled-kl"):
            vb = self._bound_term(prediction, fraction, x_start, x_t, t)
            return {"loss": vb * (self.num_timesteps if self.loss == "rescaled-kl" else 1), "mse": mse, "vb": vb}
        if fraction is None:
            return {"loss": mse, "mse": mse, "vb": torch.zeros_like(mse)}
        vb = self._bound_term(prediction.detach(), fraction, x_start, x_t, t)
        if self.loss == "rescaled-mse":
            vb = vb * (self.num_timesteps / 1000)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _target(self, x_start: Latents, t: Timesteps, noise: Latents) -> Latents:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x_start
        alpha_bar = self._at("alphas_cumprod", t)
        return _like(alpha_bar.sqrt(), noise) * noise - _like((1 - alpha_bar).sqrt(), noise) * x_start

    def _bound_term(
        self, prediction: Latents, fraction: Latents | None, x_start: Latents, x_t: Latents, t: Timesteps
    ) -> PerSample:
        """L_t of the variational bound in bits per element; at t = 0 the decoder's likelihood (Ho et al., eq. 5)."""
        mean = self._posterior_mean(self.predict_x_start(prediction, x_t, t), x_t, t)
        log_variance = self._log_variance(fraction, x_t, t)
        true_mean = self._posterior_mean(x_start, x_t, t)
        true_log_variance = _like(self._at("posterior_log_variance_clipped", t), x_t)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nll = discretized_gaussian_nll(x_start, mean, log_variance)
        return BITS_PER_NAT * torch.where(t == 0, mean_over_sample(nll), mean_over_sample(kl))

    def _posterior_mean(self, x_start: Latents, x_t: Latents, t: Timesteps) -> Latents:
        of_x_start, of_x_t = self._at("posterior_mean_coef1", t), self._at("posterior_mean_coef2", t)
        return _like(of_x_start, x_t) * x_start + _like(of_x_t, x_t) * x_t

    def _log_variance(self, fraction: Latents | None, x_t: Latents, t: Timesteps) -> LogVariances:
        smallest = _like(self._at("posterior_log_variance_clipped", t), x_t)
        if self.variance == "fixed-small":
            return smallest
        if fraction is None:
            return _like(self._at("fixed_large_log_variance", t), x_t)
        largest = _like(self._at("betas", t).log(), x_t)
        share = (fraction + 1) / 2
        return share * largest + (1 - share) * smallest

    def _tables(self, device: torch.device) -> Tables:
        return tables_of(self.schedule, self.steps, self.kept, device)

    def _at(self, table: str, t: Timesteps) -> Float[Tensor, "batch 1 1 1"]:
        return _columns(getattr(self._tables(t.device), table)[t])


def _rises_within(kept: tuple[int, ...], steps: int) -> bool:
    return bool(kept) and kept[0] >= 0 and kept[-1] < steps and all(a < b for a, b in pairwise(kept))


def _columns(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Table entries, float64 up to here, in the precision in which x is computed with."""
    return values.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def gaussian_kl(mean_1: Latents, log_variance_1: Tensor, mean_2: Latents, log_variance_2: Tensor) -> Latents:
    """KL(N(mean_1, exp log_variance_1) ‖ N(mean_2, exp log_variance_2)) of every element, in nats."""
    ratio = log_variance_1 - log_variance_2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean_1 - mean_2).square() * (-log_variance_2).exp())


def discretized_gaussian_nll(x: Latents, mean: Latents, log_variance: Tensor) -> Latents:
    """-log of the probability that a normal falls into x's bin, in nats, the bins being 2 / 255 wide on [-1, 1].

    The outermost bins reach to infinity (Ho et al. 2020, equation 13).
    """
    deviation_inverse = (-0.5 * log_variance).exp()
    below_upper = _normal_cdf((x - mean + 1 / 255) * deviation_inverse)
    below_lower = _normal_cdf((x - mean - 1 / 255) * deviation_inverse)
    probability = torch.where(
        x < -0.999, below_upper, torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower)
    )
    return -probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The standard normal's cumulative distribution in the tanh form that the release trains with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
