"""The middle head and the alignment to the clean latent: one pass, no draw, no trace where they are off."""

import json

import pytest
import torch
from torch.nn import functional

from pipeline.checkpoint import read_checkpoint
from pipeline.diffusion import make_process
from pipeline.dit import DiT
from tests.pipeline.dit.test_model import inputs, lively, tiny
from tests.train.runs import history, lines, tensors, train
from train.data import BatchShard
from train.losses import LatentNormalization, draw, sample_losses, trained_loss

BOTH = {"middle_head": True, "align_latent": True}


def test_the_rest_of_the_network_starts_and_computes_as_without_them():
    plain, both = DiT(tiny(depth=3)), DiT(tiny(depth=3, **BOTH))
    own = [name for name in both.state_dict() if name.startswith(("middle_layer.", "aligner."))]
    assert own == [name for name in both.state_dict() if name not in plain.state_dict()]
    assert all(torch.equal(tensor, both.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert torch.equal(both.middle_layer.linear.weight, torch.zeros(32, 32)), "the middle head starts at 0"
    both = lively(tiny(depth=3, **BOTH))
    plain.load_state_dict({name: tensor for name, tensor in both.state_dict().items() if name not in own})
    with torch.no_grad():
        assert torch.equal(plain(*inputs(plain.config)), both(*inputs(plain.config)))
        assert torch.equal(plain(*inputs(plain.config)), both.forward_with_middle(*inputs(plain.config))[0])


@pytest.mark.parametrize(("depth", "blocks"), [(28, 8), (12, 4), (6, 2), (1, 1)])
def test_the_middle_lies_after_three_tenths_of_the_blocks(depth, blocks):
    assert tiny(depth=depth).middle_block == blocks


@pytest.mark.parametrize("conditioning", ["adaln-zero", "in-context"])
def test_the_middle_heads_output_is_that_of_a_network_that_ends_there(conditioning):
    whole = lively(tiny(depth=6, conditioning=conditioning, **BOTH))
    short = DiT(tiny(depth=2, conditioning=conditioning))
    for name in short.state_dict():
        source = name.replace("final_layer", "middle_layer")
        short.state_dict()[name].copy_(whole.state_dict()[source])
    with torch.no_grad():
        assert torch.equal(whole.forward_with_middle(*inputs(whole.config))[1], short(*inputs(whole.config)))
    with pytest.raises(ValueError, match="this network has no middle head"):
        short.forward_with_middle(*inputs(short.config))


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_the_losses_are_the_networks_own_the_same_of_the_middle_and_smooth_l1_to_the_clean_latent(objective):
    process = make_process({"objective": objective})
    model = lively(tiny(learn_sigma=process.learns_variance, **BOTH))
    normalization = LatentNormalization(kind="point", scaling_factor=0.5, shift_factor=None)
    shard = BatchShard(batch_size=4, accumulation=1)
    draws = draw(process, 3, shard, (4, 8, 8), seed=0, dropout=0.1, device="cpu")
    stored, labels = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return model(*arguments, **options)

    weights = {"middle": 0.5, "align": 2.0}
    arguments = (process, normalization, stored, labels, draws)
    with torch.no_grad():
        plain = sample_losses(model, *arguments, null_class=5)
        both = sample_losses(counted, *arguments, null_class=5, further_weights=weights)
        middle = sample_losses(lambda x, t, y: model.forward_with_middle(x, t, y)[1], *arguments, null_class=5)
        assert calls == [{"middle": True}], "one forward pass"
        assert all(torch.equal(plain[name], both[name]) for name in plain)
        assert torch.equal(both["middle"], middle["loss"])

        def aligned(x, t, y):
            latent = model(x, t, y, middle=True).aligned
            wanted.append(functional.smooth_l1_loss(latent, stored * 0.5, reduction="none", beta=0.05).mean((1, 2, 3)))
            return model(x, t, y)

        wanted = []
        sample_losses(aligned, *arguments, null_class=5)
        torch.testing.assert_close(both["align"], wanted[0])
    total = trained_loss(both, weights)
    torch.testing.assert_close(total, (both["loss"] + 0.5 * both["middle"] + 2 * both["align"]).mean())
    assert torch.equal(trained_loss(plain, {}), plain["loss"].mean())


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert train(store, folder / "plain", steps=2) == 0
    assert train(store, folder / "both", "--middle-head", "--align-latent", steps=3) == 0
    assert train(store, folder / "weightless", "--middle-head", "--middle-weight", "0", steps=2) == 0
    return folder


def test_a_run_logs_them_apart_and_a_weight_of_0_trains_as_without(runs):
    plain, both, weightless = (lines(runs / name) for name in ("plain", "both", "weightless"))
    assert {"loss_middle", "loss_align"} == both[0].keys() - plain[0].keys()
    assert both[0]["loss"] == plain[0]["loss"], "the first step's loss is the network's own, on the same draws"
    ours, theirs = tensors(runs / "weightless", 2), tensors(runs / "plain", 2)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert [line["loss"] for line in weightless] == [line["loss"] for line in plain]


def test_without_them_a_checkpoint_names_neither(runs):
    text = (runs / "plain" / "checkpoints" / "step-0000002" / "config.json").read_text()
    assert "middle" not in text and "align" not in text
    assert not [name for name in tensors(runs / "plain", 2) if "middle" in name or "align" in name]


def test_a_run_with_them_goes_on_to_the_same_bits_and_one_without_does_not_begin_them(store, runs, tmp_path, capsys):
    flags = ["--middle-head", "--align-latent"]
    assert train(store, tmp_path / "run", *flags, steps=2) == 0
    assert train(store, tmp_path / "run", *flags, steps=3) == 0
    again, whole = tensors(tmp_path / "run", 3), tensors(runs / "both", 3)
    assert (
        again.keys() == whole.keys() and {"ema/aligner.fc1.weight", "model/middle_layer.linear.weight"} <= whole.keys()
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert history(tmp_path / "run")[-1]["loss"] == history(runs / "both")[-1]["loss"]
    assert train(store, tmp_path / "run", steps=4) == 2
    assert "--middle-head was True and is now False" in capsys.readouterr().err


def test_a_checkpoint_is_read_with_its_middle_head_and_without_the_aligner(runs, tmp_path):
    checkpoint = read_checkpoint(runs / "both")
    assert checkpoint.config.middle_head and not checkpoint.config.align_latent
    assert "align_latent" not in checkpoint.info["model"]
    assert not [name for name in checkpoint.model.state_dict() if name.startswith("aligner")]
    recorded = json.loads((runs / "both" / "checkpoints" / "step-0000003" / "config.json").read_text())["model"]
    assert recorded["middle_head"] is recorded["align_latent"] is True


def test_weights_below_0_are_refused(store, tmp_path, capsys):
    assert train(store, tmp_path / "run", "--middle-head", "--middle-weight", "-1", steps=1) == 2
    assert "--middle-weight -1.0 must be at least 0" in capsys.readouterr().err
