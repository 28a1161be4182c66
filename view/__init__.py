"""A page in the browser to play with checkpoints, to follow runs and to look into stores."""

import contextlib

with contextlib.suppress(ModuleNotFoundError):  # an installation from before it was there
    import dit_pipeline

    dit_pipeline.refuse_namesake("pipeline")
