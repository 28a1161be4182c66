import math

import pytest
import torch

from pipeline.diffusion import RectifiedFlow, make_process
from pipeline.diffusion.flow import shift_for

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


@pytest.mark.parametrize("settings", [{"prediction": "x0"}, {"time_mean": -0.4, "time_std": 0.8, "time_shift": 2.0}])
def test_newer_settings_are_in_the_json_only_where_they_are_not_the_default(settings):
    flow = RectifiedFlow(**settings)
    assert flow.to_json() == {"objective": "flow", "timestep_law": "logit-normal", **settings}
    assert make_process(flow.to_json()) == flow


def test_a_whole_number_is_a_number_for_a_setting():
    assert make_process({"objective": "flow", "time_shift": 2}) == RectifiedFlow(time_shift=2.0)


def test_a_flow_that_recorded_epsilon_predicts_the_velocity():
    assert make_process({"objective": "flow", "prediction": "epsilon"}) == RectifiedFlow()


def test_the_network_that_knows_the_data_gives_the_velocity_and_no_loss_at_any_time():
    x_start, noise, t = draws(4, 2, 2, 2), draws(4, 2, 2, 2, seed=1), torch.tensor([0.01, 0.05, 0.5, 1.0])
    flow = RectifiedFlow(prediction="x0")
    x_t = flow.q_sample(x_start, t, noise)
    velocity = flow.velocity(lambda *_: x_start, x_t, t)
    torch.testing.assert_close(velocity, RectifiedFlow().target(x_start, t, noise), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flow.predict_x_start(velocity, x_t, t), x_start)
    assert torch.equal(flow.training_losses(lambda *_: x_start, x_start, t, noise)["loss"], torch.zeros(4))


def test_the_loss_of_a_predicted_x_0_is_the_velocitys_with_one_clamp_on_both_sides():
    """So it is as large as the loss of the network that gives the same velocity itself, from t = 0.05 on."""
    x_start, noise, t = draws(4, 2, 2, 2), draws(4, 2, 2, 2, seed=1), torch.tensor([0.01, 0.05, 0.5, 1.0])
    off = draws(4, 2, 2, 2, seed=2)
    flow = RectifiedFlow(prediction="x0")
    losses = flow.training_losses(lambda *_: x_start + off, x_start, t, noise)
    torch.testing.assert_close(losses["loss"], (off / t.clamp(min=0.05)[:, None, None, None]).square().mean((1, 2, 3)))
    x_t = flow.q_sample(x_start, t, noise)
    same = RectifiedFlow().training_losses(
        lambda *_: flow.velocity(lambda *_: x_start + off, x_t, t), x_start, t, noise
    )
    torch.testing.assert_close(losses["mse"][1:], same["mse"][1:])


def times(**settings):
    return RectifiedFlow(**settings).draw_timesteps(20_000, torch.Generator().manual_seed(0))


def test_a_law_has_its_mean_and_width_and_a_shift_is_the_mean_moved_by_its_logarithm():
    torch.testing.assert_close(times(time_mean=0.8, time_std=0.5).logit(), 0.8 + 0.5 * times().logit())
    shifted, moved = (
        times(time_mean=0.3, time_std=0.8, time_shift=3.0),
        times(time_mean=0.3 + math.log(3), time_std=0.8),
    )
    torch.testing.assert_close(shifted, moved)
    assert torch.equal(times(time_shift=1.0), times())


def test_a_shift_keeps_both_ends_and_a_samplers_steps_stand_where_training_would_shift_equal_ones():
    flow = RectifiedFlow(time_shift=3.0)
    assert (flow.shifted(0.0), flow.shifted(1.0), flow.shifted(0.5)) == (0, 1, 0.75)
    steps = flow.steps_back(4)
    assert [at for at, _ in steps] == pytest.approx([1, 0.9, 0.75, 0.5])
    assert [at - 1 / per_unit for at, per_unit in steps] == pytest.approx([0.9, 0.75, 0.5, 0])
    assert RectifiedFlow().steps_back(49) == [(1 - k / 49, 49.0) for k in range(49)]


def test_the_shift_of_a_latent_grows_with_its_numbers_and_is_never_below_1():
    assert [shift_for(4, 32, 32), shift_for(4, 64, 64), shift_for(4, 8, 8)] == [1, 2, 1]
    assert shift_for(768, 16, 16) == pytest.approx(6.93, abs=0.01)
