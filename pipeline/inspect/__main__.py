"""`dit-inspect`: what a latent store or a checkpoint holds, whether it is whole, and what it looks like."""

import sys
from pathlib import Path

from pipeline.inspect.options import InspectOptions
from pipeline.latents.names import is_store
from pipeline.runtime.console import run_command, show
from pipeline.runtime.errors import UserError


def run(options: InspectOptions) -> None:
    """Print what is asked for to standard output."""
    if options.machine:
        from pipeline.inspect.machine import describe_machine

        show(describe_machine(options.path))
        return
    if options.models:
        from pipeline.inspect.models import describe_memory, describe_models

        show(
            describe_models() if options.batch_size is None else describe_memory(options.batch_size, options.processes)
        )
    if options.path is None:
        return
    if is_store(options.path):
        from pipeline.inspect.store import describe_store, draw_store, store_beside, verify_store

        path = store_beside(options.path)
        show(describe_store(path))
        if options.verify:
            show(verify_store(path))
        if options.grid is not None:
            show(draw_store(path, Path(options.grid), options))
        return
    if options.grid is not None:
        raise UserError(f"--grid draws a store, and {options.path} is none; draw a checkpoint's images with dit-sample")
    from pipeline.inspect.checkpoint import describe_checkpoint

    asked = {"num_heads": options.num_heads, "objective": options.objective}
    show(describe_checkpoint(options.path, verify=options.verify, asked=asked))


def main() -> int:
    """The command's exit status."""
    return run_command(
        InspectOptions,
        run,
        prog="dit-inspect",
        description="Show what a latent store or a checkpoint holds, and check it.",
    )


if __name__ == "__main__":
    sys.exit(main())
