"""The VAE of a pipeline folder: copied, or rewritten so that a pipeline that knows one factor decodes it right.

`DiTPipeline` decodes latents / scaling_factor and knows neither a shift nor a factor per channel. Both are affine, and
so are the 1×1 convolutions on either side of an AutoencoderKL's latent: they can take them in without any loss.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.tensor_files import read_safetensors, save_safetensors
from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, write_json
from pipeline.vae import Vae, check_latents, find_vae
from pipeline.vae_folder import WEIGHTS, find_folder, read_config, weight_files


def write_vae(folder: Path, recorded: Mapping[str, Any], override: str | None, *, channels: int) -> Vae | None:
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
    source, _ = find_folder(override or recorded["name"])
    make_folder(folder)
    if not vae.shift_factor and not isinstance(vae.scaling_factor, list):
        for file in (source / "config.json", *weight_files(source, vae.name), *source.glob("*.safetensors.index.json")):
            shutil.copyfile(file, folder / file.name)
        return vae
    config = read_config(source, vae.name)
    tensors = {name: t for file in weight_files(source, vae.name) for name, t in read_safetensors(file).items()}
    if {"quant_conv.weight", "post_quant_conv.weight"} <= tensors.keys():
        config, tensors = fold_normalisation(config, tensors, vae.scaling_factor, vae.shift_factor)
    else:
        warn(
            f"diffusers' DiTPipeline knows one scaling factor and no shift, and the VAE {vae.name} has no layer to "
            f"take more in, so the pipeline will decode its latents wrongly"
        )
    write_json(folder / "config.json", config)
    save_safetensors(folder / WEIGHTS, tensors)
    return vae


def fold_normalisation(
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
