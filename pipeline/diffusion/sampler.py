"""The one signature that all samplers share."""

from collections.abc import Callable
from typing import Any, Protocol

from pipeline.diffusion.denoiser import Denoise, Latents
from pipeline.errors import UserError

Draw = Callable[[int], Latents]
"""k → standard normals [N, C, H, W] for the k-th step, counted from 0 at the noisy end."""

OnStep = Callable[[int, int, Latents], None]
"""Told (k, number of steps, the x_0 predicted at step k) as every step is made."""


class Sampler(Protocol):
    """Latents x_0 from noise, by running a process backwards."""

    def __call__(
        self,
        process: Any,
        denoise: Denoise,
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
