"""`dit-train`: a latent store in, checkpoints out."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.runtime.console import run_command
from train.options import TrainOptions

PRESETS = Path(__file__).parent / "presets"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status."""
    return run_command(
        TrainOptions,
        _run,
        prog="dit-train",
        description="Train a Diffusion Transformer on a latent store; running the same command again continues. "
        "--config also takes the names paper-256, paper-512 and small-data.",
        argv=argv,
        presets=PRESETS,
    )


def _run(options: TrainOptions) -> int:
    from train.run import train

    return train(options)


if __name__ == "__main__":
    sys.exit(main())
