"""Tiny vision encoders and VAEs with random weights, written by transformers and diffusers themselves."""

import json

import torch


def write_encoder(folder, kind="Dinov2", *, seed=0, px=28, width=8, center_crop=True, **settings):
    """A model and its image processor's settings in a folder, as save_pretrained writes them."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=px,
        **{"patch_size": 14, **settings},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    side = {"height": px, "width": px}
    pixels = {"do_center_crop": True, "size": {"shortest_edge": px + 4}, "crop_size": side}
    processor = {
        "image_processor_type": "BitImageProcessor" if center_crop else "ViTImageProcessor",
        **(pixels if center_crop else {"size": side}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_vae(folder, **settings):
    """An AutoencoderKL with down-factor 8 in a folder, as save_pretrained writes it."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
            **{"block_out_channels": (4, 4, 4, 4), **settings},
        ).save_pretrained(folder)
    return folder
