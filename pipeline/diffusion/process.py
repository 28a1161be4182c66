"""The two objectives behind one interface, and how a checkpoint names them."""

from collections.abc import Mapping
from typing import Any

from pipeline.diffusion.denoiser import check_settings
from pipeline.diffusion.flow import RectifiedFlow
from pipeline.diffusion.gaussian import GaussianDiffusion
from pipeline.runtime.errors import UserError

Process = GaussianDiffusion | RectifiedFlow
OBJECTIVES: dict[str, type[GaussianDiffusion] | type[RectifiedFlow]] = {
    "ddpm": GaussianDiffusion,
    "flow": RectifiedFlow,
}


def make_process(settings: Mapping[str, Any]) -> Process:
    """The process that `to_json` described; settings left out take their defaults.

    Raises:
        UserError: an objective, a setting or a value that there is not.
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    objective = values.pop("objective", None)
    if objective not in OBJECTIVES:
        raise UserError(f"the objective is {objective!r}, but only {' and '.join(OBJECTIVES)} exist")
    kind = OBJECTIVES[objective]
    check_settings(kind, values)
    return kind(**values)
