"""What every test runs under: shapes checked, no network, two threads at most, tiny things only."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

from pipeline.runtime.processes import bound_spinning

bound_spinning()  # before torch is loaded
# Not pipeline.dit: torch.compile cannot trace functions that the checker wraps.
CHECKED = ("pipeline.diffusion", "pipeline.latents", "pipeline.vae", "pipeline.images")
install_import_hook(CHECKED, "beartype.beartype")
