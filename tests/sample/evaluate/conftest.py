"""The FID network with weights filled by a rule, so that no weight file is needed; and tiny images to show it."""

import functools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sample.evaluate import features
from sample.evaluate.__main__ import main
from sample.evaluate.inception import FIDInception
from sample.evaluate.inception_weights import InceptionWeights, load_inception


def weights_by_rule(state):
    """Every tensor of the state dict from its place in the sorted names: cosines, scaled so that activations stay finite."""
    filled = {}
    for j, name in enumerate(sorted(state)):
        tensor = state[name]
        if name.endswith("num_batches_tracked"):
            filled[name] = torch.zeros_like(tensor)
            continue
        i = np.arange(tensor.numel(), dtype=np.float64)
        wave = np.cos(0.7 * i + j) * np.cos(((0.013 * i) * i) % 6.283185307179586 + 0.31 * j)
        if name.endswith("running_var"):
            values = 1 + 0.25 * wave
        elif name.endswith("running_mean"):
            values = 0.1 * wave
        elif name.endswith(".bn.weight"):
            values = 1 + 0.1 * wave
        elif name.endswith("bias"):
            values = 0.1 * wave
        else:
            values = 2 * math.sqrt(2 / math.prod(tensor.shape[1:])) * wave
        filled[name] = torch.from_numpy(values.astype(np.float32)).reshape(tensor.shape)
    return filled


@pytest.fixture(scope="session")
def rule_weights():
    return weights_by_rule(FIDInception().state_dict())


@pytest.fixture(scope="session")
def network(rule_weights):
    network = FIDInception()
    network.load_state_dict(rule_weights)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def weights_file(rule_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(rule_weights, path)
    return path


@pytest.fixture(scope="session")
def pictures():
    """`pictures(count, first=0, size=24)`: smooth coloured images [count, size, size, 3], image k the same in every call."""

    def make(count, *, first=0, size=24):
        images = []
        for k in range(first, first + count):
            draw = np.random.default_rng(k)
            coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            images.append(np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)))
        return np.stack(images)

    return make


@pytest.fixture(scope="session")
def save_pictures():
    """`save_pictures(folder, images)`: one PNG each, in two class folders, in the order of the array."""

    def save(folder, images):
        for k, image in enumerate(images):
            path = folder / ("a" if k < len(images) // 2 else "b") / f"{k:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        return folder

    return save


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dit-pipeline"


@pytest.fixture(scope="session")
def loaded_once():
    """`load_inception`, which reads the same file once."""
    kept = functools.cache(lambda path, sha256: load_inception(InceptionWeights(path=path, sha256=sha256)))
    return lambda weights: kept(weights.path, weights.sha256)


@pytest.fixture
def kept_network(loaded_once, monkeypatch):
    """The same weights are read by one command only."""
    monkeypatch.setattr("sample.evaluate.evaluation.load_inception", loaded_once)


@pytest.fixture
def run(weights_file, kept_network, monkeypatch, capsys):
    """`run(*arguments)`: (status, stdout, stderr); the network is replaced by a projection that costs nothing."""
    from tests.sample.evaluate.test_protocol import stand_in

    monkeypatch.setattr(features, "_features_of_batch", stand_in)

    def go(*arguments):
        status = main([*(str(argument) for argument in arguments), "--inception", str(weights_file)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return go
