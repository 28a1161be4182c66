"""REG's class token: the right rows, the equation's loss, the latent's draws as ever, the same bits, and no trace without it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.checkpoint import read_checkpoint, read_stored
from pipeline.diffusion.process import make_process
from pipeline.dit import DiTConfig
from pipeline.dit.embeddings import joined, parted
from pipeline.features import FeatureStore
from pipeline.features.targets import TokenNormalization
from pipeline.latents import LatentStore
from pipeline.runtime.errors import UserError
from tests.pipeline.dit.test_model import lively, tiny
from tests.train.runs import (
    assert_close_histories,
    assert_same_run,
    history,
    launch,
    lines,
    make_store,
    read_batches,
    tensors,
    train,
)
from tests.train.test_alignment import add_features, features_of, tokens_of
from train.build import token_normalization
from train.data import BatchShard, DataOrder
from train.losses import LatentNormalization, draw, sample_losses, trained_loss
from train.options import DataOptions, RunOptions, TrainOptions
from train.summary import describe_work

DIM = 10
ON = ["--class-token"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return add_features(make_store(tmp_path_factory.mktemp("token") / "latents"), cls=DIM)


@pytest.mark.parametrize("objective", ["flow", "repa", "sit", "ddpm"])
def test_its_loss_is_that_of_the_process_at_the_latents_time_and_the_latents_draws_are_as_without(objective):
    process = make_process({"objective": objective})
    model = lively(tiny(class_token=DIM, learn_sigma=process.learns_variance))
    shard, shape = BatchShard(batch_size=4), (4, 8, 8)
    how = {"seed": 0, "dropout": 0.1, "device": "cpu"}
    draws = draw(process, 3, shard, shape, token=DIM, **how)
    plain = draw(process, 3, shard, shape, **how)
    assert all(
        torch.equal(getattr(draws, name), getattr(plain, name)) for name in ("t", "noise", "posterior", "dropped")
    )
    rows = draw(process, 3, BatchShard(batch_size=4, rank=1, processes=2), shape, token=DIM, **how)
    assert torch.equal(rows.token, draws.token[2:]) and torch.equal(draws.rows(slice(1, 3)).token, draws.token[1:3])

    stored, clean = torch.randn(4, *shape), torch.randn(4, DIM)
    labels = torch.tensor([0, 1, 2, 3])
    normalization = LatentNormalization(kind="point", scaling_factor=0.5, shift_factor=None)
    seen = []

    def remember(x, t, y, **options):
        seen.append((x, t, model(x, t, y, **options)))
        return seen[-1][2]

    arguments = (process, normalization, stored, labels, draws)
    losses = sample_losses(remember, *arguments, null_class=5, further_weights={"class_token": 0.03}, class_token=clean)
    ((state, _, made),) = seen  # one pass
    latent, token = parted(state, 4, DIM)
    torch.testing.assert_close(latent, process.q_sample(0.5 * stored, draws.t, draws.noise))
    said_latent, said = parted(made.final, 4, DIM)
    if objective == "ddpm":
        share = process.alphas_cumprod[draws.t].float()[:, None]
        torch.testing.assert_close(token, share.sqrt() * clean + (1 - share).sqrt() * draws.token)
        as_latent = process.training_losses(
            lambda _x, _t: said[:, :, None, None], clean[:, :, None, None], draws.t, draws.token[:, :, None, None]
        )
        torch.testing.assert_close(as_latent["mse"], (said[:, :DIM] - draws.token).square().mean(1))
        torch.testing.assert_close(losses["class_token"], as_latent["loss"])
    else:
        t, sign = draws.t[:, None], -1 if objective == "sit" else 1  # its networks give data - noise
        torch.testing.assert_close(token, (1 - t) * clean + t * draws.token)
        torch.testing.assert_close(losses["class_token"], (sign * said - (draws.token - clean)).square().mean(1))
        torch.testing.assert_close(
            losses["loss"], (sign * said_latent - (draws.noise - 0.5 * stored)).square().mean((1, 2, 3))
        )
    whole = trained_loss(losses, {"class_token": 0.03})
    torch.testing.assert_close(whole, losses["loss"].mean() + 0.03 * losses["class_token"].mean())
    alone = sample_losses(model, *arguments, null_class=5, class_token=clean)
    assert torch.equal(alone["loss"], losses["loss"]) and "class_token" not in alone


def test_a_batch_has_the_tokens_of_its_samples_in_the_views_of_their_latents_beside_features_or_alone(store):
    order, shard = DataOrder(50, 0), BatchShard(batch_size=8)
    with LatentStore(store) as latents:
        known, every, patches = tokens_of(store, dim=DIM).half(), latents[:][0], features_of(store).half()
        for columns in (["features", "cls"], ["cls"]):
            features = FeatureStore(store, latents.manifest)
            wanted = {"features": features, "features_until": 2, "columns": columns}
            reader = read_batches(latents, order, shard, prefetch=2, **wanted)
            with reader:
                for batch, number in zip(reader, range(4), strict=False):
                    assert (batch.features is None) == (number >= 2 or columns == ["cls"])
                    for row, index in enumerate(order.batch(number, shard)):
                        view = [torch.equal(batch.latents[row], every[index, view]) for view in (0, 1)].index(True)
                        assert torch.equal(batch.cls[row], known[index, view])
                        assert batch.features is None or torch.equal(batch.features[row], patches[index, view])


def test_tokens_are_fed_with_mean_0_and_deviation_1_and_what_does_not_vary_is_only_shifted(store):
    with LatentStore(store) as latents:
        features = FeatureStore(store, latents.manifest)
        normalization = TokenNormalization.measured(features)
        fed = normalization.of(features.gather(np.arange(50).repeat(2), np.tile([0, 1], 50))["cls"])
    torch.testing.assert_close(fed.mean(0), torch.zeros(DIM), atol=1e-5, rtol=0)
    torch.testing.assert_close(fed.std(0, correction=0), torch.ones(DIM))
    back = json.loads(json.dumps(normalization.to_json()))
    assert torch.equal(torch.tensor(back["mean"]), normalization.mean)
    assert torch.equal(torch.tensor(back["std"]), normalization.std)


@pytest.mark.parametrize("told", [{}, {"class_token": 6}, {"align_features": 6}])
def test_a_run_says_what_goes_along_with_the_latents_and_nothing_of_what_does_not(store, tmp_path, told):
    options = TrainOptions(data=DataOptions(latents=str(store)), run=RunOptions(out=str(tmp_path / "run")))
    config = DiTConfig.from_preset("DiT-Ti/2", input_size=8, **told)
    with LatentStore(store) as latents:
        said = describe_work(
            options, latents.manifest, config, SimpleNamespace(reason="CPU"), BatchShard(batch_size=8), DataOrder(50, 0)
        )
    words = {"class token": "6 numbers as one more token", "features": "6 numbers for a token after block"}
    found = {name: said[name].startswith(words[name]) for name in said.keys() & words}
    assert found == {name.replace("_", " ").removeprefix("align "): True for name in told}


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert train(store, folder / "plain", steps=2) == 0
    flags = ["--align-features", "--middle-head", "--objective", "flow", "--save-every", "2", "--keep-last", "0"]
    assert (
        train(store, folder / "token", *ON, *flags, "--validation-share", "0.1", "--validate-every", "2", steps=4) == 0
    )
    assert train(store, folder / "ddpm", *ON, steps=2) == 0
    return folder


def test_a_run_logs_it_apart_on_the_draws_of_a_run_without_it(runs):
    plain, token = lines(runs / "plain"), lines(runs / "ddpm")
    assert token[0].keys() - plain[0].keys() == {"loss_class_token"}
    assert token[0]["loss"] == plain[0]["loss"], "the first outputs are 0, so the first loss tells the draws"
    assert {"loss_class_token", "loss_middle", "loss_features"} <= lines(runs / "token")[0].keys()
    assert np.isfinite(lines(runs / "token")[-1]["validation_loss"])


def test_without_the_flag_a_checkpoint_does_not_name_it(runs):
    text = (runs / "plain" / "checkpoints" / "step-0000002" / "config.json").read_text()
    assert "class_token" not in text and not [name for name in tensors(runs / "plain", 2) if "class_" in name]


def test_the_checkpoint_records_its_width_and_how_it_is_fed_and_is_read_with_it(runs, store):
    checkpoint = read_checkpoint(runs / "token")
    assert checkpoint.config.class_token == DIM and checkpoint.config.align_features == 0
    with LatentStore(store) as latents:
        measured = TokenNormalization.measured(FeatureStore(store, latents.manifest))
    assert checkpoint.info["training"]["class_token"] == measured.to_json()
    assert checkpoint.info["training"]["encoder"]["name"] == "e"


def test_a_run_goes_on_to_the_same_bits_by_the_recorded_statistics(store, runs, tmp_path, monkeypatch):
    flags = ["--align-features", "--middle-head", "--objective", "flow", "--save-every", "2", "--keep-last", "0"]
    flags += ["--validation-share", "0.1", "--validate-every", "2"]
    assert train(store, tmp_path / "run", *ON, *flags, steps=2) == 0
    monkeypatch.setattr(TokenNormalization, "measured", None)
    assert train(store, tmp_path / "run", *ON, *flags, steps=4) == 0
    assert_same_run(tmp_path / "run", runs / "token", 4)


def test_a_checkpoint_that_does_not_say_how_its_token_is_fed_is_not_gone_on_from(runs, tmp_path):
    with pytest.raises(UserError, match="does not say how its 10 numbers of a class token are fed"):
        token_normalization(
            object(), tiny(class_token=10), runs / "plain/checkpoints/step-0000002", torch.device("cpu")
        )


def test_it_is_learned(store, tmp_path):
    flags = [*ON, "--objective", "flow", "--lr", "1e-3", "--class-token-weight", "1"]
    assert train(store, tmp_path / "run", *flags, steps=60) == 0
    losses = [line["loss_class_token"] for line in lines(tmp_path / "run")]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_as_one_does(store, tmp_path, sharding):
    flags = [*ON, "--align-features", "--objective", "flow"]
    assert train(store, tmp_path / "alone", *flags, steps=8) == 0
    result = launch(store, tmp_path / "both", *flags, "--grad-accumulation", "2", "--sharding", sharding, steps=8)
    assert result.returncode == 0, result.stderr
    assert_close_histories(history(tmp_path / "both"), history(tmp_path / "alone"))
    ours, theirs = ([line["loss_class_token"] for line in lines(tmp_path / name)] for name in ("both", "alone"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_store_whose_encoder_has_no_class_token_is_refused_by_name(tmp_path, capsys):
    bare = add_features(make_store(tmp_path / "latents"))
    assert train(bare, tmp_path / "run", *ON, steps=1) == 2
    error = capsys.readouterr().err
    assert "--class-token needs one stored" in error and "its encoder e has none" in error
    assert not (tmp_path / "run").exists()


def test_a_held_out_store_is_fed_as_the_training_store_and_one_of_another_encoder_is_refused(store, tmp_path, capsys):
    held_out = add_features(make_store(tmp_path / "held-out", seed=5), cls=DIM)
    flags = [*ON, "--validation", str(held_out), "--validate-every", "1"]
    assert train(store, tmp_path / "run", *flags, steps=1) == 0
    assert np.isfinite(lines(tmp_path / "run")[0]["validation_loss"])
    shutil.rmtree(held_out / "features")
    add_features(held_out, cls=DIM, sha256="1" * 64)
    assert train(store, tmp_path / "other", *flags, steps=1) == 2
    assert "cannot be validated on them" in capsys.readouterr().err


def test_weights_without_one_start_a_network_that_has_one(store, runs, tmp_path, capsys):
    assert train(store, tmp_path / "run", *ON, "--init-from", str(runs / "plain"), steps=1) == 0
    assert "class_embedder.weight" in capsys.readouterr().err
    assert read_stored(str(tmp_path / "run")).config.class_token == DIM
    assert joined(torch.zeros(1, 4, 8, 8), torch.zeros(1, DIM)).shape == (1, 5, 8, 8)
