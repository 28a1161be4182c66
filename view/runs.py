"""Runs for the page: their curves over each other, their last numbers, and their previews by step."""

import re
import threading
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import read_regular
from train.plot import PANELS, draw_curves, read_series
from view.given import Given, GivenNetwork

PREVIEW_BYTES = 1 << 27
_PREVIEW = re.compile(r"step-(\d{1,12})\.png")
_PNG = b"\x89PNG\r\n\x1a\n"
_drawing = threading.Lock()  # matplotlib draws one figure at a time


def describe(network: GivenNetwork) -> dict[str, Any]:
    """A run's last numbers and the steps that it has previews and checkpoints of; an empty log is no error."""
    try:
        series = read_series(Path(network.path))
        problem = ""
    except UserError as error:
        series, problem = {}, str(error)
    steps = [points[-1][0] for points in series.values() if points]
    return {
        "name": network.name,
        "step": max(steps, default=None),
        "last": {name: points[-1][1] for name, points in series.items() if points},
        "previews": sorted(_previews(network)),
        "checkpoints": sorted(network.steps()),
        "problem": problem,
    }


def _previews(network: GivenNetwork) -> dict[int, Path]:
    """{step: file} of the previews."""
    named = ((_PREVIEW.fullmatch(path.name), path) for path in (Path(network.path) / "samples").glob("step-*.png"))
    return {int(match[1]): path for match, path in named if match}


def preview(network: GivenNetwork, step: int) -> bytes:
    """The PNG of a preview.

    Raises:
        UserError: there is none, or what is there is no picture of this run.
    """
    path = _previews(network).get(step)
    if path is None:
        raise UserError(f"{network.name} has no preview of step {step:,} (any more); choose another step")
    if not path.resolve().is_relative_to(Path(network.path).resolve()):
        raise UserError(f"{path} is a link out of its run, which this page does not follow")
    data = read_regular(path, most=PREVIEW_BYTES)
    if not data.startswith(_PNG):
        raise UserError(f"{path} is no PNG; it is damaged, or not a preview")
    return data


def curves(given: Given, numbers: Sequence[int], *, smoothing: float) -> bytes:
    """A PNG of the curves of several runs over each other.

    Raises:
        UserError: one of them has logged nothing.
    """
    chosen = [given.network(number) for number in dict.fromkeys(numbers)]
    if not chosen:
        raise UserError("choose at least one run")
    series = {network.name: read_series(Path(network.path)) for network in chosen}
    if not any(name in one for one in series.values() for panel in PANELS for name in panel.names):
        raise UserError(f"{', '.join(series)} logged nothing that is drawn; wait until a step is logged")
    with _drawing:
        figure = draw_curves(series, smoothing=smoothing)
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
