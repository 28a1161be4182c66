"""Flows whose networks are told another time than ours: SiT's and REPA's.

SiT (Ma et al. 2024, arXiv 2401.08740) runs its time s from noise (0) to data (1), feeds s itself, and its velocity is
dx / ds. REPA (Yu et al. 2024, arXiv 2410.06940) runs it from data to noise, feeds it unscaled too. Here time is t as
in `flow`, from data to noise, so s = 1 - t and dx / ds = -dx / dt. Both mix along one of two paths,

x_t = alpha(t) · x_0 + sigma(t) · noise,   linear: alpha = 1 - t, sigma = t;   cosine: alpha = cos(pi t / 2),
sigma = sin(pi t / 2), which SiT calls GVP.

SiT's networks have variance channels that nothing was ever trained on; they are passed over.
"""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.diffusion.denoiser import Latents, NetworkFn, PerSample, at_least_float32, check_batch, split_output
from pipeline.diffusion.flow import RectifiedFlow, columns
from pipeline.diffusion.process import FlowPath, TimestepLaw
from pipeline.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class REPAFlow(RectifiedFlow):
    """REPA's flow: the network is fed t from data (0) to noise (1), and gives dx / dt."""

    timestep_law: TimestepLaw = "uniform"
    """How training draws times: uniform as they do, or a standard normal through the logistic function."""
    path: FlowPath = "linear"
    """How data and noise are mixed at time t."""

    objective: ClassVar[str] = "repa"
    may_predict_data: ClassVar[bool] = False

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
        alpha, sigma, _, _ = self._mix(columns(t, x_start))
        return alpha * x_start + sigma * noise

    def velocity(self, denoise: NetworkFn, x_t: Latents, t: PerSample) -> Latents:
        """dx / dt at x_t; further channels of the network are passed over.

        Raises:
            ValueError: the network's output has neither the channels of x_t nor twice as many.
        """
        output = denoise(x_t, self.network_timesteps(t))
        velocity = split_output(output, x_t, learns_variance=output.shape[1] == 2 * x_t.shape[1])[0]
        return -velocity if self.noise_first else velocity

    def predict_x_start(self, velocity: Latents, x_t: Latents, t: PerSample) -> Latents:
        """x_0 from x_t = alpha · x_0 + sigma · noise and its derivative, two equations for two unknowns."""
        alpha, sigma, alpha_slope, sigma_slope = self._mix(columns(t, x_t))
        return (sigma_slope * x_t - sigma * velocity) / (alpha * sigma_slope - sigma * alpha_slope)

    def output_for(self, x_start: Latents, x_t: Latents, t: PerSample) -> Latents:
        """What a network would give at x_t that knows x_0: the path's velocity there, by the time it is told."""
        alpha, sigma, _, _ = self._mix(columns(t, x_t))
        velocity = self.target(x_start, t, (x_t - alpha * x_start) / sigma)
        return -velocity if self.noise_first else velocity

    def target(self, x_start: Latents, t: PerSample, noise: Latents) -> Latents:
        """dx / dt on the path."""
        _, _, alpha_slope, sigma_slope = self._mix(columns(t, x_start))
        return alpha_slope * x_start + sigma_slope * noise

    def _mix(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Alpha, sigma and their derivatives by t."""
        if self.path == "linear":
            return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        quarter = math.pi / 2
        cos, sin = (quarter * t).cos(), (quarter * t).sin()
        return cos, sin, -quarter * sin, quarter * cos


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SiTFlow(REPAFlow):
    """SiT's flow: the network is fed s = 1 - t, from noise (0) to data (1), and gives dx / ds."""

    objective: ClassVar[str] = "sit"
    noise_first: ClassVar[bool] = True
