"""The tables of docs/scaling.md: `python -m benchmarks.arithmetic [--markdown docs/scaling.md]`.

Bytes are measured on files written for the purpose, operations are counted by PyTorch on tensors without memory, and
times follow from both and from the assumptions named here: nothing in it depends on the machine that runs it.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

from benchmarks.extract import VAES
from benchmarks.report import table
from benchmarks.stores import latent_spec, write_store
from benchmarks.vae import count_vae
from pipeline.dit import DiTConfig
from pipeline.dit.macs import count_macs, count_parameters
from pipeline.dit.memory import (
    CONTEXT_BYTES,
    StepSettings,
    activation_bytes,
    forward_bytes,
    image_px,
    sampling_memory,
    standing_bytes,
    step_memory,
    tabled_networks,
)
from pipeline.features import Columns
from pipeline.vae_lanes import DECODED_PX, PARAMETERS, at_once, decoder_bytes

IMAGENET = 1_281_167

# Assumptions, each a plain number that a reader can replace.
MATMUL = 780e12
"""FLOP/s of bf16 matrix products on one H200 (769 – 798 measured)."""
SHARE = 0.55
"""Part of that which a whole training step reaches: the aim, not a measurement."""
INSIDE = 400e9
"""Bytes/s of an all-reduce's traffic per GPU within one machine of 8 (NVLink 4, 450 GB/s each way on paper)."""
BETWEEN = 360e9
"""The same between machines of 8 GPUs with a 400 Gbit/s link each (50 GB/s on paper, all of them in use at once)."""
SLOW = 12e9
"""The same between machines that have one 100 Gbit/s link."""
DISK = 2e9
"""Bytes/s of writing a checkpoint to a local NVMe disk or a good network file system."""
CORES, LOADED = 16, 250
"""Processor cores beside a GPU, and photographs of 500×375 that one reads, decodes and crops in a second."""
ENCODERS = {"DINOv2-S/14": (384, 12, 6), "DINOv2-B/14": (768, 12, 12), "DINOv2-L/14": (1024, 24, 16)}
"""Width, blocks and heads (Oquab et al. 2023, arXiv 2304.07193)."""
ENCODER_PX, ENCODER_PATCH = 224, 14
GPUS = (1, 8, 64, 512)
CARDS_GB = (24, 80, 141)


def main() -> int:
    """Print the tables, or put them into a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arithmetic", description=__doc__)
    parser.add_argument("--markdown", type=Path, help="fill that page's tables")
    page = parser.parse_args().markdown
    if page is None:
        print("\n\n".join(tables().values()))
    else:
        page.write_text(filled(page.read_text()))
    return 0


def filled(text: str) -> str:
    """A page with the tables between its markers, `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    for name, content in tables().items():
        before, rest = text.split(f"<!-- begin {name} -->", 1)
        _, after = rest.split(f"<!-- end {name} -->", 1)
        text = f"{before}<!-- begin {name} -->\n{content}\n<!-- end {name} -->{after}"
    return text


def tables() -> dict[str, str]:
    """All tables by name."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            "stages": table(stages(Path(folder))),
            "memory": table(memory()),
            "sampling": table(sampling()),
            "features": table(features(6e-9 * count_macs(DiTConfig.from_preset("DiT-XL/2")))),
            "gpus": table(gpus(DiTConfig.from_preset("DiT-XL/2"))),
            "checkpoints": table(checkpoints()),
        }


def stages(folder: Path) -> list[tuple[str, ...]]:
    """Bytes and operations per image of every stage."""
    rows: list[tuple[str, ...]] = [("stage", "256 px", "512 px")]
    views = ("center", "center-hflip")
    for shard_format in ("safetensors", "webdataset"):
        sizes = [stored_bytes(folder / f"{shard_format}-{side}", side, views, shard_format) for side in (32, 64)]
        rows.append((f"store, both views, {shard_format}: bytes per image", *(f"{size:,.0f}" for size in sizes)))
    views_of = [latent_spec(side).view_bytes() for side in (32, 64)]
    rows.append(("training reads, one view: bytes per image", *(f"{size:,}" for size in views_of)))
    whole = [stored_bytes(folder / f"again-{side}", side, views, "safetensors") * IMAGENET / 1e9 for side in (32, 64)]
    rows.append(("store of ImageNet, both views: GB", *(f"{size:,.1f}" for size in whole)))
    for direction in ("encode", "decode"):
        counts = [2e-9 * count_vae(direction, VAES["sd"], side) for side in (256, 512)]
        rows.append((f"{direction} one view, SD's VAE: GFLOP", *(f"{count:,.1f}" for count in counts)))
    nets = [2e-9 * count_macs(DiTConfig.from_preset("DiT-XL/2", input_size=side)) for side in (32, 64)]
    rows.append(("XL/2 forward: GFLOP", *(f"{count:,.1f}" for count in nets)))
    rows.append(("XL/2 training, 3 × forward: GFLOP", *(f"{3 * count:,.1f}" for count in nets)))
    rows.append(("XL/2 sample, 250 steps with guidance: TFLOP", *(f"{0.5 * count:,.1f}" for count in nets)))
    return rows


def features(step: float) -> list[tuple[str, ...]]:
    """What an encoder's features of both views of ImageNet take, and what encoding at every training step would.

    Args:
        step: GFLOP of training XL/2 on one image.
    """
    heads = ("encoder", "parameters, M", "a view, GFLOP", "both views, GPU hours", "the same, loading too", "all, GB")
    rows: list[tuple[str, ...]] = [(*heads, "64 numbers, GB", "class token, GB", "encoding while training")]
    loading = IMAGENET / (CORES * LOADED) / 3600
    for name, (width, depth, heads_) in ENCODERS.items():
        parameters, flops = count_encoder(width, depth, heads_)
        hours = 2 * IMAGENET * flops / (MATMUL * SHARE) / 3600
        patches = (ENCODER_PX // ENCODER_PATCH) ** 2
        kept = [Columns(views=2, tokens=patches, dim=dim, cls=0).sample_bytes for dim in (width, 64)]
        sizes = [f"{IMAGENET * size / 1e9:,.1f}" for size in (*kept, 2 * 2 * width)]
        times = [f"{hours:.2f}", f"{max(hours, loading):.2f}"]
        more = f"+ {flops / 1e9 / step:.1%} of a step"
        rows.append((name, f"{parameters / 1e6:.1f}", f"{flops / 1e9:.1f}", *times, *sizes, more))
    return rows


def count_encoder(width: int, depth: int, heads: int) -> tuple[int, int]:
    """(parameters, operations of one image) of a DINOv2 of that size, as torch counts them without memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    with torch.device("meta"):
        model = Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=ENCODER_PATCH)).eval()
        pixels = torch.empty(1, 3, ENCODER_PX, ENCODER_PX)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=pixels)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def stored_bytes(folder: Path, side: int, views: tuple[str, ...], shard_format: str, samples: int = 64) -> float:
    """Bytes on disk per sample, commit record included, of a shard as large as dit-extract makes them.

    Measured on two small shards, whose difference leaves out what a shard has once.
    """
    sizes = []
    for count in (samples, 2 * samples):
        place = folder / str(count)
        write_store(place, samples=count, side=side, views=views, shard_format=shard_format)
        sizes.append(sum(path.stat().st_size for path in place.glob("train-*")))
    return (sizes[1] - sizes[0]) / samples


def memory() -> list[tuple[str, ...]]:
    """What a training step holds on one GPU in bf16, and how many images fit at a time."""
    heads = ("model", "pixels", "stays, GiB", "casts, GiB", "an image, GiB", "the same, checkpointed", "DDP, GiB more")
    rows: list[tuple[str, ...]] = [(*heads, *(f"images on {gb} GB" for gb in CARDS_GB))]
    for model, config in tabled_networks():
        terms, stays = step_memory(config, StepSettings(images=1)), standing_bytes(config)
        one = [activation_bytes(config, precision="bf16", checkpointing=kept) for kept in (False, True)]
        sizes = (stays, terms["casts"], *one, terms["weights"])
        cells = [f"{value / 2**30:.{digits}f}" for value, digits in zip(sizes, (2, 2, 3, 3, 2), strict=True)]
        most = [max(0, int((gb * 1e9 - CONTEXT_BYTES - stays - terms["casts"]) // one[0])) for gb in CARDS_GB]
        rows.append((model, str(8 * config.height), *cells, *(f"{images:,}" for images in most)))
    return rows


def sampling(batch: int = 128) -> list[tuple[str, ...]]:
    """What guided sampling in bf16 holds on one GPU, with the VAE's decoder in float32 beside it."""
    heads = ("model", "pixels", "weights, GiB", "an image, GiB", f"batch of {batch}, GiB", "with the decoder, GiB")
    rows: list[tuple[str, ...]] = [heads]
    for model, config in tabled_networks():
        terms, pixels = sampling_memory(config, batch), image_px(config)
        whole = sum(terms.values())
        decoder = 4 * PARAMETERS + decoder_bytes(pixels * at_once(DECODED_PX, pixels))
        sizes = (terms["weights"], forward_bytes(config, 1, precision="bf16"), whole, whole + decoder)
        cells = [f"{value / 2**30:.{digits}f}" for value, digits in zip(sizes, (2, 3, 1, 1), strict=True)]
        rows.append((model, str(8 * config.height), *cells))
    return rows


def gpus(config: DiTConfig, batch: int = 256) -> list[tuple[str, ...]]:
    """What each number of GPUs has to do per step of XL/2 at 256 pixels, and how long that takes at best."""
    parameters, flops = count_parameters(config), 6.0 * count_macs(config)
    view = latent_spec(config.height).view_bytes()
    rows: list[tuple[str, ...]] = [
        (
            "GPUs",
            "global batch",
            "images per GPU",
            "compute, ms",
            "all-reduce, GB",
            "8 × 400 Gbit/s, ms",
            "1 × 100 Gbit/s, ms",
            "images/s at best",
            "the same, 100 Gbit/s",
            "store reads, MB/s",
        )
    ]
    for count in GPUS:
        for whole in sorted({batch, max(batch, 32 * count)}):
            if whole % count:
                continue
            compute = whole // count * flops / (MATMUL * SHARE)
            sent = 2 * (count - 1) / count * 4 * parameters  # float32 gradients, as a ring sends them
            fast, slow = (sent / (INSIDE if count <= 8 else speed) for speed in (BETWEEN, SLOW))
            best, worse = (whole / max(compute, reduce) for reduce in (fast, slow))  # beside the backward pass
            milliseconds = [f"{1e3 * fast:,.0f}", f"{1e3 * slow:,.0f}"]
            images = [f"{best:,.0f}", f"{worse:,.0f}", f"{best * view / 1e6:,.0f}"]
            place = [f"{count}", f"{whole:,}", f"{whole // count}", f"{1e3 * compute:,.0f}", f"{sent / 1e9:,.1f}"]
            rows.append((*place, *milliseconds, *images))
    return rows


def checkpoints() -> list[tuple[str, ...]]:
    """Sizes of a checkpoint and how long writing it takes."""
    rows: list[tuple[str, ...]] = [
        ("model", "model.safetensors", "ema.safetensors", "state/ (AdamW)", "whole", f"written at {DISK / 1e9:g} GB/s")
    ]
    for name in ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2"):
        one = 4 * count_parameters(DiTConfig.from_preset(name))
        cells = [f"{one / 1e9:.2f} GB", f"{one / 1e9:.2f} GB", f"{2 * one / 1e9:.2f} GB", f"{4 * one / 1e9:.2f} GB"]
        rows.append((name, *cells, f"{math.ceil(10 * 4 * one / DISK) / 10:.1f} s"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
