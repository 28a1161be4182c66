import torch

from pipeline.diffusion.gaussian import discretized_gaussian_nll, gaussian_kl


def test_the_divergence_has_its_closed_form():
    mean = torch.randn(2, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero, wide = torch.zeros_like(mean), torch.full_like(mean, 2.0)
    torch.testing.assert_close(gaussian_kl(mean, zero, zero, zero), mean.square() / 2)
    torch.testing.assert_close(gaussian_kl(zero, wide, zero, zero), (wide.exp() - 1 - wide) / 2)
    assert gaussian_kl(mean, wide, mean, wide).abs().max() == 0


def test_the_probabilities_of_all_256_levels_add_up_to_1():
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(-1, 1, 1, 1)
    nll = discretized_gaussian_nll(levels, torch.full_like(levels, 0.3), torch.full_like(levels, -2.0))
    assert abs((-nll).exp().sum().item() - 1) < 1e-9


def test_an_impossible_value_costs_a_finite_amount():
    x = torch.ones(1, 1, 1, 1)
    nll = discretized_gaussian_nll(x * 0.5, -x, torch.full_like(x, -20.0))
    torch.testing.assert_close(nll, torch.full_like(x, 1e-12).log().neg())
