import pytest
import torch

from pipeline.diffusion import GaussianDiffusion, RectifiedFlow, classifier_free_guidance
from pipeline.diffusion.guidance import OtherNetwork, guided
from pipeline.dit import DiT, DiTConfig
from pipeline.runtime.errors import UserError


class Counting:
    """A network that answers label + 10 · t / 1000 in every channel, and remembers the batches it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        return (y + t / 100)[:, None, None, None] * torch.ones(len(x), 8, *x.shape[2:], device=x.device)


X = torch.zeros(2, 4, 2, 2)
Y = torch.tensor([1, 2])
T = torch.tensor([500, 500])


def channels(output):
    return output[:, :, 0, 0]


def test_three_guided_channels_are_the_references(golden, golden_network, relative_error):
    denoise = classifier_free_guidance(golden_network, golden["cfg.y"][:2], scale=4.0, null_class=10, channels=3)
    assert relative_error(denoise(golden["cfg.x"][:2], golden["cfg.t"][:2]), golden["cfg.out"][:2]) < 1e-5


def test_guidance_extrapolates_all_latent_channels_and_leaves_the_variance_conditional():
    output = channels(classifier_free_guidance(Counting(), Y, scale=3.0, null_class=5)(X, T))
    for row, label in enumerate((1, 2)):
        assert output[row, :4].eq(5 + 5 + 3.0 * (label - 5)).all()
        assert output[row, 4:].eq(label + 5).all()


def test_of_a_latent_with_fewer_channels_than_are_guided_the_variance_stays_conditional():
    x = torch.zeros(2, 2, 2, 2)
    model = lambda x, t, y: (y + t / 100)[:, None, None, None] * torch.ones(len(x), 4, *x.shape[2:])  # noqa: E731
    output = channels(classifier_free_guidance(model, Y, scale=3.0, null_class=5, channels=3)(x, T))
    for row, label in enumerate((1, 2)):
        assert output[row, :2].eq(5 + 5 + 3.0 * (label - 5)).all()
        assert output[row, 2:].eq(label + 5).all()


def test_scale_1_costs_one_pass_and_another_scale_one_doubled_pass():
    model = Counting()
    classifier_free_guidance(model, Y, scale=1.0, null_class=5)(X, T)
    assert model.batches == [2]
    classifier_free_guidance(model, Y, scale=2.0, null_class=5)(X, T)
    assert model.batches == [2, 4]


def test_scale_0_is_the_unconditional_network():
    assert channels(classifier_free_guidance(Counting(), Y, scale=0.0, null_class=5)(X, T))[:, :4].eq(10).all()


@pytest.mark.parametrize(("t", "inside"), [(100, False), (300, True), (500, True), (700, True), (701, False)])
def test_outside_the_interval_guidance_rests_and_costs_one_pass(t, inside):
    model = Counting()
    output = classifier_free_guidance(model, Y, scale=3.0, null_class=5, interval=(0.3, 0.7))(X, torch.tensor([t, t]))
    assert model.batches == [4 if inside else 2]
    assert torch.equal(channels(output)[:, 4], Y + torch.tensor(t) / 100)
    assert channels(output)[0, 0].eq(1 + t / 100) == (not inside)


@pytest.mark.parametrize(("step", "passes"), [(500, 4), (900, 2)])
def test_on_a_device_nobody_waits_to_read_whether_a_step_is_inside_the_interval(step, passes):
    x = X.to("meta")  # whose values cannot be read at all
    for process, at in ((GaussianDiffusion(), step), (RectifiedFlow(), step / 1000)):
        model = Counting()
        denoise = classifier_free_guidance(model, Y.to("meta"), scale=3.0, null_class=5, interval=(0.3, 0.7))
        denoise(x, process.network_timesteps(process.timesteps(at, x)))
        assert model.batches == [passes]


def test_in_a_mixed_batch_each_sample_is_guided_by_its_own_time():
    output = channels(
        classifier_free_guidance(Counting(), Y, scale=3.0, null_class=5, interval=(0.3, 0.7))(
            X, torch.tensor([500, 900])
        )
    )
    assert output[0, 0] == 5 + 5 + 3.0 * (1 - 5)
    assert output[1, 0] == 2 + 9


def test_the_interval_follows_a_process_of_another_length():
    model = Counting()
    classifier_free_guidance(model, Y, scale=3.0, null_class=5, interval=(0.3, 0.7), time_scale=100.0)(
        X, torch.tensor([50, 50])
    )
    assert model.batches == [4]


def test_outputs_in_half_precision_are_mixed_in_float32():
    output = classifier_free_guidance(lambda x, t, y: Counting()(x, t, y).bfloat16(), Y, scale=3.0, null_class=5)(X, T)
    assert output.dtype == torch.float32


def test_an_unconditional_network_refuses_guidance_and_runs_without():
    model = DiT(DiTConfig(input_size=2, hidden_size=8, depth=1, num_heads=1, num_classes=0))
    with pytest.raises(
        UserError, match=r"guidance 4.0 needs classes, but this network is unconditional; use --guidance 1"
    ):
        classifier_free_guidance(model, None, scale=4.0, null_class=0)
    with pytest.raises(UserError, match="unconditional"):
        classifier_free_guidance(model, torch.zeros(2, dtype=torch.long), scale=4.0, null_class=0)
    assert classifier_free_guidance(model, None, scale=1.0)(X, T).shape == (2, 8, 2, 2)


def test_a_network_without_a_null_class_refuses_guidance():
    model = DiT(DiTConfig(input_size=2, hidden_size=8, depth=1, num_heads=1, num_classes=3, class_dropout_prob=0.0))
    with pytest.raises(UserError, match="needs a null class, but this network was trained without label dropout"):
        classifier_free_guidance(model, Y, scale=2.0, null_class=3)
    with pytest.raises(UserError, match="needs a null class"):
        classifier_free_guidance(Counting(), Y, scale=2.0, null_class=None)


@pytest.mark.parametrize("interval", [(0.7, 0.3), (-0.1, 0.5), (0.0, 1.1)])
def test_an_interval_that_does_not_rise_within_0_and_1_is_refused(interval):
    with pytest.raises(UserError, match="the guidance interval is"):
        classifier_free_guidance(Counting(), Y, scale=2.0, null_class=5, interval=interval)


def predicting(value, batches=None):
    """A network whose answer is the value plus the label in every channel, variance channels too."""

    def model(x, t, y):
        if batches is not None:
            batches.append(len(x))
        return (value + y)[:, None, None, None] * torch.ones(len(x), 8, *x.shape[2:])

    return model


def test_another_network_guides_by_the_same_class_and_costs_one_pass_of_each():
    ours, its = [], []
    denoise = guided(OtherNetwork(predicting(10.0, ours), Y, predicting(4.0, its)), scale=3.0, channels=3)
    output = channels(denoise(X, T))
    for row, label in enumerate((1, 2)):
        assert output[row, :3].eq(4 + label + 3.0 * (10 - 4)).all()
        assert output[row, 3:].eq(10 + label).all()  # an unguided channel, and the variance
    assert (ours, its) == ([2], [2])


def test_guidance_by_another_network_at_scale_1_or_outside_the_interval_never_asks_it():
    its = []
    source = OtherNetwork(predicting(10.0), Y, predicting(4.0, its))
    plain = predicting(10.0)(X, T, Y)
    assert torch.equal(guided(source)(X, T), plain)
    assert torch.equal(guided(source, scale=3.0, interval=(0.6, 1.0))(X, T), plain)
    assert not its


@pytest.mark.parametrize("scale", [0.0, 1.7, 25.0])
def test_a_network_guided_by_itself_is_the_plain_network_bit_for_bit(golden, golden_network, scale):
    x, t, y = golden["cfg.x"][:2], golden["cfg.t"][:2], golden["cfg.y"][:2]
    denoise = guided(OtherNetwork(golden_network, y, golden_network), scale=scale)
    assert torch.equal(denoise(x, t), golden_network(x, t, y))


def test_unconditional_networks_can_guide_each_other():
    model = DiT(DiTConfig(input_size=2, hidden_size=8, depth=1, num_heads=1, num_classes=0))
    assert guided(OtherNetwork(model, None, model), scale=2.0)(X, T).shape == (2, 8, 2, 2)
