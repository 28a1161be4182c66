"""What the page may show: the runs, checkpoints and stores that the command named, and nothing else.

A browser never sends a path. It sends the number of something in these lists, and a step; both are looked up here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipeline.checkpoint.folder import checkpoint_folders, weight_files
from pipeline.checkpoint.forms import read_stored
from pipeline.checkpoint.info import CheckpointInfo, read_info
from pipeline.checkpoint.remote import localized
from pipeline.checkpoint.snapshots import snapshots
from pipeline.classes import short_name
from pipeline.diffusion.samplers import SAMPLERS, samplers_for
from pipeline.dit.macs import count_parameters
from pipeline.hub import HUB, HUB_NAME
from pipeline.inspect.checkpoint import preset_name
from pipeline.latents.names import is_store
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import Count
from pipeline.runtime.remote_files import is_url
from train.plot import distinct_names
from view.options import ViewOptions

FAST = {"dpm++": 20, "dpm++2m": 20}
"""Samplers that are good in few steps, and these: what a page that someone waits for begins with."""
Weights = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9=][A-Za-z0-9._=@-]*\Z")]


class NetworkChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One network as the page names it."""

    network: Annotated[int, msgspec.Meta(ge=0, le=999)]
    """Its number in the list."""
    step: Count | None = None
    """Of a run; None for its newest."""
    weights: Weights = "ema"
    """As `dit-sample --weights` takes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenNetwork:
    """A run or a checkpoint that --checkpoint names."""

    name: str
    """As short as tells it from the others."""
    path: str

    @property
    def is_run(self) -> bool:
        """Whether it is the folder of a run, which has curves and previews."""
        folder = Path(self.path)
        return (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file()

    def steps(self) -> dict[int, Path]:
        """{step: folder} of a run's checkpoints, oldest first; nothing for anything else."""
        return dict(checkpoint_folders(Path(self.path)))

    def place(self, step: int | None) -> str:
        """The path of its checkpoint at a step.

        Raises:
            UserError: it has none.
        """
        if step is None:
            return self.path
        folder = self.steps().get(step)
        if folder is None:
            raise UserError(f"{self.name} has no checkpoint at step {step:,} (any more); choose another step")
        return str(folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenStore:
    """A store that --latents names."""

    name: str
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """All that was named."""

    networks: tuple[GivenNetwork, ...]
    stores: tuple[GivenStore, ...]

    def network(self, number: int) -> GivenNetwork:
        """One of the networks.

        Raises:
            UserError: there is none of that number.
        """
        if not 0 <= number < len(self.networks):
            raise UserError(f"there is no checkpoint number {number} on this page; load the page again")
        return self.networks[number]

    def store(self, number: int) -> GivenStore:
        """One of the stores.

        Raises:
            UserError: there is none of that number.
        """
        if not 0 <= number < len(self.stores):
            raise UserError(f"there is no store number {number} on this page; load the page again")
        return self.stores[number]

    def title(self, choice: NetworkChoice) -> str:
        """What to call a choice."""
        step = "" if choice.step is None else f", step {choice.step:,}"
        return f"{self.network(choice.network).name}{step}, {choice.weights}"


def find_given(options: ViewOptions) -> Given:
    """What the command names, each looked at once.

    Raises:
        UserError: something is not there, or is the other kind of thing.
    """
    for path in options.checkpoint:
        if is_url(path):  # fetched now, so that a mistake is told before the page is opened
            localized(path, averages=True)
            continue
        if not Path(path).exists() and not HUB_NAME.fullmatch(path.removeprefix(HUB)):
            raise UserError(f"--checkpoint {path} does not exist; give a run folder, a checkpoint or a Hub name")
        if Path(path).is_dir() and is_store(path):
            raise UserError(f"--checkpoint {path} is a latent store; name it with --latents")
    for path in options.latents:
        if not is_store(path):
            raise UserError(f"--latents {path} is no latent store; give the folder that dit-extract --out named")
    data = options.data
    if data and not (is_url(data) or data.startswith(HUB) or "{" in data or Path(data).expanduser().exists()):
        raise UserError(f"--data {data} does not exist; name the images that a store of --latents was made from")
    return Given(
        networks=tuple(
            GivenNetwork(name=name, path=path)
            for name, path in zip(_short_names(options.checkpoint), options.checkpoint, strict=True)
        ),
        stores=tuple(
            GivenStore(name=name, path=path)
            for name, path in zip(_short_names(options.latents), options.latents, strict=True)
        ),
    )


def _short_names(paths: Sequence[str]) -> list[str]:
    return distinct_names([Path(path).resolve() if Path(path).exists() else Path(path) for path in paths] or [Path()])[
        : len(paths)
    ]


def describe_network(path: str) -> dict[str, Any]:
    """What the page must know to offer only what a checkpoint can do.

    Raises:
        UserError: it cannot be read.
    """
    folder = localized(path, averages=True)
    own = folder / "checkpoints"
    if own.is_dir():  # a run: its newest
        found = checkpoint_folders(folder)
        if not found:
            raise UserError(f"{path} is a run without a checkpoint yet; let dit-train go on until it has saved one")
        folder = found[-1][1]
    if (folder / "config.json").is_file() and weight_files(folder):
        info = read_info(folder)
        config = info.network
        weights = sorted((name.removeprefix("ema-") for name in weight_files(folder)), key=lambda name: name != "ema")
    else:
        stored = read_stored(str(folder), verify=False)
        info, config, weights = stored.info, stored.config, [stored.weights]
    process = info.process
    samplers = {name: SAMPLERS[name] for name in samplers_for(process)}
    fast = next((name for name in samplers if name in FAST), next(iter(samplers)))
    classes = [short_name(label, info.classes, info.class_ids) for label in range(config.num_classes)]
    return {
        "step": info.step,
        "model": preset_name(config),
        "parameters": count_parameters(config),
        "image_px": info.image.size,
        "objective": process.objective,
        "classes": classes,
        "weights": weights,
        "sigmas": _widths(folder, info),
        "samplers": [
            {"name": name, "help": spec.help, "most": spec.most_steps(process)} for name, spec in samplers.items()
        ],
        "sampler": fast,
        "steps": FAST.get(fast, 50),
        "can_guide": bool(config.num_classes and config.has_null_class),
        "middle": config.middle_head,
    }


def _widths(checkpoint: Path, info: CheckpointInfo) -> list[float]:
    """The relative widths of the power-function averages that a run keeps at this step, of which others can be made."""
    run = checkpoint.parent.parent
    beside = [one.sigma for one in snapshots(run) if one.step == info.step]
    return sorted({*beside, *info.training.ema_sigma})
