import pytest
import torch

from pipeline.diffusion import GaussianDiffusion, RectifiedFlow
from train.data import BatchShard
from train.losses import LatentNormalization, LossSums, clean_latents, draw, sample_losses

SHAPE = (4, 8, 8)
KEYED = {"seed": 3, "dropout": 0.3, "device": "cpu"}


def normalization(**changes):
    return LatentNormalization(**({"kind": "moments", "scaling_factor": 0.5, "shift_factor": 0.25} | changes))


def fields(draws):
    return [draws.t, draws.noise, draws.posterior, draws.dropped]


@pytest.mark.parametrize("process", [GaussianDiffusion(), RectifiedFlow()], ids=["ddpm", "flow"])
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 1), (2, 3), (4, 1)])
def test_draws_are_the_same_for_any_processes_and_accumulation(process, processes, accumulation):
    whole = draw(process, 17, BatchShard(batch_size=12), SHAPE, **KEYED)
    pieces = []
    for rank in range(processes):
        shard = BatchShard(batch_size=12, rank=rank, processes=processes, accumulation=accumulation)
        mine = draw(process, 17, shard, SHAPE, **KEYED)
        pieces += [fields(mine.rows(shard.micro_rows(part))) for part in range(accumulation)]
    for expected, found in zip(fields(whole), zip(*pieces, strict=True), strict=True):
        assert torch.equal(torch.cat(found), expected)


def test_of_the_global_batchs_draws_a_process_keeps_the_memory_of_its_rows_alone():
    draws = draw(GaussianDiffusion(), 0, BatchShard(batch_size=12, rank=1, processes=4), SHAPE, **KEYED)
    for kept in fields(draws):
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_every_step_and_every_purpose_draws_its_own():
    process, shard = GaussianDiffusion(), BatchShard(batch_size=64)
    one, other = (draw(process, number, shard, SHAPE, **KEYED) for number in (0, 1))
    assert all(not torch.equal(a, b) for a, b in zip(fields(one), fields(other), strict=True))
    assert not torch.equal(one.noise, one.posterior)


def test_draws_have_the_laws_they_should():
    draws = draw(GaussianDiffusion(), 0, BatchShard(batch_size=4000), (1, 2, 2), **KEYED)
    assert draws.t.min() == 0 and draws.t.max() == 999 and abs(draws.t.double().mean() - 499.5) < 15
    assert abs(draws.dropped.double().mean() - 0.3) < 0.03
    for normal in (draws.noise, draws.posterior):
        assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.02


def test_what_the_network_sees_is_a_fresh_draw_of_the_posterior_shifted_and_scaled():
    generator = torch.Generator().manual_seed(0)
    moments, noise = torch.randn(2, 8, 3, 3, generator=generator).half(), torch.randn(2, 4, 3, 3, generator=generator)
    mean, log_variance = moments.float().chunk(2, dim=1)
    expected = (mean + (log_variance / 2).exp() * noise - 0.25) * 0.5
    torch.testing.assert_close(clean_latents(moments, normalization(), noise), expected)
    per_channel = normalization(scaling_factor=torch.full((4,), 0.5), shift_factor=torch.full((4,), 0.25))
    torch.testing.assert_close(clean_latents(moments, per_channel, noise), expected)
    point = clean_latents(moments[:, :4], normalization(kind="point"), noise)
    torch.testing.assert_close(point, (mean - 0.25) * 0.5)


def test_dropped_and_unlabelled_samples_get_the_null_class():
    seen = []

    def model(x, t, y):
        seen.append(y)
        return torch.zeros(len(x), 8, *x.shape[2:])

    process, labels = GaussianDiffusion(), torch.tensor([4, -1, 6, 7])
    draws = draw(process, 0, BatchShard(batch_size=4), SHAPE, **KEYED)
    draws.dropped[:] = torch.tensor([False, False, True, False])
    losses = sample_losses(model, process, normalization(), torch.zeros(4, 8, 8, 8), labels, draws, null_class=10)
    assert seen[0].tolist() == [4, 10, 10, 7]
    assert {name: values.shape for name, values in losses.items()} == dict.fromkeys(("loss", "mse", "vb"), (4,))


def test_loss_sums_are_the_batch_means_whole_and_by_quarter():
    sums = LossSums(torch.device("cpu"))
    loss, time = torch.arange(6.0), torch.tensor([0.0, 0.1, 0.25, 0.3, 0.999, 1.0])
    for rows in (slice(0, 4), slice(4, 6)):
        sums.add({"loss": loss[rows], "mse": 2 * loss[rows], "vb": 3 * loss[rows]}, time[rows])
    means = sums.means(sums.values.tolist())
    assert (means["loss"], means["mse"], means["vb"]) == (2.5, 5.0, 7.5)
    assert [means[f"loss_q{k}"] for k in range(4)] == [0.5, 2.5, None, 4.5]
