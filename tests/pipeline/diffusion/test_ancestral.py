import pytest
import torch

from pipeline.diffusion import GaussianDiffusion, classifier_free_guidance
from pipeline.diffusion.samplers import SAMPLERS, ddim, ddpm


@pytest.fixture
def reference(golden, golden_network):
    """Guided network, starting noise and recorded noises; the reference carries each sample twice, we once."""
    denoise = classifier_free_guidance(
        golden_network, golden["sample.y"][:2], scale=golden["sample.cfg_scale"].item(), null_class=10, channels=3
    )
    return denoise, golden["sample.z"][:2], lambda k: golden["sample.noises"][k][:2]


def test_every_ancestral_step_is_the_references(golden, reference, relative_error):
    denoise, noise, draw = reference
    inputs, x_starts = [], []

    def listening(x, t):
        inputs.append(x)
        return denoise(x, t)

    final = ddpm(
        GaussianDiffusion(), listening, noise, draw, steps=25, on_step=lambda k, n, x: x_starts.append((k, n, x))
    )
    for k, after in enumerate([*inputs[1:], final]):
        assert relative_error(after, golden["sample.ddpm25.steps"][k][:2]) < 1e-5, k
    assert relative_error(final, golden["sample.ddpm25.final_f64"][:2]) < 1e-5
    assert relative_error(x_starts[0][2], golden["sample.ddpm25.pred_xstart_first"][:2]) < 1e-5
    assert [(k, n) for k, n, _ in x_starts] == [(k, 25) for k in range(25)]


@pytest.mark.parametrize(
    ("name", "sampler", "fields"),
    [
        ("ddpm25_clip.final", ddpm, {"clip": True}),
        ("ddim25.final", ddim, {}),
        ("ddim25_clip.final", ddim, {"clip": True}),
        ("ddim25_eta1.final", ddim, {"eta": 1.0}),
    ],
)
def test_the_samples_are_the_references(golden, reference, relative_error, name, sampler, fields):
    found = sampler(GaussianDiffusion(), *reference, steps=25, **fields)
    assert relative_error(found, golden[f"sample.{name}"][:2]) < 1e-5


def test_ddim_on_every_40th_timestep_is_the_references(golden, reference, relative_error):
    found = ddim(GaussianDiffusion().respaced("ddim25"), *reference, steps=25)
    assert relative_error(found, golden["sample.ddim25_ddimspacing.final"][:2]) < 1e-5


@pytest.mark.parametrize(
    ("sampler", "eta", "drawn"), [("ddpm", 0.0, [0, 1, 2]), ("ddim", 0.5, [0, 1, 2]), ("ddim", 0.0, [])]
)
def test_steps_draw_in_order_and_the_last_draws_nothing(sampler, eta, drawn):
    asked = []

    def draw(k):
        asked.append(k)
        return torch.zeros(1, 1, 2, 2)

    SAMPLERS[sampler](
        GaussianDiffusion(variance="fixed-small"), lambda x, _: x, torch.ones(1, 1, 2, 2), draw, steps=4, eta=eta
    )
    assert asked == drawn


@pytest.mark.parametrize("sampler", [ddpm, ddim])
@pytest.mark.parametrize("steps", [1, 1000])
def test_any_number_of_steps_up_to_the_processs_own(sampler, steps):
    fed = []

    def denoise(x, t):
        fed.append(int(t[0]))
        return 0.1 * x

    process = GaussianDiffusion(variance="fixed-large")
    x = sampler(process, denoise, torch.ones(1, 1, 2, 2), lambda _: torch.zeros(1, 1, 2, 2), steps=steps)
    assert torch.isfinite(x).all()
    assert fed[0] == 999
    assert len(fed) == steps


def test_a_network_in_half_precision_samples_in_float32():
    x = ddim(
        GaussianDiffusion(), lambda x, _: torch.cat([x, x], 1).bfloat16(), torch.ones(1, 1, 2, 2), torch.ones, steps=3
    )
    assert x.dtype == torch.float32


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_noise_of_a_ddim_step_is_eta_of_the_posteriors(eta):
    process, inputs = GaussianDiffusion(variance="fixed-small"), []

    def flat(x, _):
        inputs.append(x)
        return torch.zeros_like(x)

    for drawn in (0.0, 1.0):
        ddim(
            process,
            flat,
            torch.ones(1, 1, 2, 2),
            lambda _, drawn=drawn: torch.full((1, 1, 2, 2), drawn),
            steps=2,
            eta=eta,
        )
    spread = process.respaced("2").tables.posterior_variance[1].sqrt().item()
    torch.testing.assert_close(inputs[3] - inputs[1], torch.full((1, 1, 2, 2), eta * spread))
