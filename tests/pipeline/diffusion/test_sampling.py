"""For data that is one Gaussian the optimal network is known, and a sampler run on it must give that Gaussian back.

With data N(mu, S) and x_t = a · x_0 + b · noise, x_t is N(a · mu, a² S + b² I), and everything is linear:
E[noise | x_t] = b · z and E[x_0 | x_t] = mu + a · S z with z = (a² S + b² I)^-1 (x_t - a · mu).
"""

import pytest
import torch

from pipeline.diffusion import SAMPLERS, GaussianDiffusion, RectifiedFlow, default_sampler, samplers_for
from pipeline.runtime.errors import UserError

COUNT = 20_000
SHAPE = (2, 1, 2)
MEAN = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64)
ROOT = torch.tensor([[0.9, 0, 0, 0], [0.5, 0.6, 0, 0], [-0.3, 0.2, 0.4, 0], [0.1, 0.3, 0.2, 0.8]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T
IDENTITY = torch.eye(4, dtype=torch.float64)


def estimates(x, a, b):
    """E[x_0 | x_t] and E[noise | x_t], flat."""
    z = torch.linalg.solve(a * a * COVARIANCE + b * b * IDENTITY, (x.flatten(1) - a * MEAN).T).T
    return MEAN + a * z @ COVARIANCE, b * z


def optimal_flow(x, network_t):
    t = network_t[0].item() / 1000
    x_start, noise = estimates(x, 1 - t, t)
    return (noise - x_start).view_as(x)


def optimal_network(process):
    """The network that minimises the hybrid loss: the mean exactly, the variance per element."""
    steps = {timestep: i for i, timestep in enumerate(process.timestep_map.tolist())}

    def denoise(x, t):
        i = steps[int(t[0])]
        a, b = process.alphas_cumprod[i].sqrt().item(), (1 - process.alphas_cumprod[i]).sqrt().item()
        x_start, noise = estimates(x, a, b)
        prediction = {"epsilon": noise, "x0": x_start, "v": a * noise - b * x_start}[process.prediction].view_as(x)
        if not process.learns_variance:
            return prediction
        left = COVARIANCE - a * a * COVARIANCE @ torch.linalg.solve(a * a * COVARIANCE + b * b * IDENTITY, COVARIANCE)
        variance = process.posterior_variance[i] + process.tables.posterior_mean_coef1[i] ** 2 * left.diagonal()
        low, high = process.posterior_log_variance_clipped[i], process.betas[i].log()
        share = (variance.log() - low) / (high - low)
        return torch.cat([prediction, (2 * share - 1).view(1, *SHAPE).expand_as(x)], dim=1)

    return denoise


def denoiser_of(process, name, steps):
    if isinstance(process, RectifiedFlow):
        return process, optimal_flow
    if name in ("ddpm", "ddim"):  # the best variance depends on how far the next kept timestep is
        process = process.respaced(str(steps))
    return process, optimal_network(process)


def normals(seed):
    draws = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(COUNT, *SHAPE, generator=draws, dtype=torch.float64)


# The last figure is what the sampler itself may be off by in any entry of the covariance (whose largest is 0.81), as
# its steps are finite; on top come five standard errors of the estimate from 20,000 samples.
CASES = [
    ("ddpm", GaussianDiffusion(), 250, 0.0, 0.002),
    ("ddpm", GaussianDiffusion(schedule="cosine", prediction="v"), 250, 0.0, 0.002),
    ("ddpm", GaussianDiffusion(variance="fixed-small", prediction="x0"), 250, 0.0, 0.03),
    ("ddpm", GaussianDiffusion(variance="fixed-large"), 250, 0.0, 0.02),
    ("ddim", GaussianDiffusion(), 100, 0.0, 0.04),
    ("ddim", GaussianDiffusion(prediction="v"), 100, 0.5, 0.04),
    ("ddim", GaussianDiffusion(prediction="x0"), 100, 1.0, 0.06),
    ("dpm++", GaussianDiffusion(), 20, 0.0, 0.02),
    ("dpm++", GaussianDiffusion(prediction="v", schedule="cosine"), 20, 0.0, 0.02),
    ("dpm++", GaussianDiffusion(prediction="x0", variance="fixed-large"), 20, 0.0, 0.02),
    ("unipc", GaussianDiffusion(), 20, 0.0, 0.02),
    ("unipc", GaussianDiffusion(prediction="v", schedule="cosine"), 20, 0.0, 0.02),
    ("unipc", GaussianDiffusion(prediction="x0", variance="fixed-large"), 20, 0.0, 0.02),
    ("euler", RectifiedFlow(), 100, 0.0, 0.03),
    ("heun", RectifiedFlow(), 20, 0.0, 0.01),
]


@pytest.mark.parametrize(("name", "process", "steps", "eta", "bias"), CASES)
def test_the_samplers_give_the_gaussian_back(name, process, steps, eta, bias):
    process, denoise = denoiser_of(process, name, steps)
    draw = normals(1)
    x = SAMPLERS[name](process, denoise, draw(), draw, steps=steps, eta=eta).flatten(1)
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / COUNT
    variances = COVARIANCE.diagonal()
    assert ((mean - MEAN).abs() < 5 * (variances / COUNT).sqrt() + 0.005).all()
    error_of_covariance = ((variances[:, None] * variances + COVARIANCE**2) / COUNT).sqrt()
    assert ((covariance - COVARIANCE).abs() < 5 * error_of_covariance + bias).all()


def covariance_exactly(name, process, steps):
    """The covariance that a sampler without noise gives, from where it sends the origin and the unit vectors."""
    process, denoise = denoiser_of(process, name, steps)
    start = torch.cat([torch.zeros(1, 4, dtype=torch.float64), IDENTITY]).view(5, *SHAPE)
    end = SAMPLERS[name](process, denoise, start, pytest.fail, steps=steps).flatten(1)
    columns = end[1:] - end[:1]
    return columns.T @ columns


@pytest.mark.parametrize(
    ("name", "process", "steps", "order"),
    [
        ("ddim", GaussianDiffusion(), 50, 1),
        ("dpm++", GaussianDiffusion(), 10, 2),
        ("unipc", GaussianDiffusion(), 10, 2),
        ("euler", RectifiedFlow(), 50, 1),
        ("heun", RectifiedFlow(), 20, 2),
    ],
)
def test_twice_the_steps_divide_the_error_by_2_to_the_samplers_order(name, process, steps, order):
    errors = [(covariance_exactly(name, process, n) - COVARIANCE).norm() for n in (steps, 2 * steps)]
    assert errors[0] / errors[1] > 0.8 * 2**order


def test_the_samplers_that_suit_a_process_come_with_its_default_first():
    assert samplers_for(GaussianDiffusion()) == ("ddpm", "ddim", "dpm++", "unipc")
    assert samplers_for(RectifiedFlow()) == ("heun", "euler")
    assert default_sampler(GaussianDiffusion()) == "ddpm"
    assert default_sampler(RectifiedFlow()) == "heun"
    assert {*samplers_for(GaussianDiffusion()), *samplers_for(RectifiedFlow())} == set(SAMPLERS)


@pytest.mark.parametrize("name", ["ddpm", "dpm++", "unipc", "euler", "heun"])
def test_only_ddim_takes_an_eta(name):
    with pytest.raises(UserError, match=r"--eta 0.5 is for --sampler ddim, not \S+;"):
        SAMPLERS[name](process_for(name), lambda x, _: x, torch.ones(1, 1, 2, 2), torch.ones, steps=2, eta=0.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_reported_and_no_gradient_is_kept(name):
    seen = []
    weight = torch.ones(1, requires_grad=True)

    def denoise(x, t):
        assert t.shape == (2,)
        assert 0 <= t[0] <= 1000
        return 0.1 * weight * x

    x = SAMPLERS[name](
        process_for(name),
        denoise,
        torch.ones(2, 1, 2, 2),
        lambda _: torch.zeros(2, 1, 2, 2),
        steps=5,
        on_step=lambda *step: seen.append(step),
    )
    assert [step[:2] for step in seen] == [(k, 5) for k in range(5)]
    assert all(step[2].shape == x.shape for step in seen)
    assert not x.requires_grad
    assert x.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "steps", "limit"),
    [
        ("ddpm", 0, "must be at least 1"),
        ("ddim", 1001, r"is more than --sampler \S+ can take here: at most 1000$"),
        ("dpm++", 1000, r"is more than --sampler \S+ can take here: at most 999$"),
        ("unipc", 0, "must be at least 1"),
        ("unipc", 1000, r"is more than --sampler \S+ can take here: at most 999$"),
        ("euler", 0, "must be at least 1"),
        ("heun", -1, "must be at least 1"),
    ],
)
def test_a_step_count_out_of_range_is_refused_with_the_limit(name, steps, limit):
    with pytest.raises(UserError, match=rf"--steps {steps} {limit}"):
        SAMPLERS[name](process_for(name), lambda x, _: x, torch.ones(1, 1, 2, 2), torch.ones, steps=steps)


def process_for(name):
    return RectifiedFlow() if name in samplers_for(RectifiedFlow()) else GaussianDiffusion(variance="fixed-small")


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 5), ("heun", 2 * 5 - 1)])
def test_a_flow_is_never_asked_at_time_0_where_training_has_hardly_been(name, evaluations):
    asked = []

    def denoise(x, t):
        asked.append(t[0].item())
        return 0.1 * x

    SAMPLERS[name](RectifiedFlow(), denoise, torch.ones(1, 1, 2, 2), pytest.fail, steps=5)
    assert len(asked) == evaluations
    assert min(asked) > 100


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # NumPy 2 about torch's tensors
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_unipc_is_bit_for_bit_what_the_scheduler_of_diffusers_gives(prediction, steps):
    from diffusers import UniPCMultistepScheduler

    process = GaussianDiffusion(prediction=prediction, variance="fixed-large")
    kind = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction]
    scheduler = UniPCMultistepScheduler(
        trained_betas=process.betas.numpy(), prediction_type=kind, timestep_spacing="linspace", solver_order=2
    )
    scheduler.set_timesteps(steps)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(2, 2, generator=torch.Generator().manual_seed(1))

    def denoise(x, t):
        return (torch.einsum("oc,bchw->bohw", weight, x) + t[:, None, None, None] / 1000).tanh()

    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, t.expand(3)), t, x).prev_sample
    assert torch.equal(SAMPLERS["unipc"](process, denoise, noise, pytest.fail, steps=steps), x)
