"""A DiT written as the folder that `diffusers.DiTPipeline.from_pretrained` opens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint.diffusers_read import PIPELINE_NULL_CLASS, to_diffusers
from pipeline.checkpoint.folder import Stored
from pipeline.checkpoint.tensor_files import save_safetensors
from pipeline.diffusers_vae import write_vae
from pipeline.dit import DiTConfig
from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, write_json
from pipeline.vae import Vae

_PREDICTION_TYPES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
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
    scheduler = _scheduler_settings(stored.info["diffusion"])
    used_vae = write_vae(folder / "vae", stored.info["vae"], vae, channels=config.in_channels)
    rows = _label_rows(config)
    for part in ("transformer", "scheduler"):
        make_folder(folder / part)
    write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler, **stamp})
    write_json(folder / "transformer" / "config.json", {**_transformer_settings(config, rows), **stamp})
    save_safetensors(
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        to_diffusers(stored.state, config, label_rows=rows),
    )
    info = {**stored.info, "vae": recorded_vae({} if vae else stored.info["vae"], used_vae)}
    names = info["classes"] or [str(label) for label in range(config.num_classes)]
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


def recorded_vae(recorded: Mapping[str, Any], loaded: Vae | None) -> dict[str, Any]:
    """What to remember of a VAE in a new place: no path of this machine, and its fingerprint if it is at hand."""
    facts = dict(recorded) if loaded is None else loaded.describe()
    known = recorded.get("recorded") or {}
    facts.pop("recorded", None)
    name = facts.get("name")
    return {**facts, "name": Path(name).name if name and Path(name).is_absolute() else name, **known}


def _check_expressible(config: DiTConfig) -> None:
    """Refuse what diffusers' class does not have; every such thing is named."""
    reasons = {
        f"the conditioning is {config.conditioning}, not adaln-zero": config.conditioning != "adaln-zero",
        f"the latent is {config.height}×{config.width}, not square": config.height != config.width,
        f"the MLP is {config.mlp_ratio:g} times the width, not 4": config.mlp_ratio != 4,
        "queries and keys are normalised": config.qk_norm,
    }
    wrong = [reason for reason, applies in reasons.items() if applies]
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


def _scheduler_settings(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """DDIM with the process's own betas; for flow, a solver of diffusers' that its DiT pipeline can drive."""
    if diffusion["objective"] == "flow":
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 1.0,
        }
    steps = diffusion["steps"]
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    linear = {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps}
    return {
        "_class_name": "DDIMScheduler",
        **(cosine if diffusion["schedule"] == "cosine" else linear),
        "clip_sample": False,
        "num_train_timesteps": steps,
        "prediction_type": _PREDICTION_TYPES[diffusion["prediction"]],
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }
