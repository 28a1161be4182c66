import math

import pytest
import torch

from pipeline.diffusion import GaussianDiffusion
from pipeline.diffusion.schedules import betas_of, kept_timesteps
from pipeline.runtime.errors import UserError

RESPACINGS = ("250", "50", "25", "ddim50", "ddim25", "10,15,20")


@pytest.mark.parametrize("table", ["betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"])
def test_the_tables_are_the_references(golden, table):
    found = getattr(GaussianDiffusion(), table)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, golden[f"table.1000.{table}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("respacing", RESPACINGS)
def test_respaced_tables_and_kept_timesteps_are_the_references(golden, respacing):
    process = GaussianDiffusion().respaced(respacing)
    assert torch.equal(process.timestep_map, golden[f"table.{respacing}.timestep_map"])
    assert process.num_timesteps == len(process.timestep_map)
    for table in ("betas", "posterior_log_variance_clipped"):
        torch.testing.assert_close(
            getattr(process, table), golden[f"table.{respacing}.{table}"], rtol=1e-12, atol=1e-12
        )


def test_a_respaced_process_has_the_originals_alpha_bar_where_it_stands():
    process = GaussianDiffusion(schedule="cosine")
    few = process.respaced("20")
    torch.testing.assert_close(few.alphas_cumprod, process.alphas_cumprod[few.timestep_map], rtol=1e-12, atol=1e-15)


def test_respacing_twice_is_respacing_once_on_what_is_left():
    assert GaussianDiffusion().respaced("ddim50").respaced("25").timestep_map.tolist() == [
        20 * i for i in kept_timesteps(50, "25")
    ]
    assert GaussianDiffusion().respaced("25").respaced("25") == GaussianDiffusion().respaced("25")


def test_the_cosine_schedule_follows_its_formula():
    alpha_bar = (1 - betas_of("cosine", 50)).cumprod(0)
    wanted = [
        (math.cos((i / 50 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
        for i in range(1, 50)
    ]
    torch.testing.assert_close(alpha_bar[:-1], torch.tensor(wanted, dtype=torch.float64))
    assert betas_of("cosine", 50)[-1] == 0.999


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_any_number_of_steps_ends_in_noise(schedule, steps):
    betas = betas_of(schedule, steps)
    assert betas.shape == (steps,)
    assert ((betas > 0) & (betas < 1)).all()
    assert (1 - betas).prod() < 1e-3


def test_one_step_is_the_noisiest():
    process = GaussianDiffusion().respaced("1")
    assert process.timestep_map.tolist() == [999]
    assert torch.isfinite(process.posterior_log_variance_clipped).all()


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("1001", r"cannot keep 1001 of 1000 timesteps"),
        ("10,600", r"cannot keep 600 of 500 timesteps; the process has 1000 in all"),
        ("ddim300", r"no whole stride keeps 300 of 1000 timesteps"),
        ("0", r"the respacing '0' is none of"),
        ("fast", r"the respacing 'fast' is none of"),
        ("", r"the respacing '' is none of"),
    ],
)
def test_an_impossible_respacing_is_refused(respacing, message):
    with pytest.raises(UserError, match=message):
        GaussianDiffusion().respaced(respacing)
