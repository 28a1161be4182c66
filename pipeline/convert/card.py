"""The model card of a checkpoint: README.md as the Hub shows it, made of what the checkpoint and a result say.

Class names, notes and settings come from files that may be a stranger's: in the card every one of them is text, and
stays text in Markdown, HTML and YAML.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from pipeline.checkpoint.forms import Stored
from pipeline.checkpoint.info import CheckpointInfo
from pipeline.convert.options import ConvertOptions
from pipeline.runtime.console import printable
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_bytes
from pipeline.runtime.gate import Count, Finite, read_regular, typed
from pipeline.runtime.units import factors

README: Final = "README.md"
PICTURE: Final = "samples.png"
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_PICTURE = 1 << 26
_RESULT_NAMES = ("RESULT.json", "result.json")
_MARKUP = re.compile(r"([\\`*_\[\]<>#!|~$&@:]|\.(?=[A-Za-z]))")
"""What means something within a line of the Hub's Markdown, addresses and mentions included."""
_MOST_NAME = 200
_SHOWN_CLASSES = 20


class _Images(msgspec.Struct, frozen=True):
    count: Count


class _Network(msgspec.Struct, frozen=True):
    weights: str | None = None
    step: Count | None = None


class _SampleRecipe(msgspec.Struct, frozen=True):
    checkpoint: _Network | None = None


class _MadeBy(msgspec.Struct, frozen=True):
    recipe: _SampleRecipe = _SampleRecipe()


class _Side(msgspec.Struct, frozen=True):
    images: _Images | None = None
    statistics: _Images | None = None
    made_by: _MadeBy | None = None

    @property
    def count(self) -> int | None:
        known = self.images or self.statistics
        return None if known is None else known.count


class Result(msgspec.Struct, frozen=True):
    """What a card needs of the result of `dit-evaluate`."""

    metrics: dict[str, Finite]
    std: dict[str, Finite] = msgspec.field(default_factory=dict)
    protocol: dict[str, Any] | None = None
    samples: _Side = _Side()
    reference: _Side = _Side()


def write_card(folder: Path, stored: Stored, options: ConvertOptions) -> list[str]:
    """Write README.md, and the picture it shows, into a folder that the caller publishes; the lines to print.

    Raises:
        UserError: the result or the picture cannot be read, is none, or the result is of other weights.
    """
    found = find_result(stored, options.results)
    result = None if found is None else read_result(found, stored)
    if options.picture is not None:
        write_bytes(folder / PICTURE, _read_picture(Path(options.picture)))
    text = model_card(stored, options, result=result)
    write_bytes(folder / README, text.encode())
    scores = "no scores (--results gives it some)" if found is None else f"the scores of {found}"
    return [f"{README}: a model card with {scores}"]


def find_result(stored: Stored, given: str | None) -> Path | None:
    """The result that was given, or one that lies in the checkpoint's folder or its run's."""
    if given is not None:
        return Path(given)
    if stored.folder is None:
        return None
    places = [stored.folder, *([stored.folder.parent.parent] if stored.folder.parent.name == "checkpoints" else [])]
    return next((place / name for place in places for name in _RESULT_NAMES if (place / name).is_file()), None)


def read_result(path: Path, stored: Stored) -> Result:
    """A result of `dit-evaluate`, which must be of these weights as far as it says.

    Raises:
        UserError: it is no result, damaged, or of other weights.
    """
    advice = "give another --results"
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != "dit-evaluation" or content.get("version") != 1:
        raise UserError(f"{path} is no result that this dit-evaluate writes; {advice}")
    result = typed(content, Result, f"{path} is damaged", advice=advice)
    network = None if result.samples.made_by is None else result.samples.made_by.recipe.checkpoint
    if network is not None:
        theirs, ours = (network.weights, network.step), (stored.weights, stored.info.step)
        if theirs != ours:
            found, step = (printable(str(value)[:60]) for value in theirs)
            raise UserError(
                f"{path} holds the scores of the {found} weights of step {step}, but these are the {ours[0]} weights "
                f"of step {ours[1]}; {advice}, or move it away"
            )
    return result


def _read_picture(path: Path) -> bytes:
    try:
        data = read_regular(path, most=_MOST_PICTURE)
    except OSError as error:
        raise UserError(f"--picture {path} cannot be read ({error.strerror}); check the path") from error
    if not data.startswith(_PNG):
        raise UserError(f"--picture {path} is no PNG; draw one with dit-sample --out samples.png")
    return data


def model_card(stored: Stored, options: ConvertOptions, *, result: Result | None) -> str:
    """The text of README.md."""
    info, config = stored.info, stored.config
    tags = ["diffusion", "dit", *(["class-conditional"] if config.num_classes else [])]
    front: dict[str, Any] = {"library_name": "diffusers" if options.format == "diffusers" else "dit-pipeline"}
    front |= {"license": options.license} if options.license else {}
    name = Path(options.hub_name or options.to).name
    size = info.image.size
    kinds = f"images of {config.num_classes:,} classes" if config.num_classes else "images without classes"
    what = f"{stored.weights} weights after {info.step:,} steps"
    parts = [
        f"---\n{yaml.safe_dump({**front, 'tags': tags}, allow_unicode=True)}---",
        f"# {as_text(name)}",
        f"A Diffusion Transformer for {kinds}, {as_text(size)} pixels on a side: its {as_text(what)}.",
    ]
    if options.picture is not None:
        parts.append(f"![Samples]({PICTURE})")
    parts += ["## How to load it", _usage(options), "## Network", _table(_network(stored))]
    parts += ["## Training", _table(_recipe(info)), "## Data", _table(_data(info))]
    parts += ["## Scores", *_scores(result), "## Licence"]
    stated = f"{as_text(options.license)}, as stated by who published this." if options.license else "None was stated."
    return "\n\n".join([*parts, stated]) + "\n"


def as_text(value: object) -> str:
    """A value as words in Markdown, on one line, which mean nothing but themselves."""
    words = printable(" ".join(str(value).split()))
    shown = words if len(words) <= _MOST_NAME else f"{words[:_MOST_NAME]}…"
    return _MARKUP.sub(r"\\\1", shown)


def _table(rows: Mapping[str, object]) -> str:
    lines = [f"| {as_text(name)} | {as_text(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _usage(options: ConvertOptions) -> str:
    place = f"hf:{options.hub_name}" if options.hub_name else "FOLDER"
    if options.format == "diffusers":
        return (
            "```python\nfrom diffusers import DiTPipeline\n\n"
            f'pipe = DiTPipeline.from_pretrained("{options.hub_name or "FOLDER"}")\n'
            "for block in pipe.transformer.transformer_blocks:  # this network's timestep frequencies\n"
            "    block.norm1.emb.time_proj.downscale_freq_shift = 0\n```"
        )
    return (
        f"```sh\ndit-sample --checkpoint {place} --out samples.png\n```\n\n"
        "```python\nfrom pipeline.checkpoint import load_checkpoint\n\n"
        f'model, config = load_checkpoint("{place}")\n```'
    )


def _network(stored: Stored) -> dict[str, object]:
    config, info = stored.config, stored.info
    return {
        "parameters": f"{sum(tensor.numel() for name, tensor in stored.state.items() if name != 'pos_embed'):,}",
        "width, depth, heads": f"{config.hidden_size}, {config.depth}, {config.num_heads}",
        "patch": config.patch_size,
        "latent": f"{config.in_channels}×{config.height}×{config.width}",
        "conditioning": config.conditioning,
        "VAE": info.vae.name or "not recorded",
        "VAE's SHA-256": info.vae.sha256,
        "scale": factors(info.vae.scaling_factor),
        "shift": factors(info.vae.shift_factor or 0),
    }


def _recipe(info: CheckpointInfo) -> dict[str, object]:
    training, batch = info.training, info.training.batch_size
    seen = None if batch is None else f"{info.step * batch:,}"
    left_out = {"samples", "views", "data_identity"}
    rest = {name.replace("_", " "): _plain(value) for name, value in training.items() if name not in left_out}
    return {"steps": f"{info.step:,}", "images seen": seen, **rest, "process": _plain(info.diffusion)}


def _plain(value: object) -> object:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _data(info: CheckpointInfo) -> dict[str, object]:
    training, names = info.training, info.classes
    return {
        "images": "not recorded" if training.samples is None else f"{training.samples:,}",
        "views of each": _listed(training.views) if training.views else None,
        "pixels on a side, crop": f"{info.image.size}, {info.image.crop}",
        "classes": f"{len(names):,}: {_listed(names)}" if names else "none are named",
        "identity": training.data_identity,
    }


def _listed(names: Iterable[object]) -> str:
    shown = [str(name).partition(",")[0][:60] for name in names]
    more = f" and {len(shown) - _SHOWN_CLASSES:,} more" if len(shown) > _SHOWN_CLASSES else ""
    return f"{', '.join(shown[:_SHOWN_CLASSES])}{more}"


def _scores(result: Result | None) -> list[str]:
    if result is None:
        return [
            "None were given. `dit-evaluate --out RESULT.json` makes them, `dit-convert --results` shows them here."
        ]
    lines = ["| metric | value | std |", "|---|---|---|"]
    for name, value in result.metrics.items():
        std = f"{result.std[name]:.3g}" if name in result.std else ""
        lines.append(f"| {as_text(name)} | {as_text(f'{value:.6g}')} | {as_text(std)} |")
    counts = {"samples": result.samples.count, "reference images": result.reference.count}
    how = {**{name: count for name, count in counts.items() if count is not None}, **(result.protocol or {})}
    said = ", ".join(f"{as_text(name.replace('_', ' '))} {as_text(_plain(value))}" for name, value in how.items())
    return ["\n".join(lines), f"Protocol: {said or 'not recorded'}"]
