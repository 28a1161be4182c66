"""A checkpoint into pictures, and pictures into numbers."""

import contextlib

with contextlib.suppress(ModuleNotFoundError):  # an installation from before it was there
    import dit_pipeline

    dit_pipeline.refuse_namesake("pipeline")
