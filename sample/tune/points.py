"""A point of a search: a setting and a seed, and the distance that they give; its file, and what an image costs."""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from pipeline.diffusion import SAMPLERS
from pipeline.diffusion.process import noise_share
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import Count, Finite, shortened, typed
from sample.generate import Generator
from sample.tune.search import Setting

FORMAT, VERSION = "dit-tune-point", 1


class Recipe(msgspec.Struct, frozen=True):
    """How a point's images were made, as far as it is told later."""

    sampler: str
    steps: Count
    guidance: Finite
    guidance_interval: tuple[Finite, Finite] | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {shortened(self.sampler)}, but must be one of {', '.join(SAMPLERS)}")


class Point(msgspec.Struct, frozen=True):
    """What the file of a point says."""

    request: str
    metric: str
    value: Finite
    passes: Count
    """Evaluations of a network that each image takes."""
    recipe: Recipe
    """What the sidecar of such samples would say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A setting and its points, one of each seed."""

    setting: Setting
    points: tuple[Point, ...] = field(repr=False)

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return sum(point.value for point in self.points) / len(self.points)

    @property
    def std(self) -> float | None:
        """The standard deviation over seeds; None of a single one."""
        mean, count = self.value, len(self.points)
        return None if count < 2 else float((sum((p.value - mean) ** 2 for p in self.points) / (count - 1)) ** 0.5)

    @property
    def passes(self) -> int:
        return self.points[0].passes


def read_point(path: Path, request: str) -> Point | None:
    """The point of that request; None where its file is not there yet.

    Raises:
        UserError: the file is no such point.
    """
    if not path.exists():
        return None
    content = read_json(path)
    is_ours = isinstance(content, dict) and (content.get("format"), content.get("version")) == (FORMAT, VERSION)
    if not is_ours or content.get("request") != request:
        raise UserError(f"{path} is no point of this search; move it away, or choose another --out")
    return typed(content, Point, f"{path} is damaged", advice="remove it, and it is made again")


def passes_per_image(generator: Generator) -> int:
    """How many times a network is evaluated for one image: those of each step, twice where guidance needs two."""
    plan, process = generator.plan, generator.checkpoint.process
    low, high = plan.interval or (0.0, 1.0)
    guided = 2 if generator.guide is not None or plan.source != "middle" else 1
    channels = 2 if process.learns_variance else 1
    passes = 0

    def network(_: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        inside = low <= float(noise_share(process, t)) <= high
        passes += guided if plan.guidance != 1 and inside else 1
        return torch.zeros(1, channels, 1, 1)

    none = torch.zeros(1, 1, 1, 1)
    SAMPLERS[plan.sampler](
        process, network, none, lambda _: none, steps=plan.steps, eta=plan.eta, timesteps=plan.timesteps
    )
    return passes


def in_words(row: Row) -> str:
    """A setting as it was resolved: sampler, steps, guidance, weights, and the passes that an image takes."""
    recipe = row.points[0].recipe
    interval = recipe.guidance_interval
    within = f" within {interval[0]:g}:{interval[1]:g}" if interval else ""
    return (
        f"{row.setting.weights}, {recipe.sampler} {recipe.steps}, guidance {recipe.guidance:g}{within} "
        f"({row.passes} passes)"
    )
