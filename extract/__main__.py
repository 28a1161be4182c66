"""`dit-extract`: raw images → latent store. Options here; everything that imports torch comes when they are read."""

import sys
import time
from collections.abc import Sequence

from extract.options import ExtractOptions
from pipeline.runtime.console import run_command

_BEGAN = time.time()


def run(options: ExtractOptions) -> int:
    """Extract, and give the exit status."""
    if options.url is not None:
        from extract.url_store import extract_to_url

        return extract_to_url(options, options.url)
    from extract.run import extract

    return extract(options, began=_BEGAN)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives its exit status."""
    return run_command(
        ExtractOptions,
        run,
        prog="dit-extract",
        description="Turn raw images into a store of VAE latents. The same command again continues where it stopped.",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
