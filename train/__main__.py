"""`dit-train`: a latent store in, checkpoints out."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.runtime.console import run_command, say
from train.options import TrainOptions

PRESETS = Path(__file__).parent / "presets"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status."""
    return run_command(
        TrainOptions,
        _run,
        prog="dit-train",
        description="Train a Diffusion Transformer on a latent store; running the same command again continues. "
        "--config also takes the names modern-256, modern-512, modern-small, paper-256, paper-512 and small-data.",
        argv=argv,
        presets=PRESETS,
        seen_config=_in_its_own_run,
    )


def _in_its_own_run(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run's own config.yaml, for the run that the file lies in, wherever that was moved."""
    run, out = path.absolute().parent, values.get("out")
    if path.name != "config.yaml" or not (run / "checkpoints").is_dir() or not isinstance(out, str):
        return values
    if Path(out).expanduser().resolve() == run.resolve():
        return values
    say(f"{path} is the settings of a run that was at {out}: going on with the one it lies in (--out names another)")
    return {**values, "out": str(path.parent)}


def _run(options: TrainOptions) -> int:
    from train.run import train

    return train(options)


if __name__ == "__main__":
    sys.exit(main())
