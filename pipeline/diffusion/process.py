"""The objectives by name, each one row of OBJECTIVES, and the choices among words that their settings offer.

An objective is a frozen dataclass in a file of its own, with the methods of `RectifiedFlow`. This file loads without
torch, so that options can ask it.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import shortened

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.diffusion.flow import RectifiedFlow
    from pipeline.diffusion.gaussian import GaussianDiffusion
else:
    Tensor = object

Process: TypeAlias = "GaussianDiffusion | RectifiedFlow"

Schedule = Literal["linear", "cosine"]
Prediction = Literal["epsilon", "x0", "v"]
FlowPrediction = Literal["epsilon", "x0", "v", "noise", "score"]
Variance = Literal["learned-range", "fixed-small", "fixed-large"]
Loss = Literal["mse", "rescaled-mse", "kl", "rescaled-kl"]
TimestepLaw = Literal["logit-normal", "uniform"]
LossWeight = Literal["none", "velocity", "likelihood"]
FlowPath = Literal["linear", "cosine", "vp"]

OF_TRAINING = frozenset({"loss", "timestep_law", "time_mean", "time_std", "loss_weight"})
"""Settings that say how a network was trained, and nothing of what it predicts or how it is sampled from."""
OF_SAMPLING = frozenset({"times"})
"""Settings that whoever samples makes, and no checkpoint has."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSpec:
    """Where an objective is, and how it is told what to be."""

    module: str
    """Its file in this folder."""
    kind: str
    """Its class there."""
    help: str
    """What it is, for the command's help."""
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Its settings, each with the field of training's options that gives it."""

    def load(self) -> Any:
        """The class."""
        return getattr(importlib.import_module(f"pipeline.diffusion.{self.module}"), self.kind)


OBJECTIVES: dict[str, ObjectiveSpec] = {
    "ddpm": ObjectiveSpec(
        module="gaussian",
        kind="GaussianDiffusion",
        help="the paper's Gaussian diffusion",
        flags={"schedule": "noise_schedule", "prediction": "prediction", "variance": "variance", "loss": "loss"},
    ),
    "flow": ObjectiveSpec(
        module="flow",
        kind="RectifiedFlow",
        help="rectified flow",
        flags={name: name for name in ("timestep_law", "prediction", "time_mean", "time_std", "time_shift")},
    ),
    "sit": ObjectiveSpec(
        module="sit",
        kind="SiTFlow",
        help="the flow of SiT's networks",
        flags={"path": "flow_path", "prediction": "prediction", "loss_weight": "loss_weight"},
    ),
    "repa": ObjectiveSpec(
        module="sit", kind="REPAFlow", help="the flow of REPA's networks", flags={"path": "flow_path"}
    ),
}

if TYPE_CHECKING:
    Objective = str
else:
    Objective = Literal[tuple(OBJECTIVES)]
OBJECTIVES_HELP = f"{', '.join(f'{name} is {spec.help}' for name, spec in OBJECTIVES.items())}."


def make_process(settings: Mapping[str, Any]) -> Process:
    """The process that `to_json` described; settings left out take their defaults.

    Raises:
        UserError: an objective, a setting or a value that there is not.
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    objective = values.pop("objective", None)
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise UserError(f"the objective is {shortened(objective)}, but only {', '.join(OBJECTIVES)} exist")
    kind = OBJECTIVES[objective].load()
    _check_settings(kind, values)
    hints = get_type_hints(kind)
    return kind(**{name: float(value) if hints[name] is float else value for name, value in values.items()})


def process_from_flags(objective: str, options: object) -> Process:
    """The process that training's options describe, each setting from the flag that its objective names."""
    flags = OBJECTIVES[objective].flags
    return make_process({"objective": objective, **{name: getattr(options, flag) for name, flag in flags.items()}})


def check_whose(objective: str, options: Any) -> None:
    """Raise UserError for flags of training that another objective than this one takes."""
    given = (
        ("flow", "time-mean", options.time_mean != 0),
        ("flow", "time-std", options.time_std != 1),
        ("flow", "time-shift", options.time_shift != 1),
        ("flow", "prediction x0", options.prediction == "x0" and objective != "ddpm"),
        ("sit", f"prediction {options.prediction}", options.prediction in {"noise", "score"}),
        ("sit", "flow-path vp", options.flow_path == "vp"),
        ("sit", "loss-weight", options.loss_weight != "none"),
    )
    for whose, name, is_given in given:
        if is_given and objective != whose:
            raise UserError(f"--{name} is for --objective {whose}, not {objective}; drop one of the two")
    if options.loss_weight != "none" and options.prediction not in {"noise", "score"}:
        raise UserError(f"--loss-weight {options.loss_weight} is for --prediction noise or score; drop it")


def noise_share(process: Process, fed: Tensor) -> Tensor:
    """Where between data (0) and noise (1) the times are that the network is fed."""
    share = fed / process.time_scale
    return 1 - share if process.noise_first else share


def _check_settings(kind: type, values: Mapping[str, Any]) -> None:
    """Raise UserError, naming each, unless all are fields of the process, of their types, among the words there are.

    Only here: what Python code writes is checked by its types, and what belongs together by the process itself.
    """
    names = [field.name for field in dataclasses.fields(kind) if field.name not in OF_SAMPLING]
    hints = get_type_hints(kind)
    told = [name if name.isidentifier() else shortened(name) for name in values if name not in names]
    wrong = [f"{name} is no setting of it (they are {', '.join(names)})" for name in told]
    for name in (name for name in names if name in values):
        value, choices = values[name], get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        if choices and value not in choices:
            wrong.append(f"{name} is {shortened(value)} but must be one of {', '.join(choices)}")
        if hints[name] is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            wrong.append(f"{name} is {shortened(value)} but must be a number")
        if hints[name] is int and type(value) is not int:
            wrong.append(f"{name} is {shortened(value)} but must be a whole number")
        if hints[name] == tuple[int, ...] | None and not (value is None or _are_whole(value)):
            wrong.append(f"{name} is {shortened(value)} but must be whole numbers")
    if wrong:
        raise UserError(f"this {kind.__name__} cannot be made: {'; '.join(wrong)}")


def _are_whole(value: object) -> bool:
    return isinstance(value, tuple) and all(type(number) is int for number in value)
