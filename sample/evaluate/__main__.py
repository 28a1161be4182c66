"""`dit-evaluate`: FID, sFID, Inception Score, precision, recall and KID between two sets of images."""

import sys
from collections.abc import Sequence

from pipeline.runtime.console import run_command
from sample.evaluate.options import EvaluateOptions


def run(options: EvaluateOptions) -> int:
    """Evaluate what the options name."""
    from sample.evaluate.evaluation import evaluate

    return evaluate(options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    return run_command(EvaluateOptions, run, prog="dit-evaluate", description=__doc__ or "", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
