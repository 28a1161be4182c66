"""`dit-view`: a page on this machine to sample from checkpoints, compare them, follow runs and look into stores."""

import sys
from collections.abc import Sequence

from pipeline.runtime.console import run_command
from view.options import ViewOptions


def run(options: ViewOptions) -> int:
    """Serve the page until a signal ends it."""
    from view.server import serve

    return serve(options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    return run_command(ViewOptions, run, prog="dit-view", description=__doc__ or "", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
