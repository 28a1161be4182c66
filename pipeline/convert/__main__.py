"""`dit-convert`: a trained DiT from any form that exists into another, checked by computing with both."""

import sys

from pipeline.convert.options import ConvertOptions
from pipeline.runtime.console import run_command, show


def run(options: ConvertOptions) -> None:
    """Convert, and print what was written and how far its forward pass is from the original's."""
    from pipeline.convert.run import convert, import_store

    show((import_store if options.format == "store" else convert)(options))


def main() -> int:
    """The command's exit status."""
    return run_command(
        ConvertOptions,
        run,
        prog="dit-convert",
        description="Convert a trained DiT from any form into another, checked by computing with both.",
    )


if __name__ == "__main__":
    sys.exit(main())
