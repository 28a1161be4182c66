"""What of a skipped step was not finite first, said in words, at no cost to the steps that go well."""

import math

import pytest
import torch

from pipeline.dit import inside
from tests.train.runs import make_store, poison, tensors, train
from train import loop


@pytest.fixture
def spoiled(monkeypatch):
    """`spoiled(change)` lets `change(network)` loose before the second step."""

    def arrange(change):
        real = loop.train_step

        def step(trainer, batch, **options):
            if trainer.state.step == 1:
                with torch.no_grad():
                    change(trainer.state.placement.network)
            return real(trainer, batch, **options)

        monkeypatch.setattr(loop, "train_step", step)

    return arrange


def attention_too_large(network):
    """Queries of 1e30 are finite, their products with keys are not."""
    for block in network.blocks[3:4]:
        block.attn.qkv.weight[:256].mul_(1e25)
        block.attn.qkv.bias[:256].fill_(1e30)


def hidden_layer_too_large(network):
    network.blocks[4].adaLN_modulation[1].bias.fill_(1.0)
    network.blocks[4].mlp.fc1.bias.fill_(1e30)
    network.blocks[4].mlp.fc2.weight.fill_(1e30)


def one_infinite_weight(network):
    network.blocks[2].mlp.fc2.weight[0, 0] = math.inf


@pytest.mark.parametrize(
    ("change", "what", "advice"),
    [
        (attention_too_large, "first not finite: the attention logits of block 3", "--qk-norm keeps them small"),
        (hidden_layer_too_large, "first not finite: the activations of block 4", "lower --lr, set --clip-norm"),
        (one_infinite_weight, "first not finite: the weights blocks.2.mlp.fc2.weight", "go back to an earlier"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--blocks", "modern", "--no-qk-norm", "--mlp", "gelu", "--middle-head"]])
def test_the_first_tensor_that_is_not_finite_is_named_with_the_largest_ones_and_what_helps(
    store, tmp_path, capsys, spoiled, change, what, advice, flags
):
    spoiled(change)
    assert train(store, tmp_path / "run", *flags, steps=2, depth=None) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "was skipped; " in line]
    assert len(said) == 1
    assert f"step 2 was skipped; {what}; the largest activation was " in said[0] and advice in said[0]
    assert "the largest attention logit was " in said[0]


def test_latents_that_are_not_finite_are_the_stores(tmp_path, capsys):
    folder = make_store(tmp_path / "latents")
    poison(folder, range(25))
    assert train(folder, tmp_path / "run", steps=3) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "was skipped; " in line]
    assert len(said) == 1, "once for a row of skipped steps"
    assert "first not finite: the latents of the batch" in said[0] and "dit-inspect STORE --verify" in said[0]


def test_a_gradient_that_is_not_finite_where_the_loss_is_names_its_layer():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    found = inside.Findings()
    with torch.no_grad():
        layer[1].weight.zero_()
        layer[1].bias.zero_()
    loss = layer(torch.ones(1, 2)).abs().pow(0.5).sum()
    assert loss.isfinite()
    inside.look_at_gradients(layer, loss, found)
    assert found.first == ("gradient", "the gradient of 1.bias")


def test_looking_changes_nothing(store, tmp_path, monkeypatch, spoiled):
    spoiled(one_infinite_weight)
    assert train(store, tmp_path / "looked", steps=3, depth=None) == 0
    monkeypatch.setattr(loop, "_say_what_went_bad", lambda *_: None)
    assert train(store, tmp_path / "not", steps=3, depth=None) == 0
    looked, left = tensors(tmp_path / "looked", 3), tensors(tmp_path / "not", 3)
    assert all(torch.equal(tensor, looked[name]) for name, tensor in left.items())


def test_a_run_that_goes_well_is_not_looked_at(store, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "name_what_went_bad", lambda *_: pytest.fail("looked at"))
    assert train(store, tmp_path / "run", steps=3) == 0
