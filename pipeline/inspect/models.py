"""The paper's table of models, counted here and as printed there."""

from collections.abc import Iterator

from pipeline.dit.macs import models_table
from pipeline.dit.memory import StepSettings, activation_bytes, standing_bytes, step_memory, tabled_networks
from pipeline.inspect.tables import table


def describe_models() -> list[str]:
    """The rows of the paper's table 4: trainable parameters, 10⁹ multiply-adds of a forward pass, the paper's own."""
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
    return table(header, rows, left=3)


def describe_memory(batch_size: int, processes: int) -> list[str]:
    """What each of so many GPUs holds in training in bf16, in GiB: every network at 256 pixels, and XL/2 at 512."""
    header = ("model", "latent", "fixed", "casts", "an image", "checkpointed", "peak", "checkpointed", "FSDP")
    return table(header, list(_memory_rows(batch_size, processes)), left=2)


def _memory_rows(batch_size: int, processes: int) -> Iterator[tuple[str, ...]]:
    images = -(-batch_size // processes)
    for model, config in tabled_networks():
        terms = step_memory(config, StepSettings(images=images, processes=processes))
        one = [activation_bytes(config, precision="bf16", checkpointing=kept) for kept in (False, True)]
        peaks = [
            step_memory(config, StepSettings(images=images, processes=processes, checkpointing=kept, sharded=sharded))
            for kept, sharded in ((False, False), (True, False), (False, True))
        ]
        sizes = [standing_bytes(config), terms["casts"], *one, *(sum(peak.values()) for peak in peaks)]
        digits = [2, 2, 3, 3, 1, 1, 1]
        cells = [f"{value / 2**30:.{digit}f}" for value, digit in zip(sizes, digits, strict=True)]
        yield (
            model,
            f"{config.in_channels}×{config.height}×{config.width}",
            *(cells if processes > 1 else [*cells[:-1], "-"]),
        )
