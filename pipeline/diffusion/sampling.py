"""Every sampler by its name, and which of them suit a process."""

from pipeline.diffusion.ancestral import ddim, ddpm
from pipeline.diffusion.flow import RectifiedFlow
from pipeline.diffusion.flow_samplers import euler, heun
from pipeline.diffusion.process import Process
from pipeline.diffusion.sampler import Sampler
from pipeline.diffusion.solvers import dpm_solver, unipc

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm++": dpm_solver,
    "unipc": unipc,
    "euler": euler,
    "heun": heun,
}


def samplers_for(process: Process) -> tuple[str, ...]:
    """The names of the samplers that suit the process, its default first."""
    return ("heun", "euler") if isinstance(process, RectifiedFlow) else ("ddpm", "ddim", "dpm++", "unipc")


def default_sampler(process: Process) -> str:
    """The sampler to take when none is named: the paper's for diffusion, Heun's for a flow."""
    return samplers_for(process)[0]
