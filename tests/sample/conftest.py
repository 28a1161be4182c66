"""A tiny checkpoint with random weights, its VAE, and the command run in this process."""

import contextlib
import json

import pytest
import torch

from pipeline.checkpoint.folder import write_model_files
from pipeline.diffusion import GaussianDiffusion
from pipeline.dit import DiT, DiTConfig
from pipeline.randomness import generator
from pipeline.vae import load_vae
from sample.__main__ import main

NAMES = ["zero, nought", "one", "two", "crane", "crane", "golden retriever", "six", "seven"]
FOLDERS = [f"n0{label}" for label in range(8)]


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """An AutoencoderKL of 8-fold down-sampling with random weights, in diffusers' layout."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae") / "tiny-vae"
    with torch.random.fork_rng():
        model = AutoencoderKL(
            block_out_channels=(4, 4, 4, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            sample_size=64,
        )
    fill(model, "vae")
    model.save_pretrained(folder)
    return folder


def fill(model, purpose):
    draws = generator(0, purpose)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, vae_folder):
    """Writes a checkpoint of a network with random weights; the fields of its config can be replaced."""
    vae = load_vae(str(vae_folder)).describe()

    def make(name, *, averages=("ema",), process=None, poison=False, info=None, **config):
        network = DiTConfig(
            **{"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 8, **config}
        )
        model = DiT(network)
        fill(model, name)
        if poison:
            with torch.no_grad():
                model.y_embedder.embedding_table.weight[1] = float("nan")
        folder = tmp_path_factory.mktemp("checkpoints") / name
        folder.mkdir()
        count = network.num_classes
        about = {
            "step": 10,
            "model": network.to_json(),
            "diffusion": (process or GaussianDiffusion()).to_json(),
            "classes": NAMES[:count],
            "class_ids": FOLDERS[:count],
            "latent": {"kind": "moments", "channels": 4, "height": 8, "width": 8, "downsample": 8},
            "vae": vae,
            "image": {"size": 64, "crop": "adm-center"},
            "training": {},
            **(info or {}),
        }
        state = model.state_dict()
        write_model_files(folder, info=about, model=state, averages=dict.fromkeys(averages, state), sums=True)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(make_checkpoint):
    """A conditional checkpoint with EMA weights."""
    return make_checkpoint("tiny")


@pytest.fixture(scope="session")
def smallest(make_checkpoint):
    """One whose images have 16 pixels, which the metrics on pixels are quick with."""
    latent = {"kind": "moments", "channels": 4, "height": 2, "width": 2, "downsample": 8}
    image = {"size": 16, "crop": "adm-center"}
    return make_checkpoint("smallest", input_size=2, info={"latent": latent, "image": image})


@pytest.fixture
def command(tiny, vae_folder, capsys):
    """Runs dit-sample in this process with few steps; gives its exit status and what it said."""

    def run(*arguments, checkpoint=tiny, vae=vae_folder, steps=3):
        given = [] if vae is None else ["--vae", str(vae)]
        given += [] if steps is None else ["--steps", str(steps)]
        status = main(["--checkpoint", str(checkpoint), *given, *map(str, arguments)])
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def read_json():
    return lambda path: json.loads(path.read_text())


@pytest.fixture
def noted_tf32():
    """In place of `float32_products`: `here` has what the blocks around this moment ask for, the innermost last."""

    @contextlib.contextmanager
    def noted(_device, *, tf32):
        noted.here.append(tf32)
        yield
        noted.here.pop()

    noted.here = []
    return noted
