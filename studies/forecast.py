"""--dry-run: what a study will take, cell by cell: networks counted, one training step of each timed."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.dit import DiT, DiTConfig
from pipeline.dit.config import BLOCKS
from pipeline.dit.macs import count_macs, count_parameters
from pipeline.features import FeatureManifest
from pipeline.features.store import features_of
from pipeline.latents import LatentStore, Manifest
from pipeline.runtime.devices import choose_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.units import size
from studies.cells import Flags, Run, Study, planned, train_flags

_TIMED_MACS = 1e11
"""Of the timed step at most: a part of a large network's batch stands for all of it."""
HEADING = ("cell", "runs", "parameters", "GFLOPs", "samples", "training GFLOPs", "hours", "disk")


def network(flags: Mapping[str, Any], manifest: Manifest, features: FeatureManifest | None = None) -> DiTConfig:
    """The network that dit-train makes of these flags for a store, and for the features that stand beside it.

    Raises:
        UserError: there is no such model, or its sizes do not fit together or the store, or its features are missing.
    """
    values = {name.replace("-", "_"): value for name, value in flags.items()}
    for name in ("align_features", "class_token"):
        if values.get(name):
            widths = {} if features is None else {name: features.encoder.width, "class_token": features.columns.cls}
            if not widths.get(name):
                raise UserError(f"--{name.replace('_', '-')} needs what dit-extract --features puts beside the store")
            values[name] = widths[name]
    given = BLOCKS.get(values.get("blocks", "release"), {}) | values
    fields = {field.name for field in dataclasses.fields(DiTConfig)}
    latent, ddpm = manifest.latent, values.get("objective", "ddpm") == "ddpm"
    return DiTConfig.from_preset(
        values.get("model", "DiT-XL/2"),
        **{name: value for name, value in given.items() if name in fields}
        | {
            "input_size": latent.height if latent.height == latent.width else (latent.height, latent.width),
            "in_channels": latent.channels,
            "num_classes": len(manifest.classes),
            "class_dropout_prob": values.get("class_dropout", 0.1),
            "learn_sigma": ddpm and values.get("variance", "learned-range") == "learned-range",
        },
    )


def forecast(study: Study, data: str) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """(rows of a table under `HEADING`, the sum last; {cell: why its network cannot be}).

    Training takes 3 × the multiply-adds of a forward pass per sample. Hours are for one process on this machine and
    for training alone; disk is what stays, one checkpoint of each run.
    """
    manifest, features = LatentStore(data).manifest, features_of(data)
    rows: list[tuple[str, ...]] = []
    bad: dict[str, str] = {}
    sums: list[tuple[float, ...]] = []
    for cell, runs in _runs_by_cell(study).items():
        flags = train_flags(study, runs[0], data=data, out=Path())
        try:
            config = network(flags, manifest, features)
        except UserError as error:
            bad[cell] = str(error)
            continue
        macs, samples = count_macs(config), flags["steps"] * flags.get("batch-size", 256)
        seconds = _step_seconds(config, flags) * flags["steps"]
        each = (1, 3 * macs * samples, seconds, 16 * count_parameters(config))
        sums.append(tuple(len(runs) * cost for cost in each))
        about = (f"{count_parameters(config):,}", f"{macs / 1e9:.4f}", f"{samples:,}")
        rows.append((cell, f"{len(runs)}", *about, *_costs(*sums[-1])))
    total = tuple(map(sum, zip(*sums, strict=True))) or (0, 0, 0, 0)
    rows.append(("all", f"{total[0]:.0f}", "", "", "", *_costs(*total)))
    return rows, bad


def _costs(_: float, work: float, seconds: float, disk: float) -> tuple[str, str, str]:
    return f"{work / 1e9:,.0f}", f"{seconds / 3600:.2f}", size(int(disk))


def _runs_by_cell(study: Study) -> dict[str, list[Run]]:
    """Every run there will be: as if each first try of a sweep had won."""
    tries = planned(study, {}, ())
    plan = planned(study, {run.name: 0.0 for run in tries}, ())
    return {cell: [run for run in plan if run.cell == cell] for cell in study.cells}


def _step_seconds(config: DiTConfig, flags: Flags) -> float:
    """Of one training step here, forward and backward, from the second of two on a part of the batch."""
    device, _ = choose_device("auto")
    batch = int(flags.get("batch-size", 256))
    part = max(1, min(batch, int(_TIMED_MACS / 3 / count_macs(config))))
    model = DiT(config, seed=0).to(device)
    x = torch.zeros(part, *config.state_shape, device=device)
    t, y = torch.zeros(part, device=device), torch.zeros(part, dtype=torch.long, device=device)
    for _ in range(2):
        began = time.perf_counter()
        model(x, t, y).square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - began) * batch / part
