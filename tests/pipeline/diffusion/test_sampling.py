"""For data that is one Gaussian the optimal network is known, and a sampler run on it must give that Gaussian back.

With data N(mu, S) and x_t = a · x_0 + b · noise, x_t is N(a · mu, a² S + b² I), and everything is linear:
E[noise | x_t] = b · z and E[x_0 | x_t] = mu + a · S z with z = (a² S + b² I)^-1 (x_t - a · mu).
"""

import math

import pytest
import torch

from pipeline.diffusion import SAMPLERS, GaussianDiffusion, RectifiedFlow, default_sampler, make_process, samplers_for
from pipeline.diffusion.sit import REPAFlow, SiTFlow
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


def optimal_flow(process):
    def denoise(x, network_t):
        t = network_t[0].item() / 1000
        x_start, noise = estimates(x, 1 - t, t)
        return (x_start if process.prediction == "x0" else noise - x_start).view_as(x)

    return denoise


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
        return process, optimal_flow(process)
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
    ("dpm++2m", RectifiedFlow(), 20, 0.0, 0.02),
    ("sde", RectifiedFlow(), 250, 0.0, 0.03),
    ("dpm++2m", RectifiedFlow(time_shift=2.0, prediction="x0"), 20, 0.0, 0.03),
    ("sde", RectifiedFlow(time_shift=2.0), 250, 0.0, 0.05),
    ("euler", RectifiedFlow(time_shift=2.0), 100, 0.0, 0.03),
    ("heun", RectifiedFlow(time_shift=2.0, prediction="x0"), 20, 0.0, 0.015),
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


def covariance_exactly(name, process, steps, timesteps=None, eta=0.0):
    """The covariance that a sampler gives, from where it sends the origin and the units of the start and of each draw."""
    fitting = process if timesteps is None else process.with_timesteps(timesteps)
    fitting, denoise = denoiser_of(fitting, name, steps)
    draws = steps if name == "ddpm" or eta else 0
    count = 4 * (draws + 1) + 1

    def units(k):
        rows = torch.zeros(count, 4, dtype=torch.float64)
        rows[4 * k + 1 : 4 * k + 5] = IDENTITY
        return rows.view(count, *SHAPE)

    end = SAMPLERS[name](
        fitting if timesteps is None else process,
        denoise,
        units(0),
        lambda k: units(k + 1) if draws else pytest.fail("drawn"),
        steps=steps,
        eta=eta,
        timesteps=timesteps,
    ).flatten(1)
    columns = end[1:] - end[:1]
    return columns.T @ columns


@pytest.mark.parametrize(
    ("name", "process", "steps", "order"),
    [
        ("ddpm", GaussianDiffusion(), 50, 1),
        ("ddpm", GaussianDiffusion(schedule="cosine", prediction="v"), 50, 1),
        ("ddpm", GaussianDiffusion(variance="fixed-small"), 50, 1),
        ("ddpm", GaussianDiffusion(variance="fixed-large"), 50, 1),
        ("ddim", GaussianDiffusion(), 50, 1),
        ("dpm++", GaussianDiffusion(), 10, 2),
        ("unipc", GaussianDiffusion(), 10, 2),
        ("euler", RectifiedFlow(), 50, 1),
        ("heun", RectifiedFlow(), 20, 2),
        ("dpm++2m", RectifiedFlow(), 160, 2),  # lambda's steps stay large at both ends, so 2 is reached late
        ("euler", RectifiedFlow(time_shift=2.0), 100, 1),
        ("euler", RectifiedFlow(time_shift=2.0, prediction="x0"), 100, 1),
        ("heun", RectifiedFlow(time_shift=2.0), 40, 2),
        ("heun", RectifiedFlow(time_shift=2.0, prediction="x0"), 40, 2),
    ],
)
def test_twice_the_steps_divide_the_error_by_2_to_the_samplers_order(name, process, steps, order):
    errors = [(covariance_exactly(name, process, n) - COVARIANCE).norm() for n in (steps, 2 * steps)]
    assert errors[0] / errors[1] > 0.8 * 2**order


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_with_noise_ddim_converges_in_first_order_too(eta):
    errors = [(covariance_exactly("ddim", GaussianDiffusion(), n, eta=eta) - COVARIANCE).norm() for n in (100, 200)]
    assert errors[0] / errors[1] > 0.8 * 2


@pytest.mark.parametrize(
    ("name", "steps", "order"),
    [("ddpm", 20, 1), ("ddim", 20, 1), ("dpm++", 20, 2), ("unipc", 20, 2),
     ("euler", 50, 1), ("heun", 20, 2), ("dpm++2m", 160, 2)],
)  # fmt: skip
def test_so_it_is_on_steps_that_begin_where_a_list_says(name, steps, order):
    process = process_for(name, variance="learned-range")
    errors = []
    for count in (steps, 2 * steps):
        dense_at_the_data = [((count - k) / count) ** 1.5 for k in range(count)]
        if isinstance(process, GaussianDiffusion):
            dense_at_the_data = [round(999 * share) for share in dense_at_the_data]
        errors.append((covariance_exactly(name, process, count, dense_at_the_data) - COVARIANCE).norm())
    assert errors[0] / errors[1] > 0.8 * 2**order


def own_steps(name, steps):
    """Where a sampler's steps begin when nobody says so."""
    if name in ("ddpm", "ddim"):
        return GaussianDiffusion().respaced(str(steps)).timestep_map.tolist()[::-1]
    if name in ("dpm++", "unipc"):
        return [round(999 * (steps - k) / steps) for k in range(steps)]
    end = 0.04 if name == "sde" else 1 / steps
    return [1 - k * (1 - end) / (steps - 1) for k in range(steps)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_list_of_a_samplers_own_steps_gives_what_it_gives_without(name):
    start, seen = torch.linspace(-1, 1, 8).view(2, 1, 2, 2), []

    def denoise(x, t):
        seen.append(t[0].item())
        return 0.3 * x + t[:, None, None, None] / 2000

    given = {"process": process_for(name), "denoise": denoise, "noise": start, "draw": lambda k: start * (k % 3)}
    own = SAMPLERS[name](**given, steps=10)
    listed = SAMPLERS[name](**given, steps=10, timesteps=own_steps(name, 10))
    torch.testing.assert_close(listed, own, rtol=1e-5, atol=1e-5)
    assert seen[len(seen) // 2 :] == pytest.approx(seen[: len(seen) // 2])
    other = [t / 2 for t in own_steps(name, 10)] if name in samplers_for(RectifiedFlow()) else [999, *range(9, 0, -1)]
    assert not torch.allclose(SAMPLERS[name](**given, steps=10, timesteps=other), own, atol=1e-2)


@pytest.mark.parametrize("name", ["ddpm", "dpm++", "unipc"])
def test_a_list_may_have_every_timestep_and_a_single_one(name):
    start = torch.ones(1, 1, 2, 2)
    for timesteps in (range(999, -1, -1), [999]):
        asked = {"steps": len(timesteps), "timesteps": list(timesteps)}
        fed = set()

        def denoise(x, t, fed=fed):
            fed.add(int(t[0]))
            return 0.1 * x

        SAMPLERS[name](process_for(name), denoise, start, lambda _: start, **asked)
        assert fed == set(timesteps)


@pytest.mark.parametrize(
    ("process", "timesteps"),
    [
        (GaussianDiffusion(), [0, 500, 999]),
        (GaussianDiffusion(), [999, 500, 500]),
        (GaussianDiffusion(), [1000, 0]),
        (GaussianDiffusion(), [999, 0.5]),
        (GaussianDiffusion(), [5, -1]),
        (GaussianDiffusion(), []),
        (GaussianDiffusion().respaced("4"), [999, 334]),
        (RectifiedFlow(), [0.2, 0.8]),
        (RectifiedFlow(), [1.0, 0.0]),
        (RectifiedFlow(), [1.5, 0.5]),
        (RectifiedFlow(), [999, 500]),
        (RectifiedFlow(), [1.0, 1.0]),
        (RectifiedFlow(), []),
    ],
)
def test_a_list_that_does_not_fit_the_process_is_refused_with_what_would(process, timesteps):
    flow = isinstance(process, RectifiedFlow)
    wanted = "must be times that fall, from 1" if flow else "must be whole numbers that fall, each of 999 .*… 0"
    with pytest.raises(UserError, match=f"--timesteps .*{wanted}"):
        process.with_timesteps(timesteps)


def test_what_a_sampler_is_told_of_its_steps_is_not_what_a_checkpoint_says():
    told = RectifiedFlow().with_timesteps([1.0, 0.5])
    assert told.to_json() == RectifiedFlow().to_json()
    with pytest.raises(UserError, match="times is no setting of it"):
        make_process({"objective": "flow", "times": [1.0, 0.5]})
    few = GaussianDiffusion().respaced("4")
    assert few.with_timesteps([999, 333]).timestep_map.tolist() == [333, 999]


def before_the_last_step(steps):
    """The covariance of x that the SDE sampler has at t = 0.04, from where it sends each unit of each draw alone."""
    count = 4 * steps + 1  # the origin, the units of the start, and those of each step's noise

    def units(k):
        rows = torch.zeros(count, 4, dtype=torch.float64)
        rows[4 * k + 1 : 4 * k + 5] = IDENTITY
        return rows.view(count, *SHAPE)

    seen = []

    def denoise(x, t):
        seen.append(x.flatten(1))
        return optimal_flow(RectifiedFlow())(x, t)

    SAMPLERS["sde"](RectifiedFlow(), denoise, units(0), lambda k: units(k + 1), steps=steps)
    columns = seen[-1][1:] - seen[-1][:1]
    return columns.T @ columns


def test_the_sde_sampler_converges_to_the_paths_own_covariance_in_first_order():
    wanted = 0.96**2 * COVARIANCE + 0.04**2 * IDENTITY
    errors = [(before_the_last_step(steps) - wanted).norm() for steps in (61, 121)]
    assert errors[1] < 0.02
    assert errors[0] / errors[1] > 0.8 * 2


def test_the_sde_sampler_draws_once_a_step_but_at_the_last():
    drawn = []

    def draw(k):
        drawn.append(k)
        return torch.zeros(1, 1, 2, 2)

    x = SAMPLERS["sde"](RectifiedFlow(), lambda x, _: 0.1 * x, torch.ones(1, 1, 2, 2), draw, steps=5)
    assert drawn == [0, 1, 2, 3]
    # without noise a step is x - dt (v + x + (1 - t) v), as v = epsilon - x_0
    expected = 1.0
    for t, dt in ((1, 0.24), (0.76, 0.24), (0.52, 0.24), (0.28, 0.24), (0.04, 0.04)):
        expected -= dt * (0.1 + 1 + (1 - t) * 0.1) * expected
    assert x.flatten()[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["sde", "dpm++2m"])
@pytest.mark.parametrize("kind", [REPAFlow, SiTFlow])
def test_on_a_curved_path_they_reach_the_data_that_the_network_knows(name, kind):
    process = kind(path="cosine")
    x_start = torch.full((1, 1, 2, 2), 0.7, dtype=torch.float64)

    def denoise(x, t):
        t = 1 - t if process.noise_first else t
        cos, sin = (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()
        epsilon = (x - cos * x_start) / sin
        velocity = math.pi / 2 * (cos * epsilon - sin * x_start)
        return -velocity if process.noise_first else velocity

    start = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    x = SAMPLERS[name](process, denoise, start, lambda _: 0 * start, steps=400)
    torch.testing.assert_close(x, x_start, rtol=0, atol=0.1 if name == "sde" else 1e-9)


def test_the_samplers_that_suit_a_process_come_with_its_default_first():
    assert samplers_for(GaussianDiffusion()) == ("ddpm", "ddim", "dpm++", "unipc")
    assert samplers_for(RectifiedFlow()) == ("heun", "euler", "sde", "dpm++2m")
    assert default_sampler(GaussianDiffusion()) == "ddpm"
    assert default_sampler(RectifiedFlow()) == "heun"
    assert {*samplers_for(GaussianDiffusion()), *samplers_for(RectifiedFlow())} == set(SAMPLERS)


@pytest.mark.parametrize("name", ["ddpm", "dpm++", "unipc", "euler", "heun", "sde", "dpm++2m"])
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


def process_for(name, variance="fixed-small"):
    return RectifiedFlow() if name in samplers_for(RectifiedFlow()) else GaussianDiffusion(variance=variance)


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 5), ("heun", 2 * 5 - 1), ("dpm++2m", 5)])
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


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # NumPy 2 about torch's tensors
@pytest.mark.parametrize("process", [RectifiedFlow(time_shift=2.0), RectifiedFlow(time_shift=2.0, prediction="x0")])
def test_the_scheduler_that_an_export_to_diffusers_names_has_the_same_prediction_and_shift(process):
    from diffusers import DPMSolverMultistepScheduler

    settings = process.diffusers_scheduler()
    scheduler = DPMSolverMultistepScheduler(**{k: v for k, v in settings.items() if k != "_class_name"})
    scheduler.set_timesteps(40)
    x, denoise = normals(1)(), optimal_flow(process)
    for timestep in scheduler.timesteps:
        sigma = scheduler.sigmas[scheduler.step_index or 0].item()  # a timestep is rounded to a whole number
        x = scheduler.step(denoise(x, torch.tensor([1000 * sigma])), timestep, x).prev_sample
    halfway = process.shifted(1 - 20 / 40)
    assert scheduler.sigmas[20].item() == pytest.approx(halfway, abs=0.02)
    x = x.flatten(1).double()
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / COUNT
    assert (x.mean(0) - MEAN).abs().max() < 0.05 and (covariance - COVARIANCE).abs().max() < 0.05
