"""Every objective in every format: written with what the format cannot say said, or refused with the reason."""

import itertools
import json
from unittest import mock

import pytest
import torch

from pipeline.checkpoint import read_checkpoint
from pipeline.checkpoint.folder import write_model_files
from pipeline.checkpoint.release import default_info
from pipeline.convert import __main__
from pipeline.diffusion import OBJECTIVES, make_process
from pipeline.dit import DiT, DiTConfig

TRAINED = {
    **{name: {"objective": name} for name in OBJECTIVES},
    "x0": {"objective": "ddpm", "prediction": "x0", "variance": "fixed-small"},
    "v-cosine": {"objective": "ddpm", "prediction": "v", "schedule": "cosine"},
    "kl": {"objective": "ddpm", "loss": "kl"},
    "uniform": {"objective": "flow", "timestep_law": "uniform"},
    "sit-cosine": {"objective": "sit", "path": "cosine"},
    **{
        f"sit-{path}-{prediction}": {"objective": "sit", "path": path, "prediction": prediction}
        for path in ("linear", "cosine", "vp")
        for prediction in ("v", "noise", "score")
        if (path, prediction) not in {("linear", "v"), ("cosine", "v")}  # which are above
    },
    "x0-flow": {"objective": "flow", "prediction": "x0"},
    "shifted": {"objective": "flow", "time_shift": 2.0},
}
UNSPEAKABLE = {(name, "diffusers") for name in TRAINED if name.startswith(("sit", "repa"))}


def checkpoint(folder, diffusion):
    process = make_process(diffusion)
    config = DiTConfig(
        input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=4, learn_sigma=process.learns_variance
    )
    model = DiT(config)
    with torch.no_grad():
        model.final_layer.linear.weight.fill_(0.01)
    folder.mkdir()
    info = default_info(config, diffusion=diffusion)
    write_model_files(folder, info=info, model=None, averages={"ema": model.state_dict()})
    return model


def converted(*arguments):
    with mock.patch("sys.argv", ["dit-convert", *map(str, arguments)]):
        return __main__.main()


UNSAYABLE = {  # in a bare .pt
    "x0-flow": "its prediction is x0",
    "shifted": "its time_shift is 2.0",
    "sit-vp-v": "its path is vp",
    **{
        name: f"its prediction is {said['prediction']}"
        for name, said in TRAINED.items()
        if said.get("prediction") in {"noise", "score"}
    },
}
QUICK = {"ddpm", "flow", "sit", "sit-vp-score"}  # one of each kind; the others with the slow tests
ROWS = [
    pytest.param(name, form, marks=() if name in QUICK else pytest.mark.slow)
    for name, form in itertools.product(TRAINED, ("dit", "facebook", "diffusers"))
]


@pytest.mark.parametrize(("name", "form"), ROWS)
def test_every_objective_is_written_in_every_format_or_refused_with_the_reason(name, form, tmp_path, capsys):
    diffusion = TRAINED[name]
    model = checkpoint(tmp_path / "source", diffusion)
    target = tmp_path / ("target.pt" if form == "facebook" else "target")
    status = converted("--from", tmp_path / "source", "--to", target, "--format", form)
    said = capsys.readouterr().err
    if (name, form) in UNSPEAKABLE:
        assert (status, target.exists()) == (2, False)
        assert f"its objective is {diffusion['objective']}" in said
        return
    if form == "facebook" and name in UNSAYABLE:
        assert (status, target.exists()) == (2, False)
        assert f"a bare .pt has no place for that {UNSAYABLE[name]}" in said
        target = target.with_suffix(".safetensors")
        assert converted("--from", tmp_path / "source", "--to", target, "--format", form) == 0
        assert read_checkpoint(target, num_heads=4).process == make_process(diffusion)  # its metadata says it
        return
    assert status == 0
    if form == "facebook" and diffusion["objective"] != "ddpm":
        assert f"does not say that its objective is {diffusion['objective']}" in said
        if diffusion["objective"] != "ddpm":
            assert f"--objective {diffusion['objective']}" in said
    objective = diffusion["objective"] if form == "facebook" else None
    again = read_checkpoint(target, num_heads=4, objective=objective)
    assert again.process.objective == diffusion["objective"]
    assert again.process.sampled_as == make_process(diffusion).sampled_as
    found = again.model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
    if form == "facebook" and diffusion["objective"] != "ddpm":
        named = target.with_suffix(".safetensors")
        assert converted("--from", tmp_path / "source", "--to", named, "--format", form) == 0
        assert "--objective" not in capsys.readouterr().err
        assert read_checkpoint(named, num_heads=4).process == make_process(diffusion)  # its metadata says it
    if form == "dit":
        assert json.loads((target / "config.json").read_text())["diffusion"] == make_process(diffusion).to_json()
