"""A checkpoint or a run in words: network, step, objective, classes, VAE, weights and their checksums."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.checkpoint.folder import checkpoint_folders, find_damage, weight_files
from pipeline.checkpoint.forms import Stored, build_model, read_stored
from pipeline.checkpoint.remote import localized
from pipeline.checkpoint.tensor_files import files_of, not_finite
from pipeline.dit import PRESETS, DiTConfig
from pipeline.dit.macs import count_macs, count_parameters
from pipeline.inspect.tables import facts, shortened
from pipeline.recorded import RecordedVae
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of
from pipeline.runtime.units import factors, size


def describe_checkpoint(path: str, *, verify: bool, asked: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
    """What a checkpoint of any form is; of a run also which steps it has kept.

    Args:
        asked: what the user says of weights that came alone, as `read_stored` takes it: num_heads, objective.

    Raises:
        UserError: it cannot be read, or, if it is to be verified, its tensors do not fit or are not finite.
    """
    lines = []
    run = localized(path, whole=verify)
    steps = checkpoint_folders(run)
    if steps:
        kept = "  ".join(f"{step:,}" for step, _ in steps)
        lines += [*facts({"run": path, "checkpoints": f"at step {kept}"}), ""]
    stored = _any_weights(path, asked)
    files = _files_of(stored.folder) if stored.folder is not None else {}
    lines += facts({**_facts_of(path, stored), **files})
    if verify:
        lines += _verified(path, stored)
    return lines


def _any_weights(path: str, asked: Mapping[str, Any]) -> Stored:
    """The EMA weights, or the raw ones where there is no average (a damaged one is an error)."""
    try:
        return read_stored(path, **asked, verify=False)
    except UserError as error:
        try:
            raw = read_stored(path, weights="raw", **asked, verify=False)
        except UserError:
            raise error from None
        if raw.folder is not None and "ema" in weight_files(raw.folder):
            raise
        return raw


def _facts_of(path: str, stored: Stored) -> dict[str, object]:
    config, info = stored.config, stored.info
    where = stored.folder or path
    training = ", ".join(f"{key} {value}" for key, value in info.training.items() if not isinstance(value, dict | list))
    return {
        "checkpoint": where,
        "step": f"{info.step:,}" if stored.folder is not None or info.step else "not recorded",
        "model": f"{preset_name(config)}, {config.conditioning}",
        "parameters": f"{count_parameters(config):,}",
        "operations": f"{count_macs(config) / 1e9:.3f} GFLOPs (10⁹ multiply-adds of one forward pass)",
        "network": (
            f"width {config.hidden_size}, depth {config.depth}, {config.num_heads} heads, patch {config.patch_size}, "
            f"MLP ×{config.mlp_ratio:g}{''.join(f', {said}' for said in _special_blocks(config))}"
        ),
        "latent": f"{config.in_channels}×{config.height}×{config.width} ({info.latent.kind})",
        "image": f"{info.image.size} px, {info.image.crop}",
        "objective": _objective(info.diffusion) if stored.origin.known else "not recorded",
        "note": stored.origin.note,
        "classes": shortened(list(info.classes)) if config.num_classes else "none (unconditional)",
        "guidance": "possible" if config.has_null_class and config.num_classes else "not possible (no null class)",
        "VAE": _vae(info.vae),
        "training": training,
    }


def _special_blocks(config: DiTConfig) -> Iterator[str]:
    """How the blocks differ from the release's."""
    yield from ["normalised queries and keys"] * config.qk_norm
    yield from ["SwiGLU"] * (config.mlp == "swiglu")
    yield from ["RMSNorm"] * (config.norm == "rms")
    yield from ["rotary positions"] * config.rotary
    yield from ["value residual"] * config.value_residual
    yield from [f"a class token of {config.class_token} numbers"] * bool(config.class_token)
    yield from [f"a head of width {config.head_width}, depth {config.head_depth}"] * bool(config.head_width)


def preset_name(config: DiTConfig) -> str:
    """What the paper's table calls a network of this size."""
    sizes = {key: getattr(config, key) for key in ("hidden_size", "depth", "num_heads", "patch_size")}
    names = [name for name, preset in PRESETS.items() if preset == sizes]
    return names[0] if names else "of no published size"


def _objective(diffusion: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in diffusion.items() if key != "objective")
    return f"{diffusion['objective']} ({settings})"


def _vae(vae: RecordedVae) -> str:
    return (
        f"{vae.name or 'not recorded'} ({vae.class_name}), scale {factors(vae.scaling_factor)}, "
        f"shift {factors(vae.shift_factor)}, {f'sha256 {vae.sha256}' if vae.sha256 else 'fingerprint not recorded'}"
    )


def _files_of(folder: Path) -> dict[str, str]:
    files = {name: _described(file) for name, file in weight_files(folder).items()}
    state = folder / "state"
    kept = [file for file in state.rglob("*") if file.is_file()]
    total = size(sum(file.stat().st_size for file in kept))
    return files | {"resuming": f"possible, state/ takes {total}" if kept else "not possible, there is no state/"}


def _described(file: Path) -> str:
    parts = files_of(file)
    held = size(sum(part.stat().st_size for part in parts))
    return f"{file.name}, {held}, {f'in {len(parts) - 1} shards' if parts != [file] else f'sha256 {sha256_of(file)}'}"


def _verified(path: str, stored: Stored) -> list[str]:
    """Every kind of weights loaded strictly and searched for values that are no numbers."""
    damage = find_damage(stored.folder) if stored.folder is not None else stored.damage()
    if damage:
        raise UserError(f"{stored.folder or path} is damaged: {damage}; restore it or take an earlier checkpoint")
    if stored.folder is None:
        kinds = [stored]
    else:
        names = weight_files(stored.folder)
        kinds = [read_stored(stored.folder, weights=name, verify=False) for name in names]
    for each in kinds:
        build_model(each, origin=path)
        wrong = not_finite(each.state)
        if wrong:
            raise UserError(
                f"the {each.weights} weights of {path} hold values that are not finite: {', '.join(wrong)}; "
                f"take an earlier checkpoint"
            )
    fit = " and ".join(each.weights for each in kinds)
    return ["", f"verified: {fit} fit the network exactly, every value is finite"]
