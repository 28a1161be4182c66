"""The result as a table for people and as JSON for machines, with all that the numbers were made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.runtime.console import printable
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import Finite, Passed, typed
from sample.evaluate.image_set import ImageSet
from sample.evaluate.inputs import Input
from sample.evaluate.scoring import Score
from sample.sidecar import Recipe, versions

FORMAT = "dit-evaluation"
VERSION = 1
_PROTOCOL = (
    *("sampler", "steps", "timesteps", "eta", "guidance", "guidance_interval", "guidance_channels"),
    *("guidance_source", "middle_guidance", "seed"),
)


def table(scores: Mapping[str, float], spreads: Mapping[str, float]) -> str:
    """The metrics, one a line, numbers aligned at their points, with the standard deviation where there is one."""
    width = max(len(name) for name in scores)
    lines = [f"{'metric':<{width}}  {'value':>14}  {'std':>12}"]
    for name, value in scores.items():
        std = f"{spreads[name]:>12.6f}" if name in spreads else ""
        lines.append(f"{name:<{width}}  {value:>14.6f}  {std}".rstrip())
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, eq=False)
class Result(Passed):
    """What is asked of a result file."""

    metrics: dict[str, Finite]
    std: dict[str, Finite] = field(default_factory=dict)
    protocol: dict[str, Any] | None = None
    request: str | None = None
    """Whose answer it is."""


def in_words(metrics: Mapping[str, float], std: Mapping[str, float], how: Mapping[str, Any] | None) -> str:
    """A result as people read it: the table, and below it how the images were sampled, as far as that is known."""
    text = table(metrics, std)
    if not how:
        return text
    said = [f"{name.replace('_', ' ')} {printable(str(value))[:60]}" for name, value in how.items()]
    return f"{text}\n{', '.join(said)}"


def protocol(recipe: Recipe, *, seeds: int) -> dict[str, Any] | None:
    """What moves metrics in the recipe of the images: sampler, steps, guidance, labels, weights; None without one."""
    found = {name: recipe[name] for name in _PROTOCOL if recipe.get(name) is not None}
    if seeds > 1:
        found["seeds"] = seeds
    if recipe.labels is not None:
        found["labels"] = recipe.labels.rule
    for name, network in (("weights", recipe.checkpoint), ("guide", recipe.guide)):
        if network is not None:
            found[name] = f"{network.weights} of step {network.step}"
    return found or None


def describe_images(images: ImageSet, *, fingerprint: str | None) -> dict[str, Any]:
    """What a file says of a set of images; the fingerprint is None where none of them was looked at."""
    return {
        "kind": images.kind,
        "count": images.count,
        "width": images.size[0],
        "height": images.size[1],
        **images.describe(),
        "pixels_sha256": fingerprint,
    }


def describe_input(given: Input, *, fingerprint: str | None) -> dict[str, Any]:
    """What the result says of one input."""
    images, statistics = given.images, given.statistics
    return {
        "path": given.path,
        "images": None if images is None else describe_images(images, fingerprint=fingerprint),
        "statistics": None
        if statistics is None
        else {
            "contents_sha256": statistics.key(),
            "count": statistics.count,
            "provenance": dict(statistics.provenance) or None,
        },
        "made_by": None if given.made_by is None else dict(given.made_by),
    }


def all_versions() -> dict[str, str]:
    """The versions of what the numbers depend on."""
    return {**versions(), "scipy": version("scipy")}


def build(
    scores: Sequence[Score],
    *,
    request: str,
    protocol: Mapping[str, Any] | None,
    inputs: Mapping[str, Any],
    inception: Mapping[str, str] | None,
    encoder: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    device: str,
    batch_size: int,
) -> dict[str, Any]:
    """The content of the result file."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "metrics": {score.name: score.value for score in scores},
        "std": {score.name: score.std for score in scores if score.std is not None},
        "details": {score.name: dict(score.details) for score in scores},
        "protocol": protocol,
        **inputs,
        "inception": inception,
        **({} if encoder is None else {"encoder": encoder}),
        "compute": {
            "device": device,
            "batch_size": batch_size,
            "features": "float32",
            "metrics": "float64",
        },
        "options": dict(options),
        "versions": all_versions(),
        "request": request,
    }


def read_result(path: Path) -> Result | None:
    """An earlier result; None where the file is no result of this version.

    Raises:
        UserError: it is no JSON, or its values are of other types.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        return None
    return typed(content, Result, f"{path} is damaged", advice="restore it, or remove it to compute it again")
