"""Folders of diffusers and transformers, one of whose JSON files is given: read as far as the gates, or by the library."""

import json
import os
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.checkpoint import diffusers_read
from pipeline.features.encoder import find_encoder, load_encoder, read_settings
from pipeline.vae import load_vae
from pipeline.vae_folder import DEMO_FOLDER, WEIGHTS, check_sizes, read_config, shard_names, weight_files
from tests.encoders import write_encoder

VAE_CONFIG: dict[str, Any] = json.loads((DEMO_FOLDER / "config.json").read_text())
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "a-00001-of-00002.safetensors", "b": "b.safetensors"}}
TRANSFORMER = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 8,
    "patch_size": 2,
    "num_layers": 1,
    "norm_type": "ada_norm_zero",
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
PIPELINE = {
    "_class_name": "DiTPipeline",
    "id2label": {"0": "ant", "1": "bee"},
    "_dit": {"weights": "ema", "step": 3, "diffusion": {"objective": "ddpm"}, "class_ids": ["a", "b"], "vae": {}},
}

FILES = {
    "model_index.json": PIPELINE,
    "transformer/config.json": TRANSFORMER,
    "scheduler/scheduler_config.json": SCHEDULER,
    "vae/config.json": VAE_CONFIG,
}
"""Of a pipeline; the scheduler tells the process where model_index.json does not."""


def read_vae(folder: Path, data: bytes, *, load: bool = False) -> None:
    """A VAE whose config.json this is."""
    if not (folder / WEIGHTS).exists():
        (folder / WEIGHTS).symlink_to(DEMO_FOLDER / WEIGHTS)
    (folder / "config.json").write_bytes(data)
    if load:
        load_vae(str(folder))
    else:
        check_sizes(read_config(folder, "x"), weight_files(folder, "x"), "x")


@cache
def _encoder() -> Path:
    return write_encoder(Path(mkdtemp()))


def encoder_json(name: str) -> Any:
    return json.loads((_encoder() / name).read_text())


def read_encoder(name: str, folder: Path, data: bytes, *, load: bool = False) -> None:
    """An encoder one of whose JSON files this is."""
    for path in _encoder().iterdir():
        if path.name != name and not (folder / path.name).exists():
            os.link(path, folder / path.name)
    (folder / name).write_bytes(data)
    found = find_encoder(str(folder))
    if load:
        load_encoder(found, device=torch.device("cpu"), dtype=torch.float32)


def read_encoder_settings(name: str, folder: Path, data: bytes) -> None:
    """As far as the gate: an encoder one of whose JSON files this is."""
    for path in _encoder().glob("*.json"):
        if path.name != name and not (folder / path.name).exists():
            os.link(path, folder / path.name)
    (folder / name).write_bytes(data)
    read_settings(folder)


def read_index(folder: Path, data: bytes) -> None:
    (folder / "x.index.json").write_bytes(data)
    for name in shard_names(folder / "x.index.json"):
        assert name.isprintable() and "/" not in name


def read_pipeline(name: str, folder: Path, data: bytes) -> None:
    """A pipeline's folder of a DiT, one of whose JSON files this is."""
    untold = {"model_index.json": {**PIPELINE, "_dit": {}}} if name.startswith("scheduler") else {}
    for file, content in (FILES | untold).items():
        (folder / file).parent.mkdir(exist_ok=True)
        if not (folder / file).exists():
            (folder / file).write_text(json.dumps(content))
    if not (folder / "transformer" / WEIGHTS).exists():
        save_file(_dit_tensors(), folder / "transformer" / WEIGHTS)
    (folder / name).write_bytes(data)
    diffusers_read.read_diffusers(folder)
    diffusers_read.recorded_weights(folder)


def _dit_tensors() -> dict[str, torch.Tensor]:
    """The tensors of TRANSFORMER."""
    from diffusers import DiTTransformer2DModel

    settings = {name: value for name, value in TRANSFORMER.items() if not name.startswith("_")}
    model = DiTTransformer2DModel(**settings, num_embeds_ada_norm=3)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
