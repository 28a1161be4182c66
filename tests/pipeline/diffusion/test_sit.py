"""SiT's whole grid, path × prediction, against its paper's equations written again in its own time (float64).

There s runs from noise (0) to data (1), x_s = a(s) · data + b(s) · noise (arXiv 2401.08740, equation 1), and velocity
and score tell one another by its equation 9, score = (a · v - a' · x) / (b · (a' · b - a · b')).
"""

import math

import pytest
import torch

from pipeline.diffusion import SAMPLERS, make_process
from pipeline.runtime.errors import UserError
from tests.pipeline.diffusion.test_sampling import COVARIANCE, IDENTITY, MEAN, SHAPE, estimates

PATHS = ("linear", "cosine", "vp")
PREDICTIONS = ("v", "noise", "score")
GRID = [(path, prediction) for path in PATHS for prediction in PREDICTIONS]


def own_path(path, s):
    """a, b and their derivatives by s; VP's derivatives by central differences, to be sure of them."""
    if path == "linear":
        return s, 1 - s, 1.0, -1.0
    if path == "cosine":
        return (
            math.sin(math.pi * s / 2),
            math.cos(math.pi * s / 2),
            *(math.pi / 2 * value for value in (math.cos(math.pi * s / 2), -math.sin(math.pi * s / 2))),
        )

    def a(s):
        return math.exp(-(0.1 * (1 - s) + 19.9 * (1 - s) ** 2 / 2) / 2)

    def b(s):
        return math.sqrt(1 - a(s) ** 2)

    h = 1e-6
    return a(s), b(s), (a(s + h) - a(s - h)) / (2 * h), (b(s + h) - b(s - h)) / (2 * h)


def own_velocity_and_score(path, prediction, output, x, s):
    a, b, da, db = own_path(path, s)
    ratio = b * (da * b - a * db)
    if prediction == "v":
        return output, ((a * output - da * x) / ratio if b else None)
    score = output if prediction == "score" else -output / b
    return (score * ratio + da * x) / a, score


def own_interval(path, prediction, sde):
    """From where to where they go: within 0.001 of the ends that something has no value at."""
    first = 1e-3 if path != "vp" and prediction != "v" else 0.0
    last = 1.0 if path != "vp" and prediction == "v" else 1 - 1e-3
    return first, (0.96 if sde else last)


def network(x, fed):
    """Something that depends on both; the further channels mean nothing."""
    out = torch.sin(2 * x) * (1 + fed[:, None, None, None]) + 0.3 * x
    return torch.cat([out, out * 0 + 7], dim=1)


def start():
    draws = torch.Generator().manual_seed(4)
    return torch.randn(3, *SHAPE, generator=draws, dtype=torch.float64)


def noise_of(k):
    return torch.cos(start() * (k + 1) * 3)


def sampled(name, path, prediction, steps):
    process = make_process({"objective": "sit", "path": path, "prediction": prediction})
    return SAMPLERS[name](process, network, start(), noise_of, steps=steps)


def at(path, prediction, x, s):
    output = network(x, torch.full((len(x),), s, dtype=torch.float64))[:, : x.shape[1]]
    return own_velocity_and_score(path, prediction, output, x, s)


@pytest.mark.parametrize(("path", "prediction"), GRID)
def test_the_probability_flow_is_stepped_along_as_their_equations_say(path, prediction):
    first, last = own_interval(path, prediction, sde=False)
    ds = (last - first) / 7
    euler = start()
    for k in range(7):
        euler = euler + ds * at(path, prediction, euler, first + k * ds)[0]
    torch.testing.assert_close(sampled("euler", path, prediction, 7), euler, rtol=1e-7, atol=1e-7)
    heun = start()
    for k in range(7):
        here = at(path, prediction, heun, first + k * ds)[0]
        there = at(path, prediction, heun + ds * here, first + (k + 1) * ds)[0] if k < 6 else here
        heun = heun + ds * (here + there) / 2
    torch.testing.assert_close(sampled("heun", path, prediction, 7), heun, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("path", "prediction"), GRID)
def test_so_is_the_sde_with_the_diffusion_that_their_tables_were_made_with(path, prediction):
    """Equation 5 with w = 2 b(s), to s = 0.96, and from there once along the drift."""
    first, last = own_interval(path, prediction, sde=True)
    ds = (last - first) / 6
    x = start()
    for k in range(7):
        s, length = (first + k * ds, ds) if k < 6 else (last, 0.04)
        b = own_path(path, s)[1]
        velocity, score = at(path, prediction, x, s)
        x = x + length * (velocity + b * score)
        if k < 6:
            x = x + math.sqrt(2 * b * length) * noise_of(k)
    torch.testing.assert_close(sampled("sde", path, prediction, 7), x, rtol=1e-6, atol=1e-6)


def optimal(process):
    """The best network for data that is one Gaussian."""

    def denoise(x, fed):
        s = fed[0].item()
        a, b, da, db = own_path(process.path, s)
        data, noise = (part.view_as(x) for part in estimates(x, a, b))
        return {"v": da * data + db * noise, "noise": noise, "score": -noise / b if b else noise}[process.prediction]

    return denoise


@pytest.mark.parametrize(("path", "prediction"), GRID)
@pytest.mark.parametrize(("name", "steps", "bias"), [("heun", 100, 0.01), ("dpm++2m", 100, 0.01), ("sde", 100, 0.1)])
def test_of_one_gaussian_they_give_that_gaussian_back(name, steps, bias, path, prediction):
    """Exactly: from where the origin is sent, and each unit of the start and of what is drawn at each step."""
    process = make_process({"objective": "sit", "path": path, "prediction": prediction})
    draws = steps if name == "sde" else 0

    def units(k):
        rows = torch.zeros(4 * (draws + 1) + 1, 4, dtype=torch.float64)
        rows[4 * k + 1 : 4 * k + 5] = IDENTITY
        return rows.view(-1, *SHAPE)

    end = SAMPLERS[name](process, optimal(process), units(0), lambda k: units(k + 1), steps=steps).flatten(1)
    columns = end[1:] - end[:1]
    assert (columns.T @ columns - COVARIANCE).abs().max() < bias
    rest = 2 * own_path(path, 0.0)[0]  # of the data there is that much left in VP's noise
    assert (end[0] - MEAN).abs().max() < bias + rest


@pytest.mark.parametrize("weight", ["none", "velocity", "likelihood"])
@pytest.mark.parametrize(("path", "prediction"), GRID)
def test_training_goes_on_with_their_loss_and_its_weight(path, prediction, weight):
    """The noise's squared error times 1, times its share of the velocity squared, or times half its share of b' s."""
    settings = {"objective": "sit", "path": path, "prediction": prediction, "loss_weight": weight}
    if prediction == "v" and weight != "none":
        with pytest.raises(UserError, match=f"loss_weight {weight} is for a prediction of noise or score"):
            make_process(settings)
        return
    data, noise = start(), noise_of(1)
    own = [0.2, 0.5, 0.9]
    found = make_process(settings).training_losses(network, data, 1 - torch.tensor(own, dtype=torch.float64), noise)
    for k, s in enumerate(own):
        a, b, da, db = own_path(path, s)
        x = (a * data + b * noise)[k : k + 1]
        output = network(x, torch.tensor([s], dtype=torch.float64))[:, : x.shape[1]]
        wanted = {"v": da * data + db * noise, "noise": noise, "score": -noise / b}[prediction][k]
        error = (output[0] - wanted).square().mean().item() * (b**2 if prediction == "score" else 1)
        diffusion = da / a * b**2 - b * db  # half the square of what the path's own SDE adds
        error *= {"none": 1, "velocity": (diffusion / b) ** 2, "likelihood": diffusion / b**2}[weight]
        assert found["loss"][k].item() == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize(("path", "prediction"), GRID)
def test_times_of_training_keep_away_from_where_something_has_no_value(path, prediction):
    process = make_process({"objective": "sit", "path": path, "prediction": prediction})
    drawn = process.draw_timesteps(400_000, torch.Generator().manual_seed(0)).double()
    margin = 1e-5 if path == "vp" else 1e-3
    low = margin if path == "vp" or prediction != "v" else 0
    high = 1 if path == "vp" or prediction == "v" else 1 - margin
    assert drawn.min().item() == pytest.approx(low, abs=2e-5)
    assert drawn.max().item() == pytest.approx(high, abs=2e-5)
    assert low - 1e-7 <= drawn.min() <= drawn.max() <= high + 1e-7
    assert drawn.mean().item() == pytest.approx((low + high) / 2, abs=2e-3)


def test_a_list_of_times_keeps_away_from_there_too():
    noise = make_process({"objective": "sit", "prediction": "noise"})
    with pytest.raises(UserError, match=r"from 0.999 \(noise\) at most to above 0.001 \(data\)"):
        noise.with_timesteps([1.0, 0.5])
    assert noise.with_timesteps([0.999, 0.5]).step_times(2) == [0.999, 0.5, 0.001]
