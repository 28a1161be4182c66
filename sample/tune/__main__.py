"""`dit-tune`: the guidance, average, steps and sampler of a checkpoint by the Fréchet distance that they give."""

import sys
from collections.abc import Sequence

from pipeline.runtime.console import run_command
from sample.tune.options import TuneOptions


def run(options: TuneOptions) -> int:
    """Search as the options say."""
    from sample.tune.run import tune

    return tune(options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    return run_command(TuneOptions, run, prog="dit-tune", description=__doc__ or "", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
