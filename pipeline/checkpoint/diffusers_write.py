"""A DiT written as the folder that `diffusers.DiTPipeline.from_pretrained` opens, its VAE beside it.

`DiTPipeline` decodes latents / scaling_factor and knows neither a shift nor a factor per channel. Both are affine, and
so are the 1×1 convolutions on either side of an AutoencoderKL's latent: they can take them in without any loss.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.diffusers_read import PIPELINE_NULL_CLASS, to_diffusers
from pipeline.checkpoint.forms import Stored
from pipeline.checkpoint.release import unlike_the_release
from pipeline.checkpoint.tensor_files import read_safetensors, save_safetensors
from pipeline.dit import DiTConfig
from pipeline.recorded import RecordedVae
from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, write_json
from pipeline.vae import Vae, check_latents, find_vae
from pipeline.vae_folder import WEIGHTS, find_folder, read_config, weight_files

_KEPT = ("step", "class_ids", "diffusion", "vae", "image", "training")


def write_diffusers(folder: Path, stored: Stored, *, vae: str | None) -> None:
    """Fill an empty folder with model_index.json, transformer/, scheduler/ and, if it can be found, vae/.

    Args:
        vae: where the VAE is, instead of its recorded name.

    Raises:
        UserError: diffusers' DiT cannot hold this network, or `vae` is not the VAE it was trained on.
    """
    import diffusers

    config = stored.config
    _check_expressible(config)
    stamp = {"_diffusers_version": diffusers.__version__}
    scheduler = stored.info.process.diffusers_scheduler()
    used_vae = _write_vae(folder / "vae", stored.info.vae, vae, channels=config.in_channels)
    rows = _label_rows(config)
    for part in ("transformer", "scheduler"):
        make_folder(folder / part)
    write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler, **stamp})
    write_json(folder / "transformer" / "config.json", {**_transformer_settings(config, rows), **stamp})
    save_safetensors(
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        to_diffusers(stored.state, config, label_rows=rows),
        sealed=True,
    )
    info = {**stored.info, "vae": recorded_vae(None if vae else stored.info.vae, used_vae)}
    names = stored.info.classes or [str(label) for label in range(config.num_classes)]
    index = {
        "_class_name": "DiTPipeline",
        **stamp,
        # What diffusers has no place for; it passes over keys that begin with an underscore.
        "_dit": {"weights": stored.weights, **{key: info[key] for key in _KEPT}},
        "id2label": {str(label): name for label, name in enumerate(names)},
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", used_vae.class_name] if used_vae else [None, None],
    }
    write_json(folder / "model_index.json", index)


def recorded_vae(recorded: RecordedVae | None, loaded: Vae | None) -> dict[str, Any]:
    """What to remember of a VAE in a new place: no path of this machine, and its fingerprint if it is at hand."""
    facts = loaded.describe() if loaded is not None else dict(recorded or {})
    known = (recorded and recorded.recorded) or {}
    facts.pop("recorded", None)
    name = facts.get("name")
    return {**facts, "name": Path(name).name if name and Path(name).is_absolute() else name, **known}


def _check_expressible(config: DiTConfig) -> None:
    """Refuse what diffusers' class does not have; every such thing is named."""
    wrong = unlike_the_release(config)
    wrong += [f"its MLP is {config.mlp_ratio:g} times the width, not 4"] * (config.mlp_ratio != 4)
    if wrong:
        raise UserError(f"diffusers' DiT cannot hold this network: {'; '.join(wrong)}; keep it with --format dit")


def _label_rows(config: DiTConfig) -> int:
    """Rows of diffusers' label table: enough that the label its pipeline takes for "no class" is in it."""
    if config.num_classes > PIPELINE_NULL_CLASS:
        warn(
            f"diffusers' DiTPipeline takes label {PIPELINE_NULL_CLASS} for no class, which is a class of this "
            f"network; pass guidance_scale=1 there"
        )
    elif not config.has_null_class:
        warn("this network has no null class, so guidance means nothing; pass guidance_scale=1 to DiTPipeline")
    return max(config.num_classes, PIPELINE_NULL_CLASS) + 1


def _transformer_settings(config: DiTConfig, label_rows: int) -> dict[str, Any]:
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": label_rows - 1,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.height,
    }


def _write_vae(folder: Path, recorded: RecordedVae, override: str | None, *, channels: int) -> Vae | None:
    """Write the recorded VAE into the folder and give it; None, and a word on what to do, if it cannot be found.

    Raises:
        UserError: `override` names no VAE, another one than the recorded, or one of other `channels`.
    """
    try:
        vae = find_vae(recorded, override)
    except UserError as error:
        if override is not None:
            raise
        warn(
            f"the folder has no VAE, because {error}; convert again with --vae, or open it with "
            f"DiTPipeline.from_pretrained(FOLDER, vae=AutoencoderKL.from_pretrained(…))"
        )
        return None
    check_latents(vae, channels=channels)
    if vae.is_from_zero:
        raise UserError(
            "the latents are of pixels in [0, 1], as EDM2 makes them, which a diffusers pipeline cannot be told: its "
            "pictures would be pale; keep the network with --format dit"
        )
    source, _ = find_folder(override or str(recorded.name))
    make_folder(folder)
    if not vae.shift_factor and not isinstance(vae.scaling_factor, list):
        for file in (source / "config.json", *weight_files(source, vae.name), *source.glob("*.safetensors.index.json")):
            shutil.copyfile(file, folder / file.name)
        return vae
    config: dict[str, Any] = dict(read_config(source, vae.name))
    tensors = {name: t for file in weight_files(source, vae.name) for name, t in read_safetensors(file).items()}
    if {"quant_conv.weight", "post_quant_conv.weight"} <= tensors.keys():
        config, tensors = fold_normalization(config, tensors, vae.scaling_factor, vae.shift_factor)
    else:
        warn(
            f"diffusers' DiTPipeline knows one scaling factor and no shift, and the VAE {vae.name} has no layer to "
            f"take more in, so the pipeline will decode its latents wrongly"
        )
    write_json(folder / "config.json", config)
    save_safetensors(folder / WEIGHTS, tensors)
    return vae


def fold_normalization(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    scale: float | list[float],
    shift: float | list[float] | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The AutoencoderKL whose normalised latents are the same with one scaling factor and no shift.

    With s the one factor (the VAE's own, or 1 where it has one per channel), u the new and z the old latent,
    u = (z − shift) · scale / s: the layer before the latent computes u, the layer after it takes u back to z.
    """
    before_weight, before_bias = tensors["quant_conv.weight"].double(), tensors["quant_conv.bias"].double()
    after_weight, after_bias = tensors["post_quant_conv.weight"].double(), tensors["post_quant_conv.bias"].double()
    channels = len(after_bias)
    factor = 1.0 if isinstance(scale, list) else float(scale)
    scales = torch.as_tensor(scale, dtype=torch.float64).expand(channels) / factor
    shifts = torch.as_tensor(shift or 0.0, dtype=torch.float64).expand(channels)
    mean_weight, logvar_weight = before_weight.chunk(2)
    mean_bias, logvar_bias = before_bias.chunk(2)
    folded = {
        "quant_conv.weight": torch.cat([mean_weight * scales[:, None, None, None], logvar_weight]),
        "quant_conv.bias": torch.cat([(mean_bias - shifts) * scales, logvar_bias + 2 * scales.log()]),
        "post_quant_conv.weight": after_weight / scales[None, :, None, None],
        "post_quant_conv.bias": after_bias + after_weight[:, :, 0, 0] @ shifts,
    }
    same = {"scaling_factor": factor, "shift_factor": None, "latents_mean": None, "latents_std": None}
    return {**config, **same}, {**tensors, **{name: value.to(tensors[name].dtype) for name, value in folded.items()}}
