"""The process that the network learns to undo: two objectives, their samplers, and guidance."""

from pipeline.diffusion.denoiser import Denoise
from pipeline.diffusion.flow import RectifiedFlow
from pipeline.diffusion.gaussian import GaussianDiffusion
from pipeline.diffusion.guidance import guided
from pipeline.diffusion.process import OBJECTIVES, Process, make_process
from pipeline.diffusion.sampler import Draw, OnStep, Sampler
from pipeline.diffusion.sampling import SAMPLERS, default_sampler, samplers_for

__all__ = [
    "OBJECTIVES",
    "SAMPLERS",
    "Denoise",
    "Draw",
    "GaussianDiffusion",
    "OnStep",
    "Process",
    "RectifiedFlow",
    "Sampler",
    "default_sampler",
    "guided",
    "make_process",
    "samplers_for",
]
