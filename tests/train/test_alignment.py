"""Alignment with stored features: the right rows and views, the right loss, the same bits, and nothing without the flag."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from pipeline.checkpoint import read_checkpoint
from pipeline.diffusion.process import make_process
from pipeline.dit import DiT, DiTConfig
from pipeline.features import Columns, FeatureStore
from pipeline.features.manifest import Encoder, FeatureManifest
from pipeline.features.pca import Covariance, write_projection
from pipeline.features.targets import FeatureTargets, resampled
from pipeline.features.writer import FeatureRows, entries_of, finish_features, write_shard
from pipeline.latents import LatentStore
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
from train.data import BatchShard, DataOrder
from train.loop import Trainer
from train.losses import LatentNormalization, draw, sample_losses

WIDTH, GRID = 6, (3, 3)
ON = ["--align-features"]


def features_of(store, *, seed=1):
    """[N, V, T, D] that depend on each sample's latent, so that there is something to learn."""
    with LatentStore(store) as latents:
        means = latents[:][0].float().flatten(3).mean(3)[:, :, :4]
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, GRID[0] * GRID[1] * WIDTH, generator=draws)
    return (means @ mix).tanh().unflatten(2, (-1, WIDTH)) + 0.1


def tokens_of(store, *, dim, seed=1):
    """[N, V, D] that depend on each sample's latent, each number of another size."""
    mixed = features_of(store, seed=seed).flatten(2)[..., :dim]
    return 3.0 + mixed * torch.arange(1.0, dim + 1)


def add_features(store, *, dim=None, seed=1, cls=0, sha256="0" * 64):
    """Put features beside a store, as dit-extract would."""
    with LatentStore(store) as latents:
        manifest, indices = latents.manifest, latents.indices().numpy()
    values, pca, folder = features_of(store, seed=seed), None, store / "features"
    folder.mkdir()
    if dim is not None:
        sums = Covariance(WIDTH)
        sums.add(values[:, 0].reshape(-1, WIDTH))
        projection, variances = sums.principal(dim)
        pca = write_projection(folder, projection, variances, images=len(values))
        values = projection.forth(values)
    columns = Columns(views=len(manifest.views), tokens=GRID[0] * GRID[1], dim=dim or WIDTH, cls=cls)
    values = torch.cat([values.flatten(2), tokens_of(store, dim=cls, seed=seed)], dim=2)
    records, first = [], 0
    for number, shard in enumerate(manifest.shards):
        part = slice(first, first + shard.samples)
        rows = FeatureRows(
            columns=columns,
            values=values[part].half(),
            indices=indices[part],
            keys=[f"{k}.png" for k in range(part.start, part.stop)],
        )
        records.append(write_shard(folder, "train", number, rows, plan="features"))
        first = part.stop
    encoder = Encoder(
        name="e",
        class_name="E",
        sha256=sha256,
        resolution=6,
        grid=GRID,
        width=WIDTH,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    finish_features(
        folder,
        FeatureManifest(
            split="train",
            views=tuple(manifest.views),
            encoder=encoder,
            columns=columns,
            pca=pca,
            plan=manifest.get("plan", ""),
            extraction={},
            shards=entries_of(records),
        ),
    )
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return add_features(make_store(tmp_path_factory.mktemp("aligned") / "latents"))


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    return add_features(make_store(tmp_path_factory.mktemp("reduced") / "latents"), dim=4)


@pytest.mark.parametrize("until", [None, 3])
def test_a_batch_has_the_features_of_its_samples_in_the_views_of_their_latents(store, until):
    with LatentStore(store) as latents:
        features = FeatureStore(store, latents.manifest)
        order, shard = DataOrder(50, 0), BatchShard(batch_size=8, rank=1, processes=2)
        reader = read_batches(latents, order, shard, prefetch=3, features=features, features_until=until)
        known, every = features_of(store).half(), latents[:][0]
        with reader:
            for batch, number in zip(reader, range(6), strict=False):
                if until is not None and number >= until:
                    assert batch.features is None
                    continue
                for row, index in enumerate(order.batch(number, shard)):
                    view = [torch.equal(batch.latents[row], every[index, view]) for view in (0, 1)].index(True)
                    assert torch.equal(batch.features[row], known[index, view])


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(("name", "column"), [("features", "features"), ("class_token", "cls")])
def test_a_step_has_targets_only_where_they_are_asked_for_and_its_batch_has_them(asked, there, name, column):
    trainer = SimpleNamespace(**{name: SimpleNamespace(of=lambda rows: 2 * rows) if asked else None})
    batch = SimpleNamespace(**{column: torch.arange(6.0) if there else None})
    found = getattr(Trainer, f"{name}_of")(trainer, batch, slice(2, 4))
    assert (found is not None) == (asked and there)
    assert found is None or found.tolist() == [4.0, 6.0]


def test_the_loss_is_the_mean_of_minus_the_cosine_and_0_with_no_gradient_without_targets():
    process = make_process({"objective": "flow"})
    config = DiTConfig.from_preset("DiT-Ti/2", input_size=8, num_classes=4, learn_sigma=False, align_features=WIDTH)
    model = DiT(config)
    draws = draw(process, 3, BatchShard(batch_size=4), (4, 8, 8), seed=0, dropout=0.1, device="cpu")
    stored, labels = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    targets = torch.randn(4, 16, WIDTH, generator=torch.Generator().manual_seed(1))
    normalization = LatentNormalization(kind="point", scaling_factor=0.5, shift_factor=None)
    seen = []

    def remember(*arguments, **options):
        seen.append(model(*arguments, **options))
        return seen[-1]

    arguments = (remember, process, normalization, stored, labels, draws)
    losses = sample_losses(*arguments, null_class=4, further_weights={"features": 0.5}, features=targets)
    unit = functional.normalize(seen[0].features, dim=-1), functional.normalize(targets, dim=-1)
    torch.testing.assert_close(losses["features"], -(unit[0] * unit[1]).sum(-1).mean(1))
    without = sample_losses(*arguments, null_class=4, further_weights={"features": 0.5})
    assert torch.equal(without["loss"], losses["loss"]) and without["features"].tolist() == [0.0] * 4
    (0.5 * without["features"]).mean().backward()
    assert all(not parameter.grad.any() for parameter in model.projector.parameters())


def test_targets_on_another_grid_cover_the_same_image():
    patches = torch.arange(4.0).reshape(1, 4, 1)
    assert torch.equal(resampled(patches, (2, 2), (2, 2)), patches)
    finer = resampled(patches, (2, 2), (4, 4)).reshape(4, 4)
    assert finer[0, 0] == 0 and finer[3, 3] == 3 and finer[0, 3] == 1 and finer[3, 0] == 2
    torch.testing.assert_close(resampled(torch.full((1, 64, 3), 2.5), (8, 8), (3, 5)), torch.full((1, 15, 3), 2.5))
    coarser = resampled(torch.eye(16).reshape(1, 16, 16), (4, 4), (2, 2))
    torch.testing.assert_close(coarser.sum(-1), torch.ones(1, 4))


def test_reduced_features_are_given_back_in_the_encoders_width(reduced):
    with LatentStore(reduced) as latents:
        features = FeatureStore(reduced, latents.manifest)
        targets = FeatureTargets.on(torch.device("cpu"), features, (4, 4))
        got = targets.of(features.gather(np.arange(50))["features"])
        whole = resampled(features_of(reduced)[:, 0], GRID, (4, 4))
    assert got.shape == (50, 16, WIDTH) and got.dtype == torch.float32
    assert functional.cosine_similarity(got, whole, dim=-1).mean() > 0.9


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert train(store, folder / "plain", steps=2) == 0
    assert train(store, folder / "aligned", *ON, "--save-every", "2", "--keep-last", "0", steps=4) == 0
    assert train(store, folder / "weightless", *ON, "--features-weight", "0", steps=2) == 0
    return folder


def test_a_run_logs_it_apart_and_a_weight_of_0_trains_as_without(runs):
    plain, aligned, weightless = (lines(runs / name) for name in ("plain", "aligned", "weightless"))
    assert aligned[0].keys() - plain[0].keys() == {"loss_features"}
    assert aligned[0]["loss"] == plain[0]["loss"] and aligned[1]["loss"] != plain[1]["loss"]
    ours, theirs = tensors(runs / "weightless", 2), tensors(runs / "plain", 2)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert [line["loss"] for line in weightless] == [line["loss"] for line in plain]


def test_without_the_flag_a_checkpoint_is_as_ever_though_features_lie_beside_the_store(runs):
    text = (runs / "plain" / "checkpoints" / "step-0000002" / "config.json").read_text()
    assert "features" not in text and '"encoder"' not in text
    assert not [name for name in tensors(runs / "plain", 2) if "projector" in name]


def test_a_run_goes_on_to_the_same_bits(store, runs, tmp_path):
    assert train(store, tmp_path / "run", *ON, steps=2) == 0
    assert train(store, tmp_path / "run", *ON, "--keep-last", "0", steps=4) == 0
    assert_same_run(tmp_path / "run", runs / "aligned", 4)


def test_a_checkpoint_is_read_without_the_projector_and_remembers_the_encoder(runs):
    checkpoint = read_checkpoint(runs / "aligned")
    assert checkpoint.config.align_features == 0 and checkpoint.info["training"]["encoder"]["width"] == WIDTH
    assert not [name for name in checkpoint.model.state_dict() if name.startswith("projector")]
    recorded = json.loads((runs / "aligned" / "checkpoints" / "step-0000004" / "config.json").read_text())["model"]
    assert recorded["align_features"] == WIDTH


def test_it_is_learned(store, tmp_path):
    assert train(store, tmp_path / "run", *ON, "--lr", "1e-3", steps=60) == 0
    losses = [line["loss_features"] for line in lines(tmp_path / "run")]
    assert np.mean(losses[-5:]) < losses[0] - 0.3


def test_it_ends_at_the_step_and_from_there_no_features_are_read(store, tmp_path, monkeypatch):
    read, gather = [], FeatureStore.gather
    monkeypatch.setattr(FeatureStore, "gather", lambda *a, **k: read.append(1) or gather(*a, **k))
    assert train(store, tmp_path / "run", *ON, "--features-until", "2", steps=4) == 0
    losses = [line["loss_features"] for line in lines(tmp_path / "run")]
    assert len(read) == 2 and losses[:2] != [0, 0] and losses[2:] == [0, 0]
    assert train(store, tmp_path / "again", *ON, "--features-until", "2", steps=3) == 0
    assert train(store, tmp_path / "again", *ON, "--features-until", "2", steps=4) == 0
    assert_same_run(tmp_path / "again", tmp_path / "run", 4)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_as_one_does(store, tmp_path, sharding):
    flags = [*ON, "--features-until", "6"]
    assert train(store, tmp_path / "alone", *flags, steps=8) == 0
    result = launch(store, tmp_path / "both", *flags, "--grad-accumulation", "2", "--sharding", sharding, steps=8)
    assert result.returncode == 0, result.stderr
    assert_close_histories(history(tmp_path / "both"), history(tmp_path / "alone"))


def test_other_features_than_those_of_the_run_are_refused(store, runs, tmp_path, capsys):
    changed = shutil.copytree(store, tmp_path / "store")
    shutil.rmtree(changed / "features")
    add_features(changed, seed=2)
    run = shutil.copytree(runs / "aligned", tmp_path / "run")
    assert train(changed, run, *ON, "--save-every", "2", "--keep-last", "0", steps=6) == 2
    assert "other data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "flags", "sentence"),
    [
        (shutil.rmtree, [], "has no features"),
        (lambda folder: (folder / "train-00001.safetensors").write_bytes(b"x"), [], "is cut off"),
        (lambda folder: (folder / "train-00001.json").unlink(), ["--verify-data"], "train-00001.json is missing"),
    ],
)
def test_features_that_are_not_there_or_damaged_are_refused_before_anything_is_made(
    store, tmp_path, capsys, spoil, flags, sentence
):
    broken = shutil.copytree(store, tmp_path / "store")
    spoil(broken / "features")
    assert train(broken, tmp_path / "run", *ON, *flags, steps=1) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_end_without_a_beginning_is_refused(store, tmp_path, capsys):
    assert train(store, tmp_path / "run", "--features-until", "2", steps=1) == 2
    assert "--features-until is for --align-features" in capsys.readouterr().err


def test_a_power_average_of_an_aligned_run_is_read_without_the_projector(store, tmp_path):
    from pipeline.checkpoint import read_stored

    assert train(store, tmp_path / "run", *ON, "--ema-sigma", "0.1", "--save-every", "2", steps=2) == 0
    stored = read_stored(str(tmp_path / "run"), weights="sigma=0.1")
    assert not [name for name in stored.state if name.startswith("projector")]
    assert [name for name in load_file(next((tmp_path / "run" / "averages").glob("*.safetensors"))) if "blocks" in name]
