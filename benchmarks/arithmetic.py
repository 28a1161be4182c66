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
    standing_bytes,
    step_memory,
    tabled_networks,
)

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
