"""The other network that --guide names, read and checked to predict the same thing for the same latents."""

from pathlib import Path
from typing import Any

from pipeline.checkpoint import Checkpoint, read_checkpoint
from pipeline.checkpoint.tensor_files import join_names
from pipeline.diffusion.process import OF_TRAINING
from pipeline.runtime.errors import UserError
from pipeline.runtime.units import factors

DEFAULT_WEIGHTS = "ema"
MAY_DIFFER = OF_TRAINING | {"variance", "time_shift"}
"""Settings of a process in which the guide may differ: those of training, and what samplers ask of one alone."""


def split_weights(given: str) -> tuple[str, str]:
    """(checkpoint, weights) of CHECKPOINT[@WEIGHTS]; what is a path as it stands may have an @ in it."""
    path, at, weights = given.rpartition("@")
    if not at or not path or Path(given).exists() or "/" in weights:
        return given, DEFAULT_WEIGHTS
    return path, weights


def read_guide(given: str, checkpoint: Checkpoint, *, objective: str | None, verify: bool) -> Checkpoint:
    """The network that guides the checkpoint's.

    Args:
        given: CHECKPOINT[@WEIGHTS].
        objective: what bare weights were trained for, which they do not say.

    Raises:
        UserError: it cannot be read, or does not predict what the checkpoint's network does; every difference is told.
    """
    path, weights = split_weights(given)
    guide = read_checkpoint(path, weights=weights, objective=objective, verify=verify)
    wrong = _differences(checkpoint, guide)
    if wrong:
        raise UserError(f"--guide {given} cannot guide this checkpoint: {'; '.join(wrong)}; choose one that fits it")
    return guide


def _differences(checkpoint: Checkpoint, guide: Checkpoint) -> list[str]:
    ours, its = checkpoint.config, guide.config
    facts: dict[str, tuple[Any, Any]] = {
        "latents": (
            f"{ours.in_channels}×{ours.height}×{ours.width}",
            f"{its.in_channels}×{its.height}×{its.width}",
        ),
        "classes": (ours.num_classes, its.num_classes),
        "class token": (ours.class_token, its.class_token),
    }
    process, its_process = checkpoint.process.to_json(), guide.process.to_json()
    for name in sorted((process.keys() | its_process.keys()) - MAY_DIFFER):
        facts[name.replace("_", " ")] = (process.get(name), its_process.get(name))
    wrong = [f"its {name} {_brief(b)}, not {_brief(a)}" for name, (a, b) in facts.items() if a != b]

    # what may be unknown of weights that came alone
    vae, its_vae = checkpoint.info.vae, guide.info.vae
    hashes = vae.sha256, its_vae.sha256
    if all(hashes) and hashes[0] != hashes[1]:
        wrong.append(f"its VAE is {its_vae.name}, of another fingerprint than {vae.name}")
    elif checkpoint.folder and guide.folder and vae.scaling_factor != its_vae.scaling_factor:
        wrong.append(f"its latents are scaled by {factors(its_vae.scaling_factor)}, not {factors(vae.scaling_factor)}")
    if checkpoint.info.training.class_token != guide.info.training.class_token:
        wrong.append("its class token is fed by other statistics")
    ids, its_ids = checkpoint.info.class_ids, guide.info.class_ids
    if checkpoint.folder and guide.folder and len(ids) == len(its_ids) and ids != its_ids:
        others = [f"{b} for {a}" for a, b in zip(ids, its_ids, strict=True) if a != b]
        wrong.append(f"its classes are others: {join_names(others)}")
    return wrong


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
