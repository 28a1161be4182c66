"""Muon: orthogonal steps for the blocks' matrices, the same on any number of processes, beside AdamW for all else."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from pipeline.dit import DiT, DiTConfig
from pipeline.dit.matrices import count_in_matrices, logical_matrices
from pipeline.dit.memory import StepSettings, step_memory
from pipeline.runtime.errors import UserError
from tests.train.runs import (
    assert_close_histories,
    assert_same_run,
    history,
    launch,
    lines,
    start,
    tensors,
    train,
    wait_for,
)
from train.optimizer import Optimizer, orthogonalized
from train.options import OptimizerOptions

# The bounds on rounding below are of the whole preset.
train, launch, start = (partial(call, depth=None) for call in (train, launch, start))
MUON = ["--optimizer", "muon", "--lr", "1e-3", "--clip-norm", "1"]
TINY = DiTConfig(input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)
GATED = replace(TINY, mlp="swiglu", norm="rms", qk_norm=True, value_residual=True, middle_head=True)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(values, rows, columns, seed=0):
    u, _ = torch.linalg.qr(normals(rows, len(values), seed=seed).double())
    v, _ = torch.linalg.qr(normals(columns, len(values), seed=seed + 1).double())
    return (u @ torch.diag(values.double()) @ v.T).float()


@pytest.mark.parametrize(("rows", "columns"), [(48, 48), (96, 24), (24, 96)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e8])
def test_singular_values_from_a_500th_of_the_norm_on_become_nearly_1_and_directions_stay(rows, columns, size):
    values = torch.logspace(0, -2, 24)
    values[-6:] = 0.0021 * values.norm()
    matrix = size * with_singular_values(values, rows, columns)
    made = orthogonalized(matrix[None])[0]
    found = torch.linalg.svdvals(made)[: len(values)]
    assert found.min() > 0.68 and found.max() < 1.21
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u[:, :24].T @ made @ v[:24].T
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-3 and turned.diagonal().min() > 0.68


def test_zeros_stay_zero_and_nothing_is_nan_for_matrices_that_lack_rank():
    one = with_singular_values(torch.tensor([1.0, 0.5]), 12, 20)
    made = orthogonalized(torch.stack([one, torch.zeros(12, 20), torch.full((12, 20), 1e-30)]))
    assert made.isfinite().all() and torch.equal(made[1], torch.zeros(12, 20))
    found = torch.linalg.svdvals(made[0])
    assert found[1] > 0.68 and found[2:].max() < 1e-4


def test_the_matrices_of_a_network_are_those_of_its_blocks_with_queries_keys_and_values_apart():
    shapes = {name: tuple(parameter.shape) for name, parameter in DiT(TINY).named_parameters()}
    found = logical_matrices(shapes)
    block = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
    assert found == {f"blocks.{k}.{layer}.weight": parts for k in range(2) for layer, parts in block.items()}
    assert count_in_matrices(TINY) == 2 * 12 * 16**2
    crossed = DiTConfig(input_size=4, hidden_size=16, depth=1, num_heads=2, conditioning="cross-attention")
    shapes = {name: tuple(parameter.shape) for name, parameter in DiT(crossed).named_parameters()}
    assert logical_matrices(shapes)["blocks.0.cross_attn.kv.weight"] == 2


def test_a_gated_mlps_first_layer_is_two_matrices():
    shapes = {
        "blocks.0.mlp.fc1.weight": (80, 16),
        "blocks.0.mlp.fc2.weight": (16, 40),
        "middle_layer.fc1.weight": (9, 9),
    }
    assert logical_matrices(shapes) == {"blocks.0.mlp.fc1.weight": 2, "blocks.0.mlp.fc2.weight": 1}


def made(config=TINY, **options):
    network = DiT(config)
    names = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    weights = [torch.nn.Parameter(normals(*shape, seed=k)) for k, shape in enumerate(names.values())]
    chosen = OptimizerOptions(**{"optimizer": "muon", "lr": 1e-2, "weight_decay": 0.1, **options})
    return Optimizer(weights, chosen, scaled=False, shapes=names), list(names)


def gradients(optimizer, step):
    return [normals(*weight.shape, seed=100 * (step + 1) + k) for k, weight in enumerate(optimizer.weights)]


@pytest.mark.parametrize("config", [TINY, GATED], ids=["the release's blocks", "gated blocks"])
def test_a_step_is_the_papers_for_the_matrices_and_adamws_for_all_else(config):
    """By a plain reference: m ← m + (1 - mu)(g - m), along the orthogonal of g + mu (m - g), q, k and v apart, no decay."""
    (muon, names), (adamw, _) = (
        made(config, clip_norm=0.5, muon_lr=3e-2),
        made(config, optimizer="adamw", clip_norm=0.5),
    )
    weights = {name: weight.detach().clone() for name, weight in zip(names, muon.weights, strict=True)}
    momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(3):
        given = gradients(muon, step)
        norm, _ = muon.step([gradient.clone() for gradient in given], 0.5e-2)
        adamw.step([gradient.clone() for gradient in given], 0.5e-2)
        for name, gradient in zip(names, given, strict=True):
            clipped = gradient * min(1.0, 0.5 / norm.item())
            momentum[name] += (1 - 0.95) * (clipped - momentum[name])
            if name in (matrices := logical_matrices({n: tuple(w.shape) for n, w in weights.items()})):
                nesterov = (1 - 0.95) * clipped + 0.95 * momentum[name]
                for part, direction in zip(
                    weights[name].chunk(matrices[name]), nesterov.chunk(matrices[name]), strict=True
                ):
                    part.sub_(1.5e-2 * 0.2 * math.sqrt(max(part.shape)) * orthogonalized(direction[None])[0])
    for name, ours, plain in zip(names, muon.weights, adamw.weights, strict=True):
        if name in matrices:
            torch.testing.assert_close(ours.detach(), weights[name], rtol=1e-5, atol=1e-6)
        else:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_queries_keys_and_values_as_one_matrix_would_be_another_step():
    fused = normals(1, 48, 16)
    assert (orthogonalized(fused) - orthogonalized(fused.view(3, 16, 16)).view(1, 48, 16)).abs().max() > 0.05


def test_a_step_is_as_long_as_adamws_whatever_the_gradients_size():
    for size in (1e-6, 1e3):
        optimizer, names = made()
        before = [weight.detach().clone() for weight in optimizer.weights]
        optimizer.step([size * gradient for gradient in gradients(optimizer, 0)], 1e-2)
        for name, old, new in zip(names, before, optimizer.weights, strict=True):
            if name in logical_matrices({n: tuple(w.shape) for n, w in zip(names, before, strict=True)}):
                assert (old - new).square().mean().sqrt().item() == pytest.approx(0.2e-2, rel=0.25)


def everything(optimizer):
    state = [tensor for tensors in optimizer.state_tensors().values() for tensor in tensors if tensor is not None]
    return [tensor.detach().clone() for tensor in [*optimizer.weights, *state]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_weights_and_momentum_to_the_bit(bad):
    optimizer, names = made(clip_norm=1.0)
    optimizer.step(gradients(optimizer, 0), 1e-2)
    before = everything(optimizer)
    broken = gradients(optimizer, 1)
    broken[names.index("blocks.1.mlp.fc2.weight")][2, 3] = bad
    _, skip = optimizer.step(broken, 1e-2)
    assert skip and all(torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=True))
    optimizer.step(gradients(optimizer, 2), 1e-2)
    assert optimizer.counters()["skipped"] == 1 and optimizer.counters()["adamw_steps"] == 2


def test_memory_and_checkpoint_know_that_muon_keeps_half():
    config = DiTConfig.from_preset("DiT-XL/2")
    adamw, muon = (step_memory(config, StepSettings(images=32, muon=muon)) for muon in (False, True))
    spared = adamw["AdamW"] - muon["AdamW"] - muon["Muon"]
    assert spared == 4 * count_in_matrices(config) == 4 * 28 * 12 * 1152**2


# ----- whole runs


@pytest.fixture(scope="module")
def alone(poisoned, tmp_path_factory):
    run = tmp_path_factory.mktemp("muon") / "run"
    assert train(poisoned, run, *MUON, "--save-every", "4", "--keep-last", "0", steps=8) == 0
    assert lines(run)[-1]["skipped_steps"] == 1
    return run


def test_a_run_goes_on_to_the_bit_from_its_checkpoint_which_holds_a_momentum_and_no_moments(poisoned, alone, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    shutil.rmtree(run / "checkpoints" / "step-0000008")
    assert train(poisoned, run, *MUON, "--save-every", "4", "--keep-last", "0", steps=8) == 0
    assert_same_run(alone, run, 8)
    kept = {name for name in tensors(run, 8) if name.startswith("optimizer/blocks.0.mlp.fc1.")}
    bias = {f"optimizer/blocks.0.mlp.fc1.bias.{moment}" for moment in ("exp_avg", "exp_avg_sq")}
    assert kept == {"optimizer/blocks.0.mlp.fc1.weight.momentum"} | bias
    state = json.loads((run / "checkpoints/step-0000008/state/trainer.json").read_text())
    assert state["optimizer"] == "Muon and AdamW (fused)"
    info = json.loads((run / "checkpoints/step-0000008/config.json").read_text())
    assert info["training"]["optimizer"] == "muon"


def test_another_optimizer_cannot_go_on_with_a_run_nor_with_its_checkpoint(poisoned, alone, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    adamw = ["--lr", "1e-3", "--clip-norm", "1"]
    assert train(poisoned, run, *adamw, steps=9) == 2
    assert "--optimizer was muon and is now adamw" in capsys.readouterr().err
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace("optimizer: muon", "optimizer: adamw"))
    assert train(poisoned, run, *adamw, steps=9) == 2
    said = capsys.readouterr().err
    assert "was made with Muon and AdamW (fused) and cannot go on with AdamW (fused)" in said and "--optimizer" in said


def test_a_momentum_rate_or_rate_that_cannot_be_meant_is_refused(store, tmp_path, capsys):
    assert train(store, tmp_path / "run", "--muon-lr", "1e-3", steps=1) == 2
    assert "--muon-lr 0.001 is for --optimizer muon" in capsys.readouterr().err
    with pytest.raises(UserError, match="--muon-lr 0.001 is for --optimizer muon, with an --lr above 0"):
        OptimizerOptions(optimizer="muon", muon_lr=1e-3, lr=0)
    assert train(store, tmp_path / "run", *MUON, "--muon-momentum", "1", steps=1) == 2
    assert "--muon-momentum 1.0 must be at least 0 and below 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(poisoned, alone, tmp_path):
    flags = [*MUON, "--save-every", "4", "--keep-last", "0"]
    with start(poisoned, tmp_path / "run", *flags, steps=100_000) as process:
        wait_for((tmp_path / "run/checkpoints/step-0000004").exists)
        process.kill()
        process.communicate()
    for late in sorted((tmp_path / "run/checkpoints").iterdir())[1:]:
        shutil.rmtree(late)
    assert train(poisoned, tmp_path / "run", *flags, steps=8) == 0
    assert_same_run(alone, tmp_path / "run", 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "sharding"),
    [(2, "none"), (4, "none"), (2, "fsdp"), (4, "fsdp"), (4, "hsdp --shard-processes 2")],
)
def test_several_processes_copied_or_sharded_train_as_one_does(poisoned, alone, tmp_path, processes, sharding):
    result = launch(poisoned, tmp_path / "run", *MUON, "--sharding", *sharding.split(), processes=processes, steps=8)
    assert result.returncode == 0, result.stderr
    assert_close_histories(history(alone), history(tmp_path / "run"), relative=1e-4)
    one, several = tensors(alone, 8), tensors(tmp_path / "run", 8)
    assert one.keys() == several.keys()
    for name, tensor in one.items():
        assert (several[name] - tensor).abs().max() <= 2e-3 * tensor.abs().max(), name
    assert train(poisoned, tmp_path / "run", *MUON, steps=9) == 0  # alone, from what the several have left


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_gated_blocks_train_in_two_processes_as_in_one(poisoned, tmp_path, sharding):
    flags = [*MUON, "--blocks", "modern", "--objective", "flow", "--middle-head"]
    assert train(poisoned, tmp_path / "one", *flags, steps=6) == 0
    result = launch(poisoned, tmp_path / "two", *flags, "--sharding", sharding, processes=2, steps=6)
    assert result.returncode == 0, result.stderr
    assert_close_histories(history(tmp_path / "one"), history(tmp_path / "two"), relative=1e-4)
