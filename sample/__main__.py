"""`dit-sample`: pictures, arrays or latents from a trained checkpoint."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.runtime.console import run_command
from sample.options import SampleOptions

PRESETS = Path(__file__).parent / "presets"


def run(options: SampleOptions) -> int:
    """Make the samples that the options ask for, or say that they are there."""
    from sample.run import make_samples

    return make_samples(options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    return run_command(SampleOptions, run, prog="dit-sample", description=__doc__ or "", argv=argv, presets=PRESETS)


if __name__ == "__main__":
    sys.exit(main())
