"""Rectified flow on the straight path between data and noise (SiT: Ma et al. 2024, arXiv 2401.08740).

x_t = (1 - t) · x_0 + t · noise,   velocity dx_t / dt = noise - x_0

Time is a real number from data (t = 0) to noise (t = 1), and the network is fed 1000 · t, so that its timestep
features span what they span in diffusion.

The network may give x_0 in place of the velocity: its loss is the velocity's all the same (Li & He 2025,
arXiv 2511.13720). With many numbers to a token that is easier, as data fills few directions and noise all of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
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
from pipeline.diffusion.process import OF_SAMPLING, FlowPrediction, TimestepLaw
from pipeline.runtime.errors import UserError

LEAST_TIME = 0.05
"""Below it a loss on the velocity of a predicted x_0 divides by this in place of t (the paper's constant)."""
_NEWER = (
    "prediction",
    "time_mean",
    "time_std",
    "time_shift",
    "loss_weight",
)  # than the first checkpoints, which do not name them


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RectifiedFlow:
    """A straight path from data to noise and the network's task: its velocity."""

    timestep_law: TimestepLaw = "logit-normal"
    """How training draws times: a normal number through the logistic function, or uniform."""
    prediction: FlowPrediction = "v"
    """What the network gives: the velocity, or x_0. `epsilon`, which early runs recorded, is read as v."""
    time_mean: float = 0.0
    """Mean of the logit-normal law's normal number; above 0 more times are near the noise."""
    time_std: float = 1.0
    """Its standard deviation."""
    time_shift: float = 1.0
    """Alpha of t' = alpha · t / (1 + (alpha - 1) · t), for the times of training and of every sampler's steps."""
    times: tuple[float, ...] | None = None
    """Where a sampler's steps begin, from noise to data, if not equal ones (`with_timesteps`); never recorded."""

    def __post_init__(self) -> None:
        if self.prediction == "epsilon":
            object.__setattr__(self, "prediction", "v")
        law = (self.time_mean, self.time_std)
        wrong = [
            f"{name} is {value} but must be a finite number{' above 0' if above else ''}"
            for name, above in (("time_mean", False), ("time_std", True), ("time_shift", True))
            if not math.isfinite(value := getattr(self, name)) or (above and value <= 0)
        ]
        if self.timestep_law == "uniform" and law != (0.0, 1.0):
            wrong.append(f"time_mean {law[0]:g} and time_std {law[1]:g} are of the logit-normal law, not the uniform")
        if self.prediction not in self.predictions:
            wrong.append(
                f"the networks of {self.objective} give {' or '.join(self.predictions)}, not {self.prediction}"
            )
        if wrong:
            raise UserError(f"this process cannot be made: {'; '.join(wrong)}")

    objective: ClassVar[str] = "flow"
    sampled_as: ClassVar[str] = "flow"  # whose samplers it takes
    num_timesteps: ClassVar[None] = None  # time is a real number
    preview_sampler: ClassVar[str] = "euler"
    noise_first: ClassVar[bool] = False  # whether the time that the network is fed runs from noise to data
    predictions: ClassVar[tuple[str, ...]] = ("v", "x0")  # what its networks may give

    @property
    def time_scale(self) -> float:
        """What the network is fed at the end of its time."""
        return 1000.0

    @property
    def ends(self) -> tuple[float, float]:
        """The times at which samplers stop, by the data, and at which they start, by the noise."""
        return 0.0, 1.0

    @property
    def learns_variance(self) -> bool:
        """Never: the network gives C channels."""
        return False

    def to_json(self) -> dict[str, Any]:
        """The settings, those of `_NEWER` where they are not the default; `make_process` is the inverse."""
        return {
            "objective": self.objective,
            **{
                field.name: value
                for field in dataclasses.fields(self)
                if (value := getattr(self, field.name)) != field.default or field.name not in _NEWER
                if field.name not in OF_SAMPLING
            },
        }

    def start(self, noise: Latents) -> Latents:
        """Where a sampler starts: the noise, in full precision."""
        return at_least_float32(noise)

    def diffusers_scheduler(self) -> dict[str, Any]:
        """The settings of a solver of diffusers' that its DiT pipeline can drive."""
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "sample" if self.prediction == "x0" else "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": self.time_shift,
        }

    def timesteps(self, at: float, x: Latents, *, less: float = 0.0) -> PerSample:
        """The time `at` - `less` as an entry per sample of x."""
        t, same = x.new_full((len(x),), at), torch.full((1,), at, dtype=x.dtype)
        return known_on_host(t - less, same - less) if less else known_on_host(t, same)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> PerSample:
        """Times in [0, 1] by the timestep law, shifted, on the generator's device."""
        if self.timestep_law == "uniform":
            t = torch.rand(count, generator=generator, device=generator.device)
        else:
            normal = torch.randn(count, generator=generator, device=generator.device)
            t = (normal * self.time_std + self.time_mean).sigmoid()
        return self.shifted(t)

    def shifted(self, t: "Tensor | float") -> Any:
        """t' = alpha · t / (1 + (alpha - 1) · t), of one or many (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
        return t if self.time_shift == 1 else self.time_shift * t / (1 + (self.time_shift - 1) * t)

    def with_timesteps(self, timesteps: Sequence[int | float]) -> "RectifiedFlow":
        """The same process for samplers whose steps begin at these times, and whose last one ends at the data.

        Raises:
            UserError: they do not fall, or leave (0, 1] or what of it samplers keep to.
        """
        last, first = self.ends
        falls = all(a > b for a, b in itertools.pairwise([*timesteps, last]))
        if not timesteps or not falls or timesteps[0] > first:
            raise UserError(
                f"--timesteps {','.join(f'{t:g}' for t in timesteps)} must be times that fall, from {first:g} (noise) "
                f"at most to above {last:g} (data), as this checkpoint's process is a flow"
            )
        return dataclasses.replace(self, times=tuple(timesteps))

    def step_times(self, steps: int) -> list[float]:
        """Where a sampler's steps begin, from noise to data, and where the last one ends.

        Equal ones, shifted as the times of training are: what sampler and training do cannot differ. Or those chosen.
        """
        last, first = self.ends
        if self.times is not None:
            return [*self.times, last]
        length = first - last
        return [self.shifted(first - length * k / steps) for k in range(steps)] + [self.shifted(last)]

    def steps_back(self, steps: int) -> list[tuple[float, float]]:
        """Where a sampler's steps begin, from noise to data, and how many steps of that length would fill all time."""
        if self.time_shift == 1 and self.times is None and self.ends == (0.0, 1.0):
            return [(1 - k / steps, float(steps)) for k in range(steps)]
        return [(at, 1 / (at - end)) for at, end in itertools.pairwise(self.step_times(steps))]

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
        """The network's velocity noise - x_0 at x_t; of a predicted x_0 it is (x_t - x_0) / t.

        Raises:
            ValueError: the network's output has another shape than x_t.
        """
        output = self._output(denoise, x_t, t)
        return (x_t - output) / columns(t, x_t) if self.prediction == "x0" else output

    def _output(self, denoise: NetworkFn, x_t: Latents, t: PerSample) -> Latents:
        return split_output(denoise(x_t, self.network_timesteps(t)), x_t, learns_variance=False)[0]

    def predict_x_start(self, velocity: Latents, x_t: Latents, t: PerSample) -> Latents:
        """Where the straight line through x_t with that velocity meets t = 0: x_t - t · velocity."""
        return x_t - columns(t, x_t) * velocity

    def output_for(self, x_start: Latents, x_t: Latents, t: PerSample) -> Latents:
        """What a network would give at x_t that knows x_0: the line from there to x_t goes on to its noise."""
        return x_start if self.prediction == "x0" else (x_t - x_start) / columns(t, x_t)

    def target(self, x_start: Latents, t: PerSample, noise: Latents) -> Latents:  # noqa: ARG002 - a curve needs the time
        """The velocity on the path: noise - x_0, at any time."""
        return noise - x_start

    def training_losses(
        self, denoise: NetworkFn, x_start: Latents, t: PerSample, noise: Latents
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Per sample: `loss` = `mse`, the velocity's squared error; `vb` is 0, as no variance is learned.

        Of a predicted x_0 the velocity is (x_t - x_0) / max(t, 0.05), and so is the one that it is compared with.

        Raises:
            ValueError: x_start, t and noise do not belong together, or the network's output has another shape.
        """
        x_start, noise = at_least_float32(x_start), at_least_float32(noise)
        x_t = self.q_sample(x_start, t, noise)
        if self.prediction == "x0":
            error = (self._output(denoise, x_t, t) - x_start) / columns(t, x_t).clamp(min=LEAST_TIME)
        else:
            error = self.velocity(denoise, x_t, t) - self.target(x_start, t, noise)
        mse = mean_over_sample(error.square())
        return {"loss": mse, "mse": mse, "vb": torch.zeros_like(mse)}


def shift_for(channels: int, height: int, width: int) -> float:
    """Alpha by the numbers of a latent, √(CHW / 4096), never below 1 (Zheng et al. 2025, arXiv 2510.11690).

    A picture of more numbers is told through more noise: at equal t less of it is hidden.
    """
    return max(1.0, math.sqrt(channels * height * width / 4096))


def columns(t: Tensor, x: Latents) -> Float[Tensor, "batch 1 1 1"]:
    """One entry per sample, to be multiplied with latents."""
    return t.to(x.dtype)[:, None, None, None]
