"""What weights of other people's were trained to do: by what their training was told, by their tensors, or by the user.

The public DiT, SiT and REPA have the same tensors under the same names, and sampled as another's they give noise. SiT's
and REPA's training files say it under `args`; of bare weights only REPA's projectors and the channels tell something.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.checkpoint.tensor_files import PROCESS, block_numbers
from pipeline.diffusion.process import OBJECTIVES, make_process
from pipeline.dit.config import DiTConfig
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import parse_json

_PROJECTORS = re.compile(r"projectors\.")
_SAYS_WHOSE = re.compile(r"(?<![a-z])(sit|dit)(?![a-z])", re.IGNORECASE)
# (args.path_type, args.prediction) of SiT's training, then of REPA's.
_PATHS = {"Linear": "linear", "GVP": "cosine", "VP": "vp"}
_PREDICTIONS = {"velocity": "v", "noise": "noise", "score": "score"}
_TRAININGS = {
    **{
        (path, prediction): {"objective": "sit", "path": _PATHS[path], "prediction": _PREDICTIONS[prediction]}
        for path in _PATHS
        for prediction in _PREDICTIONS
    },
    **{(path, "v"): {"objective": "repa", "path": path} for path in ("linear", "cosine")},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a network was trained for, as far as it can be known."""

    diffusion: Mapping[str, Any] | None
    """The process's settings; None for the release's."""
    known: bool = True
    """Whether whoever samples need not be asked."""
    note: str | None = None
    """What was taken for granted, or what has to be asked."""


def plain_network(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The tensors that a sample needs, in the release's names, and how many of REPA's projectors were set aside.

    REPA's first checkpoints call the blocks behind its encoder `decoder_blocks`, counted anew.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not _PROJECTORS.match(name)}
    before = block_numbers(kept)

    def renamed(name: str) -> str:
        return re.sub(r"^decoder_blocks\.([0-9]{1,6})\.", lambda found: f"blocks.{int(found[1]) + len(before)}.", name)

    return {renamed(name): tensor for name, tensor in kept.items()}, len(tensors) - len(kept)


def origin_of(
    path: Path, arguments: Mapping[str, Any], config: DiTConfig, *, projectors: bool, objective: str | None
) -> Origin:
    """What the network in a weight file was trained for.

    Args:
        path: the file, whose name may say it.
        arguments: what its training was told, if the file has it.
        config: the network.
        projectors: whether REPA's were beside it.
        objective: what the user says.

    Raises:
        UserError: it was trained for what cannot be sampled here, or the user says something else.
    """
    recorded = _recorded(path, arguments)
    if recorded is not None:
        check_objective(objective, recorded["objective"], path)
        return Origin(diffusion=recorded)
    if projectors and objective in {None, "sit", "repa"}:
        taken = f"{path} holds REPA's projectors: it is taken for REPA's, with its time and the linear path"
        return Origin(diffusion={"objective": "repa"}, note=taken)
    if objective is not None:
        return Origin(diffusion=_given(objective, config, path))
    ask = "give --objective: sit for SiT's, repa for REPA's, flow or ddpm for this project's and its like"
    if _whose(arguments.get("model"), path.name, path.absolute().parent.name) == "sit":
        return Origin(diffusion=None, known=False, note=f"{path} may be SiT's by its name, and does not say; {ask}")
    if not config.learn_sigma:
        why = "has no variance channels, so it is not the release's, and does not say what it was trained for"
        return Origin(diffusion=None, known=False, note=f"{path} {why}; {ask}")
    note = (
        f"{path} does not say what it was trained for: it is taken for the release's ddpm (--objective sit for SiT's)"
    )
    return Origin(diffusion=None, note=None if "model" in arguments else note)


def _whose(*names: object) -> str | None:
    """What the first of the names that says it says: sit or dit."""
    found = (_SAYS_WHOSE.search(str(name)) for name in names)
    return next((match[1].lower() for match in found if match), None)


def check_objective(given: str | None, recorded: str, origin: object) -> None:
    """Raise UserError if the user says another objective than the checkpoint."""
    if given not in {None, recorded}:
        raise UserError(f"--objective {given} contradicts {origin}, which was trained for {recorded}; drop the flag")


def _recorded(path: Path, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    if PROCESS in arguments:
        said = str(arguments[PROCESS]).encode(errors="replace")
        recorded = parse_json(said, f"the process in {path}", advice="convert it again")
        try:
            make_process(recorded)
        except (AttributeError, TypeError, UserError, ValueError) as error:
            raise UserError(f"{path} says in its metadata what makes no sense ({error}); convert it again") from error
        return dict(recorded)
    if "path_type" not in arguments:
        return None
    told = str(arguments["path_type"]), str(arguments.get("prediction"))
    if told not in _TRAININGS:
        known = f"{' or '.join(_PATHS)} with {' or '.join(_PREDICTIONS)} (SiT's), and linear or cosine with v (REPA's)"
        raise UserError(
            f"{path} was trained with path_type {told[0]} and prediction {told[1]}, and only {known} can be sampled "
            f"here; sample it with the code that trained it"
        )
    weight = arguments.get("loss_weight")
    weighted = weight in {"velocity", "likelihood"} and told[1] in {"noise", "score"}  # elsewhere theirs reads none
    return {**_TRAININGS[told], **({"loss_weight": weight} if weighted else {})}


def _given(objective: str, config: DiTConfig, path: Path) -> dict[str, Any]:
    if objective not in OBJECTIVES:
        raise UserError(f"--objective {objective} does not exist; there are {', '.join(OBJECTIVES)}")
    if objective == "ddpm":
        return {"objective": "ddpm", "variance": "learned-range" if config.learn_sigma else "fixed-large"}
    if objective == "flow" and config.learn_sigma:
        raise UserError(
            f"--objective flow does not fit {path}: its network has variance channels, which this project's flows have "
            f"not; give sit, whose have them, or ddpm"
        )
    return {"objective": objective}
