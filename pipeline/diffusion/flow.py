"""Rectified flow on the straight path between data and noise (SiT: Ma et al. 2024, arXiv 2401.08740).

x_t = (1 - t) · x_0 + t · noise,   velocity dx_t / dt = noise - x_0

Time is a real number from data (t = 0) to noise (t = 1), and the network is fed 1000 · t, so that its timestep
features span what they span in diffusion.
"""

import dataclasses
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
    known_on_host,
    mean_over_sample,
    on_host,
    split_output,
)
from pipeline.diffusion.process import TimestepLaw


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RectifiedFlow:
    """A straight path from data to noise and the network's task: its velocity."""

    timestep_law: TimestepLaw = "logit-normal"
    """How training draws times: a standard normal through the logistic function, or uniform."""

    objective: ClassVar[str] = "flow"
    sampled_as: ClassVar[str] = "flow"  # whose samplers it takes
    num_timesteps: ClassVar[None] = None  # time is a real number
    preview_sampler: ClassVar[str] = "euler"
    noise_first: ClassVar[bool] = False  # whether the time that the network is fed runs from noise to data

    @property
    def time_scale(self) -> float:
        """What the network is fed at the end of its time."""
        return 1000.0

    @property
    def learns_variance(self) -> bool:
        """Never: the network gives C channels."""
        return False

    def to_json(self) -> dict[str, Any]:
        """Every setting; `make_process` is the inverse."""
        return {"objective": self.objective, **dataclasses.asdict(self)}

    def start(self, noise: Latents) -> Latents:
        """Where a sampler starts: the noise, in full precision."""
        return at_least_float32(noise)

    def diffusers_scheduler(self) -> dict[str, Any]:
        """The settings of a solver of diffusers' that its DiT pipeline can drive."""
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 1.0,
        }

    def timesteps(self, at: float, x: Latents, *, less: float = 0.0) -> PerSample:
        """The time `at` - `less` as an entry per sample of x."""
        t, same = x.new_full((len(x),), at), torch.full((1,), at, dtype=x.dtype)
        return known_on_host(t - less, same - less) if less else known_on_host(t, same)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> PerSample:
        """Times in [0, 1] by the timestep law, on the generator's device."""
        if self.timestep_law == "uniform":
            return torch.rand(count, generator=generator, device=generator.device)
        return torch.randn(count, generator=generator, device=generator.device).sigmoid()

    def network_timesteps(self, t: PerSample) -> PerSample:
        """What the network is fed at time t: 1000 · t."""
        fed = self._fed(t)
        return fed if on_host(t) is t else known_on_host(fed, self._fed(on_host(t)))

    def _fed(self, t: Tensor) -> Tensor:
        return (1 - t if self.noise_first else t) * self.time_scale

    def q_sample(self, x_start: Latents, t: PerSample, noise: Latents) -> Latents:
        """x_t on the line from x_0 (t = 0) to the noise (t = 1).

        Raises:
            ValueError: x_start, t and noise do not belong together.
        """
        check_batch(x_start, t, noise)
        x_start, noise = at_least_float32(x_start), at_least_float32(noise)
        return torch.lerp(x_start, noise, columns(t, x_start))

    def velocity(self, denoise: NetworkFn, x_t: Latents, t: PerSample) -> Latents:
        """The network's velocity noise - x_0 at x_t.

        Raises:
            ValueError: the network's output has another shape than x_t.
        """
        return split_output(denoise(x_t, self.network_timesteps(t)), x_t, learns_variance=False)[0]

    def predict_x_start(self, velocity: Latents, x_t: Latents, t: PerSample) -> Latents:
        """Where the straight line through x_t with that velocity meets t = 0: x_t - t · velocity."""
        return x_t - columns(t, x_t) * velocity

    def target(self, x_start: Latents, t: PerSample, noise: Latents) -> Latents:  # noqa: ARG002 - a curve needs the time
        """The velocity on the path: noise - x_0, at any time."""
        return noise - x_start

    def training_losses(
        self, denoise: NetworkFn, x_start: Latents, t: PerSample, noise: Latents
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Per sample: `loss` = `mse`, the velocity's squared error; `vb` is 0, as no variance is learned.

        Raises:
            ValueError: x_start, t and noise do not belong together, or the network's output has another shape.
        """
        x_start, noise = at_least_float32(x_start), at_least_float32(noise)
        target = self.target(x_start, t, noise)
        error = self.velocity(denoise, self.q_sample(x_start, t, noise), t) - target
        mse = mean_over_sample(error.square())
        return {"loss": mse, "mse": mse, "vb": torch.zeros_like(mse)}


def columns(t: Tensor, x: Latents) -> Float[Tensor, "batch 1 1 1"]:
    """One entry per sample, to be multiplied with latents."""
    return t.to(x.dtype)[:, None, None, None]
