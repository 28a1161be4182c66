"""The paper's table of models, counted here and as printed there."""

from collections.abc import Iterator

from pipeline.dit.config import DiTConfig
from pipeline.dit.macs import models_table, modern_table
from pipeline.dit.memory import (
    StepSettings,
    activation_bytes,
    forward_bytes,
    image_px,
    sampling_memory,
    standing_bytes,
    step_memory,
    tabled_networks,
)
from pipeline.inspect.tables import table
from pipeline.vae_lanes import DECODED_PX, PARAMETERS, at_once, decoder_bytes


def describe_models() -> list[str]:
    """The paper's table 4: parameters, 10⁹ multiply-adds of a forward pass, its own figures; then modern blocks."""
    header = ("model", "conditioning", "latent", "parameters", "paper (M)", "GFLOPs", "paper", "difference")
    rows = [
        (
            row.model,
            row.conditioning,
            row.input,
            f"{row.parameters:,}",
            str(row.paper_parameters_millions),
            f"{row.gflops:.6f}",
            f"{row.paper_gflops:.2f}",
            f"{100 * (row.gflops / row.paper_gflops - 1):+.2f} %",
        )
        for row in models_table()
    ]
    modern = [(row.model, row.input, f"{row.parameters:,}", f"{row.gflops:.6f}") for row in modern_table()]
    return [
        *table(header, rows, left=3),
        "",
        "with modern blocks:",
        *table(("model", "latent", "parameters", "GFLOPs"), modern, left=2),
    ]


def describe_memory(batch_size: int, processes: int) -> list[str]:
    """What each of so many GPUs holds in bf16, in GiB: every network at 256 pixels, and XL/2 at 512.

    In training; then in sampling as many images at a time, guided by the class, with Stable Diffusion's VAE in float32.
    """
    header = ("model", "latent", "fixed", "casts", "an image", "checkpointed", "peak", "checkpointed", "FSDP")
    images = -(-batch_size // processes)
    sampled = ("model", "latent", "weights", "an image", "VAE", "decoding", "peak")
    return [
        *table(header, list(_memory_rows(batch_size, processes)), left=2),
        "",
        f"sampling {images} at a time on each, guided:",
        *table(sampled, list(_sampling_rows(images)), left=2),
    ]


def _sampling_rows(images: int) -> Iterator[tuple[str, ...]]:
    for model, config in tabled_networks():
        terms, pixels = sampling_memory(config, images), image_px(config)
        vae, lane = 4 * PARAMETERS, decoder_bytes(pixels * min(images, at_once(DECODED_PX, pixels)))
        sizes = (terms["weights"], forward_bytes(config, 1, precision="bf16"), vae, lane)
        cells = [f"{value / 2**30:.{digits}f}" for value, digits in zip(sizes, (2, 3, 2, 2), strict=True)]
        yield model, _latent(config), *cells, f"{(sum(terms.values()) + vae + lane) / 2**30:.1f}"


def _latent(config: DiTConfig) -> str:
    return f"{config.in_channels}×{config.height}×{config.width}"


def _memory_rows(batch_size: int, processes: int) -> Iterator[tuple[str, ...]]:
    images = -(-batch_size // processes)
    for model, config in tabled_networks():
        terms = step_memory(config, StepSettings(images=images, processes=processes))
        one = [activation_bytes(config, precision="bf16", checkpointing=kept) for kept in (False, True)]
        peaks = [
            step_memory(config, StepSettings(images=images, processes=processes, checkpointing=kept, shards=shards))
            for kept, shards in ((False, 1), (True, 1), (False, processes))
        ]
        sizes = [standing_bytes(config), terms["casts"], *one, *(sum(peak.values()) for peak in peaks)]
        digits = [2, 2, 3, 3, 1, 1, 1]
        cells = [f"{value / 2**30:.{digit}f}" for value, digit in zip(sizes, digits, strict=True)]
        yield (
            model,
            _latent(config),
            *(cells if processes > 1 else [*cells[:-1], "-"]),
        )
