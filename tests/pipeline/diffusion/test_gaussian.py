import pytest
import torch

from pipeline.diffusion import GaussianDiffusion, make_process

SHAPE = (4, 3, 2, 2)


@pytest.fixture
def batch(golden):
    return golden["train.x_start"], golden["train.t"], golden["train.noise"]


@pytest.fixture
def denoise(golden, golden_network):
    return lambda x_t, t: golden_network(x_t, t, golden["train.y"])


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_noising_is_the_references(golden, batch, relative_error):
    assert relative_error(GaussianDiffusion().q_sample(*batch), golden["train.x_t"]) < 1e-6


def test_losses_are_the_references(golden, batch, denoise, relative_error):
    losses = GaussianDiffusion().training_losses(denoise, *batch)
    assert set(losses) == {"loss", "mse", "vb"}
    for name, values in losses.items():
        assert relative_error(values, golden[f"train.{name}"]) < 1e-5, name


def test_gradients_are_the_references(golden, golden_facts, golden_network, batch, denoise, relative_error):
    GaussianDiffusion().training_losses(denoise, *batch)["loss"].mean().backward()
    grads = {name: parameter.grad for name, parameter in golden_network.named_parameters()}
    norms = torch.stack([grads[name].norm() for name in golden_facts["grad_names"]])
    torch.testing.assert_close(norms, golden["train.grad_norms"], rtol=1e-5, atol=0)
    whole = [name.removeprefix("train.grad.") for name in golden if name.startswith("train.grad.")]
    assert len(whole) == 10
    for name in whole:
        assert relative_error(grads[name], golden[f"train.grad.{name}"]) < 1e-5, name


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("rescaled", {"loss": "rescaled-mse"}),
        ("kl", {"loss": "rescaled-kl"}),
        ("fixed_large", {"variance": "fixed-large"}),
        ("xstart_cosine", {"prediction": "x0", "schedule": "cosine"}),
    ],
)
def test_the_other_losses_are_the_references(golden, batch, denoise, relative_error, name, fields):
    process = GaussianDiffusion(**fields)
    cut = 8 if process.learns_variance else 4
    losses = process.training_losses(lambda x_t, t: denoise(x_t, t)[:, :cut], *batch)
    assert relative_error(losses["loss"], golden[f"train_alt.{name}.loss"]) < 1e-5


def test_the_bound_trains_the_variance_and_leaves_the_mean_to_the_squared_error():
    process = GaussianDiffusion()
    output = draws(4, 6, 2, 2).requires_grad_()
    losses = process.training_losses(
        lambda *_: output, draws(*SHAPE, seed=1), torch.tensor([0, 1, 500, 999]), draws(*SHAPE, seed=2)
    )
    (of_vb,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert of_vb[:, :3].abs().max() == 0
    assert of_vb[:, 3:].abs().min() > 0
    assert of_mse[:, 3:].abs().max() == 0


def test_a_bound_alone_trains_the_mean_too():
    output = draws(4, 6, 2, 2).requires_grad_()
    losses = GaussianDiffusion(loss="kl").training_losses(
        lambda *_: output, draws(*SHAPE, seed=1), torch.tensor([0, 1, 500, 999]), draws(*SHAPE, seed=2)
    )
    losses["loss"].sum().backward()
    assert output.grad[:, :3].abs().min() > 0
    assert torch.equal(losses["loss"], losses["vb"])


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_the_true_prediction_has_no_error_and_leads_back_to_the_data(prediction):
    process = GaussianDiffusion(prediction=prediction, variance="fixed-small")
    x_start, noise, t = draws(*SHAPE, seed=1), draws(*SHAPE, seed=2), torch.tensor([0, 3, 500, 999])
    alpha_bar = process.alphas_cumprod[t][:, None, None, None]
    truth = {"epsilon": noise, "x0": x_start, "v": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_start}[
        prediction
    ]
    losses = process.training_losses(lambda *_: truth, x_start, t, noise)
    assert losses["loss"].abs().max() < 1e-20
    assert losses["vb"].abs().max() == 0
    x_t = process.q_sample(x_start, t, noise)
    step = process.p_mean_variance(truth, x_t, t)
    torch.testing.assert_close(step.x_start, x_start, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.predict_epsilon(step.x_start, x_t, t), noise, rtol=1e-6, atol=1e-6)


def test_the_learned_variance_runs_from_the_posteriors_to_betas():
    process = GaussianDiffusion()
    t = torch.tensor([7, 7, 7])
    fraction = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None, None]
    output = torch.cat([torch.zeros_like(fraction), fraction], dim=1)
    log_variance = process.p_mean_variance(output, torch.zeros_like(fraction), t).log_variance.flatten()
    low, high = process.posterior_log_variance_clipped[7], process.betas[7].log()
    torch.testing.assert_close(log_variance, torch.stack([low, (low + high) / 2, high]))


def test_fixed_variances_are_the_posteriors_and_betas():
    x, t = torch.zeros(2, 1, 1, 1, dtype=torch.float64), torch.tensor([0, 500])
    small = GaussianDiffusion(variance="fixed-small").p_mean_variance(x, x, t).log_variance.flatten()
    large = GaussianDiffusion(variance="fixed-large").p_mean_variance(x, x, t).log_variance.flatten()
    process = GaussianDiffusion()
    torch.testing.assert_close(small, process.posterior_log_variance_clipped[t])
    torch.testing.assert_close(large, torch.stack([process.posterior_variance[1], process.betas[500]]).log())


def test_a_respaced_process_counts_its_own_steps_and_feeds_the_network_the_originals():
    process = GaussianDiffusion().respaced("10")
    fed = []

    def denoise(x_t, t):
        fed.append(t)
        return torch.zeros(len(x_t), 6, 2, 2)

    t = torch.tensor([0, 4, 8, 9])
    x_start, noise = draws(*SHAPE, dtype=torch.float32), draws(*SHAPE, seed=1, dtype=torch.float32)
    process.training_losses(denoise, x_start, t, noise)
    assert torch.equal(fed[0], torch.tensor([0, 444, 888, 999]))
    whole = GaussianDiffusion().q_sample(x_start, fed[0], noise)
    torch.testing.assert_close(process.q_sample(x_start, t, noise), whole)


def test_half_precision_comes_in_and_float32_goes_out():
    half = [
        draws(*SHAPE, dtype=torch.float32).bfloat16(),
        torch.tensor([0, 1, 2, 3]),
        draws(*SHAPE, seed=1, dtype=torch.float32).bfloat16(),
    ]
    losses = GaussianDiffusion().training_losses(lambda x, _: torch.cat([x, x], 1).bfloat16(), *half)
    assert {values.dtype for values in losses.values()} == {torch.float32}


@pytest.mark.parametrize(("variance", "channels", "wanted"), [("learned-range", 3, 6), ("fixed-large", 6, 3)])
def test_a_network_with_other_channels_is_refused_in_one_sentence(variance, channels, wanted):
    process = GaussianDiffusion(variance=variance)
    with pytest.raises(
        ValueError, match=rf"the network gave \[4, {channels}, 2, 2\], but .* needs \[4, {wanted}, 2, 2\]"
    ):
        process.training_losses(
            lambda *_: torch.zeros(4, channels, 2, 2), draws(*SHAPE), torch.zeros(4, dtype=torch.long), draws(*SHAPE)
        )


def test_timesteps_are_uniform_over_the_process_and_follow_the_generator():
    process = GaussianDiffusion().respaced("10")
    t = process.draw_timesteps(5000, torch.Generator().manual_seed(0))
    assert torch.equal(t, process.draw_timesteps(5000, torch.Generator().manual_seed(0)))
    counts = t.bincount(minlength=10)
    assert len(counts) == 10
    assert (counts - 500).abs().max() < 5 * (5000 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize(
    "fields", [{}, {"schedule": "cosine", "prediction": "v", "variance": "fixed-small", "loss": "kl", "steps": 100}]
)
def test_json_gives_the_same_process_back(fields):
    process = GaussianDiffusion(**fields)
    assert process.to_json()["objective"] == "ddpm"
    assert make_process(process.to_json()) == process
    assert make_process(process.respaced("20").to_json()) == process.respaced("20")
