"""The terms of the variational bound, element by element, in nats."""

import math

import torch
from torch import Tensor

from pipeline.diffusion.denoiser import Latents

BITS_PER_NAT = 1 / math.log(2)


def gaussian_kl(mean_1: Latents, log_variance_1: Tensor, mean_2: Latents, log_variance_2: Tensor) -> Latents:
    """KL(N(mean_1, exp log_variance_1) ‖ N(mean_2, exp log_variance_2)) of every element."""
    ratio = log_variance_1 - log_variance_2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean_1 - mean_2).square() * (-log_variance_2).exp())


def discretised_gaussian_nll(x: Latents, mean: Latents, log_variance: Tensor) -> Latents:
    """-log of the probability that a normal falls into x's bin, the bins being 2 / 255 wide on [-1, 1].

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
