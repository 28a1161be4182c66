"""What the commands read, made once in a folder: images, tars, a VAE, stores, a run, checkpoints, features, pictures."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.runtime.files import sha256_of
from tests.encoders import write_encoder, write_vae


def make_inputs(folder, run):
    """Fill the folder `in` of a place; `run(words)` is a command of ours, undisturbed."""
    folder = Path(folder)
    for number in range(5):
        _write(folder / "images" / "ab"[number % 2] / f"{number}.png", _picture(number))
        _write(folder / "flat" / f"{number}.png", _picture(number))
    _write(folder / "flat" / "bad.png", b"no picture")
    _write_tars(folder / "web")
    write_vae(folder / "vae", sample_size=32)
    write_encoder(folder / "encoder")
    for name, first in (("pictures", 0), ("others", 10)):
        np.savez(folder / f"{name}.npz", arr_0=np.stack([_pixels(number) for number in range(first, first + 4)]))
    for name, seed in (("features", 0), ("features-2", 1)):
        _write_features(folder / name, seed)
    _write_inception(folder / "inception.safetensors")
    _write_checkpoint(folder / "checkpoint", "one")
    _write_checkpoint(folder / "checkpoint-2", "two")
    extract = ["extract", "--data", "in/images", "--vae", "in/vae", "--image-size", "32", "--device", "cpu"]
    for store in ("in/store", "in/web/store"):
        run([*extract, "--samples-per-shard", "3", "--out", store])
    train = ["train", "--latents", "in/store", "--model", "DiT-Ti/2", "--batch-size", "4", "--device", "cpu"]
    train += ["--steps", "3", "--log-every", "1", "--sample-every", "0", "--no-tensorboard"]
    for seed, name in enumerate(("run", "run-2")):
        run([*train, "--out", f"in/{name}", "--seed", f"{seed}"])


def _write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _pixels(number):
    y, x = np.mgrid[0:32, 0:32]
    return np.stack([(x * (3 + number) + y * k * 5 + number * 31) % 256 for k in range(3)], -1).astype(np.uint8)


def _picture(number):
    file = io.BytesIO()
    Image.fromarray(_pixels(number)).save(file, "PNG")
    return file.getvalue()


def _write_tars(folder):
    folder.mkdir()
    for part in range(2):
        with tarfile.open(folder / f"part-{part}.tar", "w") as archive:
            for number in (2 * part, 2 * part + 1):
                for ending, data in (("png", _picture(number)), ("cls", b"%d" % (number % 2))):
                    entry = tarfile.TarInfo(f"{number}.{ending}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))


def _write_features(folder, seed):
    draws = np.random.default_rng(seed)
    for number in range(4):
        for kind in ("features", "labels"):
            (folder / f"tiny_{kind}").mkdir(parents=True, exist_ok=True)
        np.save(folder / "tiny_features" / f"{number}.npy", draws.standard_normal((1, 4, 4, 4)).astype(np.float32))
        np.save(folder / "tiny_labels" / f"{number}.npy", np.array([number % 2]))


def _write_inception(path):
    """A file for weights that nothing loads, of a few of the pieces that a download is written in."""
    save_file({"weights": torch.zeros(75_000)}, path)
    served = path.with_name("web") / f"{path.stem}-{sha256_of(path)[:8]}{path.suffix}"
    served.hardlink_to(path)


def _write_checkpoint(folder, name):
    from pipeline.checkpoint.folder import write_model_files
    from pipeline.diffusion import GaussianDiffusion
    from pipeline.dit import DiT, DiTConfig
    from pipeline.randomness import generator
    from pipeline.vae import load_vae

    network = DiTConfig(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    model, draws = DiT(network), generator(0, name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    info = {
        "step": 1,
        "model": network.to_json(),
        "diffusion": GaussianDiffusion().to_json(),
        "classes": ["a", "b"],
        "class_ids": ["a", "b"],
        "latent": {"kind": "moments", "channels": 4, "height": 4, "width": 4, "downsample": 8},
        "vae": load_vae(str(folder.parent / "vae")).describe(),
        "image": {"size": 32, "crop": "adm-center"},
        "training": {},
    }
    folder.mkdir()
    state = model.state_dict()
    write_model_files(folder, info=info, model=state, averages={"ema": state})
