"""SiT's and REPA's checkpoints as their own code would sample them: the sampling written again from its equations."""

import argparse
import itertools
import json
import math
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint import read_checkpoint
from pipeline.convert.__main__ import main as convert_main
from pipeline.dit import DiT, DiTConfig
from pipeline.inspect.__main__ import main as inspect_main
from pipeline.randomness import normal
from pipeline.runtime.errors import UserError
from sample.__main__ import main
from tests.sample.conftest import fill
from tests.train.runs import make_store, train

STEPS, SEED, COUNT = 5, 3, 3
SIZES = {"input_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 4}


def network_of(*, learn_sigma):
    model = DiT(DiTConfig(**SIZES, learn_sigma=learn_sigma)).eval()
    fill(model, "another's flow")
    return model


def state_of(model):
    return {**model.state_dict(), "pos_embed": model.pos_embed}


def with_projectors(state):
    sizes = {"0": (8, 64), "2": (8, 8), "4": (5, 8)}
    return state | {
        f"projectors.0.{layer}.{kind}": torch.zeros(shape if kind == "weight" else shape[:1])
        for layer, shape in sizes.items()
        for kind in ("weight", "bias")
    }


def training_file(path, state, **arguments):
    """As SiT's and REPA's training leaves it."""
    old = {name: tensor + 1 for name, tensor in state.items()}
    content = {"model": old, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(**arguments), "steps": 70}
    torch.save(content, path)
    return path


def noise_and_labels():
    noise = torch.stack([normal((4, 8, 8), SEED, "sample-noise", k) for k in range(COUNT)])
    return noise, torch.tensor([2] * COUNT)


def sit_samples(model, scale=1.0):
    """SiT: dx / ds is the network's first half at (x, s), from the noise at s = 0 to data at s = 1."""
    x, y = noise_and_labels()
    with torch.no_grad():
        for k in range(STEPS):
            s = torch.full((COUNT,), k / STEPS)
            given = model(x, s, y)[:, :4]
            free = model(x, s, torch.full_like(y, 4))[:, :4]
            x = x + (free + scale * (given - free)) / STEPS
    return x


def repa_samples(model):
    """REPA: dx / dt is the network's output at (x, t), from the noise at t = 1 to data at t = 0."""
    x, y = noise_and_labels()
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64).tolist()
    x = x.double()
    with torch.no_grad():
        for now, after in itertools.pairwise(times):
            x = x + (after - now) * model(x.float(), torch.full((COUNT,), now), y)[:, :4].double()
    return x


def sampled(checkpoint, out, *flags, guidance="1"):
    """dit-sample's latents in the network's scale, and its exit status."""
    given = ["--num-heads", "4", "--guidance", guidance, "--mixed-precision", "no", "--device", "cpu", *flags]
    given += ["--sampler", "euler", "--steps", str(STEPS), "--seed", str(SEED)]
    given += ["--classes", "2", "--samples-per-class", str(COUNT)]
    status = main(["--checkpoint", str(checkpoint), "--out", str(out), *given])
    return status, (load_file(out)["latents"] * 0.18215 if status == 0 else None)


def assert_close(found, wanted):
    assert (found - wanted).abs().max() < 1e-5
    assert wanted.std() > 0.1


@pytest.mark.parametrize("path_type", ["Linear", "GVP"])
@pytest.mark.parametrize("learn_sigma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sits_training_file_is_sampled_as_its_own_code_does(path_type, learn_sigma, tmp_path):
    model = network_of(learn_sigma=learn_sigma)
    told = {"path_type": path_type, "prediction": "velocity", "model": "SiT-XL/2"}
    file = training_file(tmp_path / "0000070.pt", state_of(model), **told)
    status, found = sampled(file, tmp_path / "x.safetensors", "--guidance-channels", "all", guidance="3")
    assert status == 0
    assert_close(found, sit_samples(model, scale=3.0))
    recipe = json.loads((tmp_path / "x.safetensors.json").read_text())["recipe"]["checkpoint"]
    assert "prediction" not in recipe["process"]
    path = {"Linear": "linear", "GVP": "cosine"}[path_type]
    assert (recipe["process"]["objective"], recipe["process"]["path"], recipe["step"]) == ("sit", path, 70)


def sit_path(path_type, s):
    """a and b of x = a · data + b · noise at SiT's time, and their derivatives (arXiv 2401.08740, table 1)."""
    quarter = math.pi / 2
    if path_type == "Linear":
        return s, 1 - s, 1, -1
    if path_type == "GVP":
        sin, cos = math.sin(quarter * s), math.cos(quarter * s)
        return sin, cos, quarter * cos, -quarter * sin
    beta = 0.1 + 19.9 * (1 - s)
    a = math.exp(-0.05 * (1 - s) - 19.9 / 4 * (1 - s) ** 2)
    b = math.sqrt(1 - a * a)
    return a, b, a * beta / 2, -a * a * beta / (2 * b)


GRID = [(path, prediction) for path in ("Linear", "GVP", "VP") for prediction in ("velocity", "noise", "score")]


@pytest.mark.parametrize(("path_type", "prediction"), GRID[1:3] + GRID[4:])
def test_sits_file_of_any_path_and_prediction_is_sampled_goes_on_and_comes_back(
    path_type, prediction, tmp_path, capsys
):
    """By dx / ds = a'/a · x + b · (a'/a · b - b') · score, within 0.001 of the ends as their code is."""
    model = network_of(learn_sigma=True)
    told = {"path_type": path_type, "prediction": prediction, "loss_weight": None if path_type == "VP" else "velocity"}
    file = training_file(tmp_path / "0000070.pt", state_of(model), **told)
    status, found = sampled(file, tmp_path / "x.safetensors")
    assert status == 0
    x, y = noise_and_labels()
    x = x.double()
    first = 0 if path_type == "VP" else 1e-3
    ds = (1 - 1e-3 - first) / STEPS
    for k in range(STEPS):
        s = first + k * ds
        with torch.no_grad():
            output = model(x.float(), torch.full((COUNT,), s), y)[:, :4].double()
        a, b, da, db = sit_path(path_type, s)
        score = output if prediction == "score" else -output / b
        x = x + ds * (output if prediction == "velocity" else da / a * x + b * (da / a * b - db) * score)
    assert (found - x).abs().max() < 1e-5 * max(1, x.abs().max())
    ours, named = tmp_path / "ours", tmp_path / "named.safetensors"
    assert run(convert_main, "--from", str(file), "--num-heads", "4", "--to", str(ours), "--format", "dit") == 0
    assert run(convert_main, "--from", str(ours), "--to", str(named), "--format", "facebook") == 0
    capsys.readouterr()
    settings = ["timestep_law uniform", *([f"prediction {prediction}"] if prediction != "velocity" else [])]
    settings.append({"Linear": "path linear", "GVP": "path cosine", "VP": "path vp"}[path_type])
    settings += ["loss_weight velocity"] * (path_type != "VP")
    for form in (file, ours, named):
        assert run(inspect_main, str(form), "--num-heads", "4") == 0
        assert f"sit ({', '.join(settings)})" in capsys.readouterr().out
    again = sampled(named, tmp_path / "y.safetensors")[1]
    assert torch.equal(again, found)
    assert run(convert_main, "--from", str(ours), "--to", str(tmp_path / "bare.pt"), "--format", "facebook") == 2
    assert "a bare .pt has no place for" in capsys.readouterr().err


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_repas_training_file_is_sampled_as_its_own_code_does_without_its_projectors(path_type, tmp_path, capsys):
    model = network_of(learn_sigma=False)
    told = {"path_type": path_type, "prediction": "v"}
    file = training_file(tmp_path / "0000070.pt", with_projectors(state_of(model)), **told)
    status, found = sampled(file, tmp_path / "x.safetensors")
    assert status == 0
    assert_close(found, repa_samples(model))
    assert "6 tensors of REPA's projectors" in capsys.readouterr().err


def test_bare_weights_of_sit_are_sampled_as_theirs_with_the_objective(tmp_path, capsys):
    model = network_of(learn_sigma=True)
    torch.save(state_of(model), tmp_path / "SiT-XL-2-256x256.pt")
    status, _ = sampled(tmp_path / "SiT-XL-2-256x256.pt", tmp_path / "x.safetensors")
    said = capsys.readouterr().err
    assert status == 2
    assert "may be SiT's by its name" in said
    assert "--objective: sit" in said
    status, found = sampled(tmp_path / "SiT-XL-2-256x256.pt", tmp_path / "x.safetensors", "--objective", "sit")
    assert status == 0
    assert_close(found, sit_samples(model))


@pytest.mark.parametrize(
    "flags", [(), ("--objective", "sit"), pytest.param(("--objective", "repa"), marks=pytest.mark.slow)]
)
def test_bare_weights_with_repas_projectors_are_repas(flags, tmp_path, capsys):
    model = network_of(learn_sigma=False)
    torch.save(with_projectors(state_of(model)), tmp_path / "last.pt")
    status, found = sampled(tmp_path / "last.pt", tmp_path / "x.safetensors", *flags)
    assert status == 0
    assert_close(found, repa_samples(model))
    assert "taken for REPA's" in capsys.readouterr().err


def test_repas_first_checkpoints_count_their_blocks_in_two_parts(tmp_path):
    model = network_of(learn_sigma=False)
    old = {name.replace("blocks.1.", "decoder_blocks.0."): tensor for name, tensor in state_of(model).items()}
    torch.save({"ema": with_projectors(old)}, tmp_path / "last.pt")
    status, found = sampled(tmp_path / "last.pt", tmp_path / "x.safetensors")
    assert status == 0
    assert_close(found, repa_samples(model))


def test_bare_weights_without_variance_are_asked_about_by_whoever_needs_to_know(tmp_path, capsys):
    model = network_of(learn_sigma=False)
    torch.save(state_of(model), tmp_path / "w.pt")
    status, _ = sampled(tmp_path / "w.pt", tmp_path / "x.safetensors")
    assert status == 2
    assert "does not say what it was trained for" in capsys.readouterr().err
    arguments = ["--from", str(tmp_path / "w.pt"), "--num-heads", "4"]
    assert run(convert_main, *arguments, "--to", str(tmp_path / "c"), "--format", "dit") == 2
    assert run(convert_main, *arguments, "--to", str(tmp_path / "c.pt"), "--format", "facebook") == 0
    assert run(inspect_main, str(tmp_path / "w.pt"), "--num-heads", "4") == 0
    assert "objective   not recorded" in capsys.readouterr().out
    assert run(inspect_main, str(tmp_path / "w.pt"), "--num-heads", "4", "--objective", "repa") == 0
    assert "repa (timestep_law uniform, path linear)" in capsys.readouterr().out
    status, _ = sampled(tmp_path / "w.pt", tmp_path / "x.safetensors", "--objective", "flow")
    assert status == 0


def test_weights_like_the_releases_are_taken_for_it_and_that_is_said(tmp_path, capsys):
    torch.save(state_of(network_of(learn_sigma=True)), tmp_path / "w.pt")
    given = ["--num-heads", "4", "--steps", "2", "--classes", "1", "--samples-per-class", "1"]
    status = main(["--checkpoint", str(tmp_path / "w.pt"), "--out", str(tmp_path / "x.safetensors"), *given])
    said = capsys.readouterr().err
    assert status == 0
    assert "taken for the release's ddpm (--objective sit for SiT's)" in said
    assert "1 samples: ddpm, 2 steps" in said


@pytest.mark.parametrize(
    ("arguments", "flags", "said"),
    [
        ({"path_type": "VP", "prediction": "v"}, (), "path_type VP and prediction v,"),
        ({"path_type": "Linear", "prediction": "velocity"}, ("--objective", "repa"), "was trained for sit"),
        ({"path_type": "linear", "prediction": "v"}, ("--objective", "ddpm"), "was trained for repa"),
        ({"model": "SiT-B/2"}, (), "may be SiT's"),
    ],
)
def test_what_cannot_be_sampled_rightly_is_refused(arguments, flags, said, tmp_path, capsys):
    file = training_file(tmp_path / "w.pt", state_of(network_of(learn_sigma=True)), **arguments)
    status, _ = sampled(file, tmp_path / "x.safetensors", *flags)
    assert status == 2
    assert said in capsys.readouterr().err


UNSPOKEN = [("VP", "x0"), ("gvp", "velocity"), ("cosine", "noise"), ("vp", "v")]


@pytest.mark.parametrize(("path_type", "prediction"), UNSPOKEN)
def test_a_path_or_prediction_that_no_sampler_here_has_is_refused_by_its_words_everywhere(
    path_type, prediction, tmp_path, capsys
):
    """Also where nothing is sampled: a converted file would have lost what its network gives."""
    arguments = {"path_type": path_type, "prediction": prediction}
    file = training_file(tmp_path / "w.pt", state_of(network_of(learn_sigma=True)), **arguments)
    given = ["--num-heads", "4"]
    target = tmp_path / "c.pt"
    commands = [
        lambda: sampled(file, tmp_path / "x.safetensors", "--objective", "sit")[0],
        lambda: run(inspect_main, str(file), *given),
        lambda: run(convert_main, "--from", str(file), "--to", str(target), "--format", "facebook", *given),
        lambda: run(convert_main, "--from", str(file), "--to", str(target), "--format", "dit", *given),
    ]
    for command in commands:
        assert command() == 2
        assert f"path_type {path_type} and prediction {prediction}" in capsys.readouterr().err
    assert not target.exists()
    with pytest.raises(UserError, match=f"path_type {path_type} and prediction {prediction}"):
        read_checkpoint(file, num_heads=4)


def run(command, *arguments):
    with mock.patch("sys.argv", ["dit", *arguments]):
        return command()


def test_what_is_known_of_a_flow_goes_into_a_checkpoint_of_ours_and_back(tmp_path, capsys):
    model = network_of(learn_sigma=True)
    file = training_file(tmp_path / "w.pt", state_of(model), path_type="GVP", prediction="velocity")
    ours, back = tmp_path / "ours", tmp_path / "back.pt"
    assert run(convert_main, "--from", str(file), "--num-heads", "4", "--to", str(ours), "--format", "dit") == 0
    capsys.readouterr()
    assert run(inspect_main, str(ours), "--verify") == 0
    assert "sit (timestep_law uniform, path cosine)" in capsys.readouterr().out
    status, found = sampled(ours, tmp_path / "x.safetensors")
    assert status == 0
    assert_close(found, sit_samples(model))
    assert run(convert_main, "--from", str(ours), "--to", str(back), "--format", "facebook") == 0
    said = capsys.readouterr().err
    assert "its objective is sit; its path is cosine" in said
    assert "--objective sit, which takes it for the linear path: sample it as .safetensors" in said
    again = read_checkpoint(back, num_heads=4, objective="sit").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    assert run(convert_main, "--from", str(ours), "--to", str(tmp_path / "d"), "--format", "diffusers") == 2
    assert "its objective is sit" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("objective", ["sit", "repa"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_training_goes_on_from_their_weights_with_their_loss(objective, path):
    """The loss as their code computes it, from their own interpolants and time."""
    from pipeline.diffusion import make_process

    process = make_process({"objective": objective, "path": path})
    model = network_of(learn_sigma=objective == "sit")
    draws = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(COUNT, 4, 8, 8, generator=draws) for _ in range(2))
    t, y = torch.rand(COUNT, generator=draws), torch.zeros(COUNT, dtype=torch.long)
    with torch.no_grad():
        found = process.training_losses(lambda x_t, fed: model(x_t, fed, y), x, t, noise)["loss"]
        own = 1 - t if objective == "sit" else t  # theirs
        wide = own[:, None, None, None]
        of_data = wide if objective == "sit" else 1 - wide
        if path == "linear":
            alpha, sigma, slopes = of_data, 1 - of_data, (1.0, -1.0)
        else:
            alpha, sigma = torch.sin(of_data * math.pi / 2), torch.cos(of_data * math.pi / 2)
            slopes = (math.pi / 2 * sigma, -math.pi / 2 * alpha)
        sign = 1 if objective == "sit" else -1  # d of_data / d own
        wanted = model(alpha * x + sigma * noise, own, y)[:, :4] - sign * (slopes[0] * x + slopes[1] * noise)
    torch.testing.assert_close(found, wanted.square().mean((1, 2, 3)), rtol=1e-5, atol=1e-6)
    x_t = process.q_sample(x, t, noise)
    torch.testing.assert_close(process.predict_x_start(process.target(x, t, noise), x_t, t), x, rtol=1e-4, atol=1e-5)


def test_a_run_for_sit_trains_samples_and_guides_within_an_interval(tmp_path, capsys):
    store = make_store(tmp_path / "store", classes=4)
    flags = ("--objective", "sit", "--flow-path", "cosine")
    assert train(store, tmp_path / "run", *flags, steps=2) == 0
    info = json.loads((tmp_path / "run/checkpoints/step-0000002/config.json").read_text())
    assert info["diffusion"] == {"objective": "sit", "timestep_law": "uniform", "path": "cosine"}
    assert train(store, tmp_path / "more", *flags, "--init-from", str(tmp_path / "run"), steps=3) == 0
    assert "learns anew" not in capsys.readouterr().err
    assert train(store, tmp_path / "other", "--init-from", str(tmp_path / "run"), steps=1) == 0
    assert "was trained for --objective sit" in capsys.readouterr().err


def test_a_run_begins_from_sits_training_file_with_every_tensor_of_it(tmp_path, capsys):
    store = make_store(tmp_path / "store", classes=4)
    model = DiT(DiTConfig(**SIZES | {"hidden_size": 128}, learn_sigma=False))
    fill(model, "another's flow")
    told = {"path_type": "Linear", "prediction": "velocity"}
    file = training_file(tmp_path / "0000070.pt", state_of(model), **told)
    flags = ("--init-from", str(file), "--depth", "2", "--allow-other-vae")
    assert train(store, tmp_path / "run", "--objective", "sit", *flags, steps=1) == 0
    said = capsys.readouterr().err
    assert "learns anew" not in said
    assert "was trained for" not in said
    assert f"{len(model.state_dict())} tensors copied as they are" in said
    assert train(store, tmp_path / "other", *flags, steps=1) == 0
    assert "was trained for --objective sit" in capsys.readouterr().err


def test_a_run_goes_on_from_a_score_on_the_vp_path_and_says_what_it_would_learn_anew(tmp_path, capsys):
    store = make_store(tmp_path / "store", classes=4)
    flags = ("--objective", "sit", "--flow-path", "vp", "--prediction", "score", "--loss-weight", "likelihood")
    assert train(store, tmp_path / "run", *flags, "--sample-every", "1", steps=2) == 0
    info = json.loads((tmp_path / "run/checkpoints/step-0000002/config.json").read_text())["diffusion"]
    assert info == {
        "objective": "sit", "timestep_law": "uniform", "path": "vp", "prediction": "score", "loss_weight": "likelihood"
    }  # fmt: skip
    assert train(store, tmp_path / "more", *flags, "--init-from", str(tmp_path / "run"), steps=3) == 0
    assert "learns anew" not in capsys.readouterr().err
    other = (*flags[:2], "--prediction", "noise", "--init-from", str(tmp_path / "run"))
    assert train(store, tmp_path / "other", *other, steps=1) == 0
    said = capsys.readouterr().err
    assert "was trained for --objective sit --prediction score --flow-path vp" in said
    assert "this run is for sit --prediction noise --flow-path linear" in said


def test_the_guidance_interval_counts_from_data_to_noise_for_a_network_whose_time_runs_back():
    from pipeline.diffusion import classifier_free_guidance

    calls = []

    def model(x, t, y):
        calls.append(len(x))
        return x

    for noise_first, wanted in ((True, [2, 1]), (False, [1, 2])):
        calls.clear()
        denoise = classifier_free_guidance(
            model,
            torch.zeros(1, dtype=torch.long),
            scale=2.0,
            null_class=1,
            interval=(0.6, 1.0),
            time_scale=1.0,
            noise_first=noise_first,
        )
        for fed in (0.1, 0.9):
            denoise(torch.zeros(1, 4, 2, 2), torch.tensor([fed]))
        assert calls == wanted
