"""The paper's table of models, counted here and as printed there."""

from pipeline.dit.macs import models_table
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
