"""The process that the network learns to undo: two objectives, their samplers, and guidance.

`process` and `samplers` hold the tables of what there is and load without torch; the rest is imported when asked for.
"""

from typing import TYPE_CHECKING

from pipeline import loaded_late
from pipeline.diffusion.process import OBJECTIVES, Process, make_process
from pipeline.diffusion.samplers import SAMPLERS, Draw, OnStep, default_sampler, samplers_for

if TYPE_CHECKING:
    from pipeline.diffusion.denoiser import NetworkFn
    from pipeline.diffusion.flow import RectifiedFlow
    from pipeline.diffusion.gaussian import GaussianDiffusion
    from pipeline.diffusion.guidance import classifier_free_guidance

__all__ = [
    "OBJECTIVES",
    "SAMPLERS",
    "Draw",
    "GaussianDiffusion",
    "NetworkFn",
    "OnStep",
    "Process",
    "RectifiedFlow",
    "classifier_free_guidance",
    "default_sampler",
    "make_process",
    "samplers_for",
]
__getattr__ = loaded_late(
    __name__,
    {
        "NetworkFn": "denoiser",
        "RectifiedFlow": "flow",
        "GaussianDiffusion": "gaussian",
        "classifier_free_guidance": "guidance",
    },
)
