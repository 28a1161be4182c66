"""Flows whose networks are told another time than ours: SiT's and REPA's.

SiT (Ma et al. 2024, arXiv 2401.08740) runs its time s from noise (0) to data (1), feeds s itself, and its velocity is
dx / ds. REPA (Yu et al. 2024, arXiv 2410.06940) runs it from data to noise, feeds it unscaled too. Here time is t as
in `flow`, from data to noise, so s = 1 - t and dx / ds = -dx / dt. They mix along one of these paths,

x_t = alpha(t) · x_0 + sigma(t) · noise,   linear: alpha = 1 - t, sigma = t;   cosine: alpha = cos(pi t / 2),
sigma = sin(pi t / 2), which SiT calls GVP;   vp, SiT's alone: alpha = exp(-½ ∫ beta), sigma = √(1 - alpha²), with beta
from 0.1 at the data to 20 at the noise.

SiT's networks may give the noise or the score, grad log p(x_t) = -noise / sigma, in place of the velocity (its section
3.1). With x_0 = (x_t - sigma · noise) / alpha put into dx / dt = alpha' · x_0 + sigma' · noise,

dx / dt = alpha' / alpha · x_t + (sigma' - sigma · alpha' / alpha) · noise,

which is all that samplers see of them. It has no value at t = 1 on the first two paths, nor has the score at t = 0, nor
any slope of vp's sigma: training and samplers keep away from there by what SiT's code does.

SiT's networks have variance channels that nothing was ever trained on; they are passed over.
"""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.diffusion.denoiser import (
    Latents,
    NetworkFn,
    PerSample,
    at_least_float32,
    check_batch,
    mean_over_sample,
    split_output,
)
from pipeline.diffusion.flow import RectifiedFlow, columns
from pipeline.diffusion.process import FlowPath, LossWeight, TimestepLaw
from pipeline.runtime.devices import widest_float
from pipeline.runtime.errors import UserError

BETAS = 0.1, 20.0
"""Of the vp path: what the noise grows by, at the data and at the noise."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class REPAFlow(RectifiedFlow):
    """REPA's flow: the network is fed t from data (0) to noise (1), and gives dx / dt."""

    timestep_law: TimestepLaw = "uniform"
    """How training draws times: uniform as they do, or a standard normal through the logistic function."""
    path: FlowPath = "linear"
    """How data and noise are mixed at time t."""

    objective: ClassVar[str] = "repa"
    predictions: ClassVar[tuple[str, ...]] = ("v",)

    def __post_init__(self) -> None:
        RectifiedFlow.__post_init__(self)  # no super(): a dataclass with slots is another class than the one it is in
        if self.path == "vp" and self.objective != "sit":
            raise UserError(f"the networks of {self.objective} have no path vp, only linear or cosine")

    @property
    def time_scale(self) -> float:
        """What the network is fed at the end of its time."""
        return 1.0

    def diffusers_scheduler(self) -> dict[str, Any]:
        """There is none.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"diffusers' pipeline cannot run this network: its objective is {self.objective}, whose time goes from 0 "
            f"to 1, and diffusers feeds 0 to 1000; keep it with --format dit, or facebook for its own code"
        )

    def q_sample(self, x_start: Latents, t: PerSample, noise: Latents) -> Latents:
        """x_t on the path from x_0 (t = 0) to the noise (t = 1).

        Raises:
            ValueError: x_start, t and noise do not belong together.
        """
        check_batch(x_start, t, noise)
        x_start, noise = at_least_float32(x_start), at_least_float32(noise)
        alpha, sigma, _, _ = self._at(t, x_start)
        return alpha * x_start + sigma * noise

    def velocity(self, denoise: NetworkFn, x_t: Latents, t: PerSample) -> Latents:
        """dx / dt at x_t; further channels of the network are passed over.

        Raises:
            ValueError: the network's output has neither the channels of x_t nor twice as many.
        """
        velocity = self._output(denoise, x_t, t)
        return -velocity if self.noise_first else velocity

    def _output(self, denoise: NetworkFn, x_t: Latents, t: PerSample) -> Latents:
        output = denoise(x_t, self.network_timesteps(t))
        return split_output(output, x_t, learns_variance=output.shape[1] == 2 * x_t.shape[1])[0]

    def predict_x_start(self, velocity: Latents, x_t: Latents, t: PerSample) -> Latents:
        """x_0 from x_t = alpha · x_0 + sigma · noise and its derivative, two equations for two unknowns."""
        alpha, sigma, alpha_slope, sigma_slope = self._at(t, x_t)
        return (sigma_slope * x_t - sigma * velocity) / (alpha * sigma_slope - sigma * alpha_slope)

    def output_for(self, x_start: Latents, x_t: Latents, t: PerSample) -> Latents:
        """What a network would give at x_t that knows x_0: the path's velocity there, by the time it is told."""
        alpha, sigma, _, _ = self._at(t, x_t)
        velocity = self.target(x_start, t, (x_t - alpha * x_start) / sigma)
        return -velocity if self.noise_first else velocity

    def target(self, x_start: Latents, t: PerSample, noise: Latents) -> Latents:
        """dx / dt on the path."""
        _, _, alpha_slope, sigma_slope = self._at(t, x_start)
        return alpha_slope * x_start + sigma_slope * noise

    def _at(self, t: PerSample, x: Latents) -> list[Tensor]:
        """`_mix` at the time of each sample, to be multiplied with latents."""
        if self.ends == (0.0, 1.0):
            return list(self._mix(columns(t, x)))
        wide = t.to(widest_float(t.device))[:, None, None, None]  # near the ends alpha' / alpha is about 1000
        return [values.to(x.dtype) for values in self._mix(wide)]

    def _mix(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Alpha, sigma and their derivatives by t."""
        if self.path == "linear":
            return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        if self.path == "vp":
            low, high = BETAS
            rate, log_alpha = (low + (high - low) * t) / 2, -(low * t + (high - low) * t**2 / 2) / 2
            alpha, sigma = log_alpha.exp(), (-(2 * log_alpha).expm1()).sqrt()
            return alpha, sigma, -rate * alpha, rate * alpha**2 / sigma
        quarter = math.pi / 2
        cos, sin = (quarter * t).cos(), (quarter * t).sin()
        return cos, sin, -quarter * sin, quarter * cos


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SiTFlow(REPAFlow):
    """SiT's flow: the network is fed s = 1 - t, from noise (0) to data (1), and gives dx / ds, the noise or the score.

    The first of these is what `prediction` calls v.
    """

    loss_weight: LossWeight = "none"
    """What a squared error of the noise counts in training: one, as much as its velocity's, or as in the likelihood."""

    objective: ClassVar[str] = "sit"
    noise_first: ClassVar[bool] = True
    predictions: ClassVar[tuple[str, ...]] = ("v", "noise", "score")

    def __post_init__(self) -> None:
        REPAFlow.__post_init__(self)
        if self.loss_weight != "none" and self.prediction == "v":
            raise UserError(
                f"loss_weight {self.loss_weight} is for a prediction of noise or score, not of the velocity"
            )

    @property
    def ends(self) -> tuple[float, float]:
        """Where samplers of an ODE stop and start; those of the SDE stop at 0."""
        return self._within(1e-3)

    def _within(self, margin: float) -> tuple[float, float]:
        """All of time, less the margin at the ends where something has no value; SiT keeps it at both."""
        if self.path == "vp":
            return margin, 1.0
        return (0.0, 1.0) if self.prediction == "v" else (margin, 1 - margin)

    def timesteps(self, at: float, x: Latents, *, less: float = 0.0) -> PerSample:
        """The time `at` - `less` per sample of x, in float64 where 1 - t would lose a digit that is then multiplied."""
        like = x if self.ends == (0.0, 1.0) else x[:, :1, :1, :1].to(widest_float(x.device))
        return REPAFlow.timesteps(self, at, like, less=less)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> PerSample:
        """Times of training, by the law and within what training keeps to."""
        low, high = self._within(1e-5 if self.path == "vp" else 1e-3)
        t = REPAFlow.draw_timesteps(self, count, generator)
        return t if (low, high) == (0.0, 1.0) else low + (high - low) * t

    def velocity(self, denoise: NetworkFn, x_t: Latents, t: PerSample) -> Latents:
        """dx / dt at x_t by what the network gives; further channels of it are passed over.

        Raises:
            ValueError: the network's output has neither the channels of x_t nor twice as many.
        """
        if self.prediction == "v":
            return REPAFlow.velocity(self, denoise, x_t, t)
        output, (alpha, sigma, alpha_slope, _) = self._output(denoise, x_t, t), self._at(t, x_t)
        noise = output if self.prediction == "noise" else -sigma * output
        return alpha_slope / alpha * x_t + self._noise_slope(t, x_t) * noise

    def output_for(self, x_start: Latents, x_t: Latents, t: PerSample) -> Latents:
        """What a network would give at x_t that knows x_0: that noise, its score, or the velocity."""
        if self.prediction == "v":
            return REPAFlow.output_for(self, x_start, x_t, t)
        alpha, sigma, _, _ = self._at(t, x_t)
        noise = (x_t - alpha * x_start) / sigma
        return noise if self.prediction == "noise" else -noise / sigma

    def training_losses(
        self, denoise: NetworkFn, x_start: Latents, t: PerSample, noise: Latents
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Per sample: `loss`, the squared error `mse` with its weight; a score's is that of the noise in it.

        Raises:
            ValueError: x_start, t and noise do not belong together, or the network's output has another shape.
        """
        if self.prediction == "v":
            return REPAFlow.training_losses(self, denoise, x_start, t, noise)
        x_start, noise = at_least_float32(x_start), at_least_float32(noise)
        x_t = self.q_sample(x_start, t, noise)
        output, sigma = self._output(denoise, x_t, t), self._at(t, x_t)[1]
        mse = mean_over_sample((output - noise if self.prediction == "noise" else sigma * output + noise).square())
        slope, sigma = self._noise_slope(t, x_t).flatten(), sigma.flatten()
        weight = {"none": torch.ones_like(slope), "velocity": slope**2, "likelihood": slope / sigma}[self.loss_weight]
        return {"loss": weight * mse, "mse": mse, "vb": torch.zeros_like(mse)}

    def _noise_slope(self, t: PerSample, x_t: Latents) -> Tensor:
        """What the velocity at x_t has of the noise: sigma' - sigma · alpha' / alpha."""
        alpha, sigma, alpha_slope, sigma_slope = self._at(t, x_t)
        return sigma_slope - sigma * alpha_slope / alpha
