"""The process that the network learns to undo: two objectives, their samplers, and guidance."""

from pipeline.diffusion.denoiser import NetworkFn
from pipeline.diffusion.flow import RectifiedFlow
from pipeline.diffusion.gaussian import GaussianDiffusion
from pipeline.diffusion.guidance import classifier_free_guidance
from pipeline.diffusion.process import OBJECTIVES, Process, make_process
from pipeline.diffusion.samplers import SAMPLERS, Draw, OnStep, Sampler, default_sampler, samplers_for

__all__ = [
    "OBJECTIVES",
    "SAMPLERS",
    "Draw",
    "GaussianDiffusion",
    "NetworkFn",
    "OnStep",
    "Process",
    "RectifiedFlow",
    "Sampler",
    "classifier_free_guidance",
    "default_sampler",
    "make_process",
    "samplers_for",
]
