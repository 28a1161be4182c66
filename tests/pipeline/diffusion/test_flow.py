import pytest
import torch

from pipeline.diffusion import RectifiedFlow, make_process

SHAPE = (3, 2, 2, 2)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_time_runs_from_data_at_0_to_noise_at_1():
    flow = RectifiedFlow()
    x_start, noise = draws(*SHAPE), draws(*SHAPE, seed=1)
    x_t = flow.q_sample(x_start, torch.tensor([0.0, 1.0, 0.25]), noise)
    assert torch.equal(x_t[0], x_start[0])
    assert torch.equal(x_t[1], noise[1])
    torch.testing.assert_close(x_t[2], 0.75 * x_start[2] + 0.25 * noise[2])


def test_the_network_is_fed_1000_t_and_its_target_is_noise_minus_data():
    flow = RectifiedFlow()
    x_start, noise, t = draws(*SHAPE), draws(*SHAPE, seed=1), torch.tensor([0.0, 0.5, 1.0])
    fed = []

    def denoise(x_t, network_t):
        fed.append((x_t, network_t))
        return noise - x_start + 2.0

    losses = flow.training_losses(denoise, x_start, t, noise)
    torch.testing.assert_close(fed[0][1], torch.tensor([0.0, 500.0, 1000.0]))
    torch.testing.assert_close(losses["loss"], torch.full((3,), 4.0))
    assert torch.equal(losses["mse"], losses["loss"])
    assert torch.equal(losses["vb"], torch.zeros(3))


def test_following_the_velocity_to_time_0_finds_the_data():
    flow = RectifiedFlow()
    x_start, noise, t = draws(*SHAPE), draws(*SHAPE, seed=1), torch.tensor([0.1, 0.5, 1.0])
    found = flow.predict_x_start(noise - x_start, flow.q_sample(x_start, t, noise), t)
    torch.testing.assert_close(found, x_start)


def test_times_are_logit_normal_or_uniform_and_follow_the_generator():
    t = RectifiedFlow().draw_timesteps(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(t, RectifiedFlow().draw_timesteps(20_000, torch.Generator().manual_seed(0)))
    assert ((t > 0) & (t < 1)).all()
    error = 5 / 20_000**0.5
    assert abs(t.logit().mean()) < error
    assert abs(t.logit().std() - 1) < error
    uniform = RectifiedFlow(timestep_law="uniform").draw_timesteps(20_000, torch.Generator().manual_seed(0))
    assert abs(uniform.mean() - 0.5) < error
    assert abs(uniform.var() - 1 / 12) < error


def test_a_network_with_variance_channels_is_refused():
    with pytest.raises(ValueError, match=r"the network gave \[3, 4, 2, 2\], but .* needs \[3, 2, 2, 2\]"):
        RectifiedFlow().training_losses(lambda x, _: torch.cat([x, x], 1), draws(*SHAPE), torch.rand(3), draws(*SHAPE))


@pytest.mark.parametrize("law", ["logit-normal", "uniform"])
def test_json_gives_the_same_flow_back(law):
    flow = RectifiedFlow(timestep_law=law)
    assert flow.to_json() == {"objective": "flow", "timestep_law": law}
    assert make_process(flow.to_json()) == flow
