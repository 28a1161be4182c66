"""A DiT pipeline fetched from the Hugging Face Hub: settings first, then only the weights that are needed."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json


def fetch_pipeline(name: str) -> Path:
    """The local folder of the Hub's diffusers DiT pipeline of that name, from the Hub's cache if it is there.

    Raises:
        UserError: the Hub cannot be reached and holds no cached copy, has no such repository, or it is no DiT.
    """
    folder = _download(name, ["*.json"])
    index = folder / "model_index.json"
    kind = read_json(index).get("_class_name") if index.is_file() else "repository without model_index.json"
    if kind != "DiTPipeline":
        raise UserError(f"{name} on the Hub is a {kind}, not a DiTPipeline; give the name of a diffusers DiT pipeline")
    for suffix in (".safetensors", ".bin"):
        folder = _download(name, _weights("transformer", suffix))
        if any((folder / "transformer").glob(f"*{suffix}")):
            break
    with contextlib.suppress(UserError):  # a cached copy without the VAE still is a network
        _download(name, _weights("vae", ".safetensors"))
    return folder


def _weights(part: str, suffix: str) -> list[str]:
    """Patterns of a part's weights, whole or in shards, but not of its half-precision variants."""
    return ["*.json", *(f"{part}/diffusion_pytorch_model{shard}{suffix}" for shard in ("", "-0*"))]


def _download(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # requests, httpx, the Hub and the disk each have errors of their own
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"there is neither a file or folder {name} here nor could the Hub's repository of that name be fetched "
            f"({type(error).__name__}: {reason}); check the spelling and the network, or give a downloaded folder"
        ) from error
