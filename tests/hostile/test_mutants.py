"""Sound files mutated by key, type, value and byte: each is read, or refused by one printable sentence.

Hypothesis draws the bytes from which a mutant is made, the same ones for the same number of mutants, and makes the
mutant that ends otherwise as small as it can.
"""

import ast
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import re
import signal
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save

from extract.sources.tables import check_contents, check_table
from extract.store_folder import OutputFolder
from pipeline.checkpoint.folder import METRICS, recorded_files
from pipeline.checkpoint.info import read_info
from pipeline.checkpoint.snapshots import snapshot_path, snapshots
from pipeline.checkpoint.weight_files import read_weight_file, save_pickled_tensors
from pipeline.convert.card import read_result
from pipeline.convert.layouts import LAYOUTS
from pipeline.diffusion.process import make_process
from pipeline.dit.config import DiTConfig
from pipeline.features.manifest import parse_features
from pipeline.latents.manifest import parse_manifest
from pipeline.latents.records import parse_record
from pipeline.runtime.arrays import load_npy
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import typed
from sample.evaluate.npz import NpzImages
from sample.evaluate.reference import StatisticsFile
from sample.sidecar import read_sidecar
from sample.tune.points import read_point
from studies.cells import read_study
from studies.measure import Result
from tests.hostile import model_folders
from tests.hostile.limits import run_each, run_limited
from train.checkpointing import restore
from train.plot import read_series
from train.run_folder import MetricsFile, recorded_intervals

SUMS = {"count": 4, "mean": [0.0], "mean_square": [1.0], "variance": [0.0]}
RECORD = {"file": "train-00000.tar", "samples": 1, "bytes": 9, "sha256": "0", "sums": SUMS, "keys": ["a"], "crc32": [7]}
LATENT = {"kind": "moments", "channels": 2, "height": 4, "width": 4, "dtype": "float16", "downsample": 8}
VAE = {"name": "demo", "sha256": "0" * 64, "scaling_factor": 0.5, "shift_factor": None}
MANIFEST = {
    "format": "dit-latents",
    "version": 1,
    "split": "train",
    "shard_format": "safetensors",
    "samples": 1,
    "skipped": 0,
    "latent": LATENT,
    "views": ["center"],
    "image": {"size": 32, "crop": "adm-center"},
    "classes": ["ant"],
    "class_ids": ["a"],
    "vae": VAE,
    "statistics": {"mean": [0.0, 0.0], "std": [1.0, 1.0]},
    "seed": 0,
    "shards": [{"file": "train-00000.safetensors", "samples": 1, "bytes": 9, "sha256": "0" * 64}],
}
MODEL = {"input_size": [4, 4], "patch_size": 2, "in_channels": 2, "hidden_size": 64, "depth": 2, "num_heads": 4}
CONFIG = {
    "format": "dit-checkpoint",
    "version": 1,
    "step": 3,
    "model": MODEL,
    "diffusion": {"objective": "ddpm"},
    "classes": ["ant"],
    "class_ids": ["a"],
    "latent": LATENT,
    "vae": VAE,
    "image": {"size": 32, "crop": "adm-center"},
    "training": {},
}
TRAINER = {
    "format": "dit-train-state",
    "version": 1,
    "step": 3,
    "jump": 0,
    "rollbacks": 0,
    "seconds": 1.5,
    "optimizer": "AdamW (plain)",
    "adamw_steps": 3.0,
    "scale": 1.0,
    "finite_in_a_row": 3.0,
    "skipped_in_a_row": 0.0,
    "skipped": 0.0,
}
FILES = {"format": "dit-train-state", "version": 1, "files": {"state/trainer.json": {"bytes": 4, "sha256": "0" * 64}}}
SIDECAR = {"format": "dit-samples", "version": 1, "recipe": {"seed": 0}, "output": {"file": "x.png", "bytes": 3}}
ENCODER = {
    "name": "e",
    "class": "Dinov2Model",
    "sha256": "0" * 64,
    "resolution": 28,
    "grid": [2, 2],
    "width": 8,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
}
FEATURES = {
    "format": "dit-features",
    "version": 1,
    "split": "train",
    "samples": 1,
    "views": ["center"],
    "encoder": ENCODER,
    "columns": {"features": {"dtype": "float16", "shape": [1, 4, 8]}, "cls": {"dtype": "float16", "shape": [1, 8]}},
    "pca": None,
    "extraction": {"features": "e"},
    "plan": "p",
    "shards": [{"file": "train-00000.safetensors", "samples": 1, "bytes": 9, "sha256": "0" * 64}],
}
SETTINGS = {
    "steps": 40,
    "lr": 1e-4,
    "betas": [0.9, 0.999],
    "log-every": 10,
    "latents": "x",
    "vae": None,
    "compile": False,
}
AVERAGE = {
    "format": "dit-average",
    "version": 1,
    "step": 3,
    "sigma": 0.05,
    "gamma": 16.6,
    "bytes": 0,
    "sha256": hashlib.sha256(b"").hexdigest(),
}
LOGGED = {"step": 2, "loss": 0.5, "loss_q0": None, "lr": 1e-4, "images_per_second": 100}
BEGUN = {"split": "train", "limit": None, "vae": "0" * 64, "image-size": 32, "flip": True, "data": "0" * 64}
POINT = {
    "format": "dit-tune-point",
    "version": 1,
    "request": "r",
    "metric": "FD-pixels-2k",
    "value": 1.5,
    "passes": 40,
    "recipe": {"sampler": "ddim", "steps": 20, "guidance": 1.5},
}
CELL = {
    "cell": "a",
    "seed": 0,
    "tried": "",
    "flags": {"lr": 1e-4},
    "settings": {"train": {}, "evaluate": {}, "data": "d"},
    "parameters": 10,
    "macs": 20,
    "patch_size": 2,
    "points": [{"step": 1, "samples": 8, "metrics": {"FD-pixels-2k": 1.0}, "validation_loss": 0.5}],
    "seconds": 2.0,
}
STUDY = {
    "question": "q",
    "samples": 100,
    "cells": {"a": {"lr": 0.1}, "b": {"evaluate": {"steps": 4}}},
    "train": {"batch-size": 8},
    "baseline": "a",
    "expected": ["b", "a"],
    "sweep": {"lr": [0.1, 0.2]},
    "draw": ["curves"],
}
SCORES = {
    "format": "dit-evaluation",
    "version": 1,
    "metrics": {"FID-50k": 2.0},
    "std": {"FID-50k": 0.1},
    "protocol": {"seed": 0},
    "samples": {"images": {"count": 5}, "made_by": {"recipe": {"checkpoint": {"step": 40, "weights": "ema"}}}},
    "reference": {"statistics": {"count": 5}},
}
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        10**30,
        10**400,
        0.5,
        -0.0,
        1e38,
        1e-320,
        "",
        "a",
        "../../x",
        "/etc/x",
    ),
    *(
        "\0",
        "\ud800",
        "\x1b[31m",
        "a" * 10_000,
        [],
        {},
        [1],
        [[]],
        [None],
        ["\n"],
        {"": None},
        {"\0": "\x1b"},
        "1",
        "nan",
    ),
    *(float("nan"), float("inf"), float("-inf"), [0.5] * 50, list(range(1000))),
)


class Tape(random.Random):
    """Draws from bytes, and 0 behind their end: the fewer and the smaller they are, the simpler is what is made of them."""

    def __new__(cls, tape: bytes) -> "Tape":
        return super().__new__(cls)

    def __init__(self, tape: bytes) -> None:
        self._left = io.BytesIO(tape)

    def getrandbits(self, k: int) -> int:
        return int.from_bytes(self._left.read((k + 7) // 8), "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(16) / (1 << 16)


def mutated(value: Any, draw: random.Random) -> Any:
    """A copy in which one place has another key, type or value."""
    value = copy.deepcopy(value)
    holders = [value]
    for holder in holders:
        inner = holder.values() if isinstance(holder, dict) else holder
        holders += [one for one in inner if isinstance(one, dict | list) and one]
    holder = draw.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key, what = draw.choice(keys), draw.random()
    if what < 0.15:
        del holder[key]
    elif what < 0.3 and isinstance(holder, dict):
        holder[draw.choice(["", "\0", "\x1b[2J", "../x", "/x", "\ud800", "version"])] = holder.pop(key)
    elif what < 0.35:
        return draw.choice(ODD)
    else:
        holder[key] = copy.deepcopy(draw.choice(ODD))
    return value


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """The bytes with a few of them changed, put in, left out or cut off."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place, what = draw.randrange(len(changed) or 1), draw.random()
        if what < 0.6 and changed:
            changed[place] = draw.randrange(256)
        elif what < 0.8:
            changed[place:place] = draw.choice([b"0", b"-", b"[", b"\x00", b"\xff", b'"', b"9" * 30])
        else:
            del changed[place : place + draw.choice([1, 8, 1000])]
    return bytes(changed)


def of_json(value: Any) -> Callable[[random.Random], bytes]:
    """Mutants of a JSON file: three in four by key, type and value, the others by byte."""

    def make(draw: random.Random) -> bytes:
        if draw.random() >= 0.75:
            return mutated_bytes(json.dumps(value).encode(), draw)
        mutant = value
        for _ in range(draw.randint(1, 3)):
            mutant = mutated(mutant, draw) if isinstance(mutant, dict | list) and mutant else mutant
        return json.dumps(mutant).encode()

    return make


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def of_bytes(data: bytes) -> Callable[[random.Random], bytes]:
    return lambda draw: mutated_bytes(data, draw)


def of_npz(**arrays: np.ndarray) -> Callable[[random.Random], bytes]:
    """Mutants of an .npz: half of them have one sound archive around a mutated member."""

    def make(draw: random.Random) -> bytes:
        inside, stream = draw.random() < 0.5, io.BytesIO()
        with zipfile.ZipFile(stream, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name, array in arrays.items():
                data = _npy(array)
                archive.writestr(f"{name}.npy", mutated_bytes(data, draw) if inside else data)
        return stream.getvalue() if inside else mutated_bytes(stream.getvalue(), draw)

    return make


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read_config(folder: Path, data: bytes) -> None:
    _write(folder / "config.json", data)
    info = read_info(folder)
    DiTConfig.from_json(info["model"])
    make_process(info["diffusion"])


class _PastTheGateError(Exception):
    pass


class _NoState:
    def __getattr__(self, name: str) -> Any:
        raise _PastTheGateError


def read_trainer(folder: Path, data: bytes) -> None:
    (folder / "state").mkdir(exist_ok=True)
    _write(folder / "state" / "trainer.json", data)
    with contextlib.suppress(_PastTheGateError):
        restore(folder, _NoState())


def read_files(folder: Path, data: bytes) -> None:
    (folder / "state").mkdir(exist_ok=True)
    _write(folder / "state" / "files.json", data)
    assert all(".." not in name.split("/") and not name.startswith("/") for name in recorded_files(folder) or {})


def read_out(folder: Path, data: bytes) -> None:
    _write(folder / "x.png.json", data)
    read_sidecar(folder / "x.png")


def read_npy(folder: Path, data: bytes) -> None:
    try:
        load_npy(_write(folder / "x.npy", data))
    except (OSError, ValueError, EOFError) as error:  # what its callers put into words
        raise UserError(ascii(str(error))) from error


def read_images(folder: Path, data: bytes) -> None:
    images = NpzImages(_write(folder / "x.npz", data))
    if images.count * images.size[0] * images.size[1] < 1 << 20:
        list(images.batches(0, images.count, 8))
    images.close()


def read_reference(folder: Path, data: bytes) -> None:
    StatisticsFile(_write(folder / "x.npz", data))


def read_run_settings(folder: Path, data: bytes) -> None:
    _write(folder / "config.yaml", data)
    recorded_intervals(folder)


def read_average(folder: Path, data: bytes) -> None:
    path = snapshot_path(folder, 3, 0.05)
    path.parent.mkdir(exist_ok=True)
    _write(path.with_name(f"{path.name}.json"), data)
    _write(path, b"")
    (found,) = snapshots(folder)
    if found.check is not None and (damage := found.check()):
        raise UserError(damage)


def read_logged(folder: Path, data: bytes) -> None:
    """Draw and go on with a run among whose lines this one stands: the sound ones stay."""
    sound = json.dumps(LOGGED).encode()
    path = _write(folder / METRICS, b"\n".join([sound, data.replace(b"\n", b" "), sound, b""]))
    points = read_series(folder)["loss"]
    assert points[0] == points[-1] == (2, 0.5), points
    log = MetricsFile(folder, after_step=2)
    assert log.smallest("loss") is not None
    log.append(LOGGED)
    lines = path.read_bytes().rstrip().split(b"\n")  # a carriage return within a line is one of JSON's spaces
    steps = [json.loads(line)["step"] for line in lines]
    assert max(steps) == 2 and steps.count(2) >= 3
    if len(steps) < 4:
        raise UserError("the line was passed over")


def read_begun(folder: Path, data: bytes) -> None:
    output = OutputFolder(path=folder, split="train")
    output.work.mkdir(exist_ok=True)
    _write(output.work / "settings.json", data)
    output.check_settings(BEGUN, output.recorded())


def read_study_file(folder: Path, data: bytes) -> None:
    read_study(str(_write(folder / "s.yaml", data)))


def read_cell(folder: Path, data: bytes) -> None:
    typed(read_json(_write(folder / "RESULT.json", data)), Result, "it is no result of a run", advice="make it again")


def read_scores(folder: Path, data: bytes) -> None:
    stored: Any = SimpleNamespace(weights="ema", info=SimpleNamespace(step=40))
    read_result(_write(folder / "RESULT.json", data), stored)


def _zip(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def read_latents(layout: str, path: str, folder: Path, data: bytes) -> None:
    """List and read all latents of another project, one of whose files is this one."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    _write(folder / path, data)
    source = LAYOUTS[layout].listed(folder / "x.zip" if path == "x.zip" else folder)
    source.unscaled(np.stack(source.rows(np.arange(len(source.names)))).astype(np.float32), source.vae)


def read_dataset_json(folder: Path, data: bytes) -> None:
    _write(folder / "a.npy", _npy(np.zeros((8, 2, 2), np.float32)))
    read_latents("repa", "dataset.json", folder, data)


def read_shard(folder: Path, data: bytes) -> None:
    save_pickled_tensors(folder / "latents_stats.pt", {name: torch.ones(2) for name in ("mean", "std")})
    read_latents("lightningdit", "x.safetensors", folder, data)


def read_stats(folder: Path, data: bytes) -> None:
    _write(folder / "x.safetensors", SHARD)
    read_latents("lightningdit", "latents_stats.pt", folder, data)


def read_table(kind: str, folder: Path, data: bytes) -> None:
    """Look through a table, and then read all that it holds."""
    path = _write(folder / f"x.{kind}", data)
    check_table(path)
    check_contents(path)
    if kind == "arrow":
        with pa.memory_map(str(path)) as source:
            table = (pa.ipc.open_file if data.startswith(b"ARROW1") else pa.ipc.open_stream)(source).read_all()
            with contextlib.suppress(ValueError, OverflowError):  # what its callers put into words
                table.to_pylist()


def _parquet() -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pa.table({"image": [{"bytes": b"a", "path": "a.png"}] * 9, "label": [0, 1, 2] * 3}), stream)
    return stream.getvalue()


def _arrow(form: Callable[..., Any], codec: str | None) -> bytes:
    stream, images = io.BytesIO(), [{"bytes": bytes(40), "path": None}] * 8
    table = pa.table({"image": images, "label": [0, 1] * 4, "name": pa.array(["a", "b"] * 4).dictionary_encode()})
    with form(stream, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, max_chunksize=4)
    return stream.getvalue()


def _pt(*, is_old: bool = False, **tensors: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensors, stream, _use_new_zipfile_serialization=not is_old)
    return stream.getvalue()


ENCODER_CONFIG = {"model_type": "dinov2", "hidden_size": 8, "num_hidden_layers": 2, "id2label": {"0": "a"}}
PIXELS = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 28, "width": 28},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.2, 0.2, 0.2],
}
READ_PIXELS = partial(model_folders.read_encoder_settings, "preprocessor_config.json")
LABELS = {"labels": [["a.npy", 3]]}
LATENT_ZIP = _zip(**{"dataset.json": json.dumps(LABELS).encode(), "a.npy": _npy(np.zeros((8, 2, 2), np.float32))})
SHARD = save({name: torch.zeros(3, 2, 2, 2) for name in ("latents", "latents_flip")} | {"labels": torch.arange(3)})
VIEWS = {name: np.zeros((4, 2, 2), np.float32) for name in ("moments", "moments_flip")}
PROVENANCE = np.asarray(json.dumps({"format": "dit-reference", "version": 1, "inception": {"sha256": "0"}}))
KINDS: dict[str, tuple[Callable[[random.Random], bytes], Callable[[Path, bytes], Any]]] = {
    "manifest": (of_json(MANIFEST), lambda folder, data: parse_manifest(data, str(folder / "m"), check_seal=False)),
    "manifest of features": (
        of_json(FEATURES),
        lambda folder, data: parse_features(data, str(folder / "m"), check_seal=False),
    ),
    "config.yaml of a run": (of_json(SETTINGS), read_run_settings),
    "point of a search": (of_json(POINT), lambda folder, data: read_point(_write(folder / "p.json", data), "r")),
    "record of an average": (of_json(AVERAGE), read_average),
    "line of metrics.jsonl": (of_json(LOGGED), read_logged),
    "settings.json of an extraction": (of_json(BEGUN), read_begun),
    "study": (of_json(STUDY), read_study_file),
    "result of a study's run": (of_json(CELL), read_cell),
    "result of dit-evaluate": (of_json(SCORES), read_scores),
    "weights": (of_bytes(SHARD), lambda folder, data: read_weight_file(_write(folder / "w.safetensors", data))),
    "weights from before torch 1.6": (
        of_bytes(_pt(is_old=True, w=torch.zeros(3, 4), b=torch.ones(2))),
        lambda folder, data: read_weight_file(_write(folder / "w.pt", data)),
    ),
    "commit record": (of_json(RECORD), lambda folder, data: parse_record(data, folder / "r.json")),
    "config.json": (of_json(CONFIG), read_config),
    "trainer.json": (of_json(TRAINER), read_trainer),
    "files.json": (of_json(FILES), read_files),
    "sidecar": (of_json(SIDECAR), read_out),
    "npy": (of_bytes(_npy(np.zeros((1, 2, 3, 3), np.float32))), read_npy),
    "images npz": (of_npz(arr_0=np.zeros((2, 4, 4, 3), np.uint8)), read_images),
    "dataset.json of latents": (of_json(LABELS), read_dataset_json),
    "zip of latents": (of_bytes(LATENT_ZIP), partial(read_latents, "edm2", "x.zip")),
    "npz of latents": (of_npz(**VIEWS), partial(read_latents, "mar", "a/x.npz")),
    "safetensors of latents": (of_bytes(SHARD), read_shard),
    "latents_stats.pt": (of_bytes(_pt(mean=torch.zeros(2), std=torch.ones(2))), read_stats),
    "index of weights": (of_json(model_folders.INDEX), model_folders.read_index),
    "VAE's config.json": (of_json(model_folders.VAE_CONFIG), model_folders.read_vae),
    "encoder's config.json": (of_json(ENCODER_CONFIG), partial(model_folders.read_encoder_settings, "config.json")),
    "encoder's preprocessor_config.json": (of_json(PIXELS), READ_PIXELS),
    **{
        f"{name} of diffusers": (of_json(value), partial(model_folders.read_pipeline, name))
        for name, value in model_folders.FILES.items()
    },
    "parquet": (of_bytes(_parquet()), partial(read_table, "parquet")),
    **{
        f"arrow {form.__name__.removeprefix('new_')} {codec or 'mapped'}": (
            of_bytes(_arrow(form, codec)),
            partial(read_table, "arrow"),
        )
        for form, codec in ((pa.ipc.new_stream, None), (pa.ipc.new_stream, "zstd"), (pa.ipc.new_file, "lz4"))
    },
    "reference npz": (of_npz(count=np.asarray(5), mu=np.zeros(3), provenance=PROVENANCE), read_reference),
}


@pytest.fixture(scope="module", autouse=True)
def libraries_are_loaded(tmp_path_factory):
    """Loading them is no mutant's time."""
    for read, value in ((model_folders.read_vae, model_folders.VAE_CONFIG), (READ_PIXELS, PIXELS)):
        read(tmp_path_factory.mktemp("sound"), json.dumps(value).encode())
    model_folders.read_pipeline(
        "model_index.json", tmp_path_factory.mktemp("sound"), json.dumps(model_folders.PIPELINE).encode()
    )


LOADED: dict[str, tuple[Callable[[random.Random], bytes], Callable[[Path, bytes], Any]]] = {
    "a VAE loaded": (of_json(model_folders.VAE_CONFIG), partial(model_folders.read_vae, load=True)),
    "an encoder loaded": (of_json(ENCODER_CONFIG), partial(model_folders.read_encoder, "config.json", load=True)),
    "its processor loaded": (
        of_json(PIXELS),
        partial(model_folders.read_encoder, "preprocessor_config.json", load=True),
    ),
}
"""What passes the gate goes on to the library."""
_NO_MEMORY = re.compile("MemoryError|allocat|bad_alloc")


_TAPE_BYTES, _AT_ONCE = 40, 40
"""Of a mutant; and mutants made of one draw of hypothesis, which takes longer than they do."""


def ending(read: Callable[[Path, bytes], Any], folder: Path, data: bytes) -> bool:
    """Whether a mutant is refused.

    Raises:
        AssertionError: it ends otherwise than by success or one sentence.
    """
    try:
        read(folder, data)
    except UserError as error:
        said = str(error)
        is_sound = said.isprintable() and len(said) <= 2000 + len(str(folder)) and not _NO_MEMORY.search(said)
        assert is_sound, f"no sentence: {said[:200]!a} of {data[:1000]!r}"
        return True
    except Exception as error:
        raise AssertionError(f"{error!r:.200} of {data[:1000]!r}") from error
    return False


def check(kind: str, count: int, folder: Path) -> None:
    """Read so many mutants, each within `limits`; of those that end otherwise the smallest is named."""
    make, read = (KINDS | LOADED)[kind]

    def look(limited: Callable[..., bool]) -> list[bool] | str:
        refused: list[bool] = []

        @settings(
            max_examples=count // _AT_ONCE + 1,  # the first is of zeros alone
            database=None,
            derandomize=True,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(st.binary(min_size=_TAPE_BYTES * _AT_ONCE, max_size=_TAPE_BYTES * _AT_ONCE))
        def read_all(tapes: bytes) -> None:
            for at in range(0, len(tapes), _TAPE_BYTES):
                data = make(Tape(tapes[at : at + _TAPE_BYTES]))
                refused.append(limited(lambda data=data: ending(read, folder, data)))

        try:
            read_all()
        except AssertionError as smallest:
            return str(smallest)
        return refused

    refused = run_limited(look)
    assert not isinstance(refused, str), refused
    assert len(refused) >= count and sum(refused) > count / 8, "the mutants hardly touch what is read"


@pytest.mark.slow
def test_a_gate_with_a_fault_is_named_by_a_mutant_that_was_made_small(tmp_path, monkeypatch):
    def read(folder: Path, data: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            assert not isinstance(json.loads(data)["model"]["depth"], str), "a text as a depth"

    monkeypatch.setitem(globals(), "_AT_ONCE", 2)
    monkeypatch.setitem(KINDS, "faulty", (of_json(CONFIG), read))
    with pytest.raises(AssertionError, match="a text as a depth") as failure:
        check("faulty", 2000, tmp_path)
    mutant = json.loads(ast.literal_eval(str(failure.value).splitlines()[0].rpartition(" of ")[2]))
    assert isinstance(mutant["model"].pop("depth"), str)
    assert len(set(map(str, mutant.items())) ^ set(map(str, (CONFIG | {"model": {}}).items()))) <= 4, mutant


def test_a_mutant_that_takes_longer_or_more_memory_than_allowed_is_named():
    def sleep(number: int) -> str:
        time.sleep(0.5 * (number == 2))
        return ""

    def take(number: int) -> str:
        return str(len(np.empty(3 * 10**9 * (number == 2), np.uint8)))

    def die(number: int) -> str:
        os.kill(os.getpid(), signal.SIGKILL * (number == 2))
        return ""

    assert run_each(2, sleep, seconds=0.4) == ["", ""] and run_each(2, take) == ["0", "0"]
    with pytest.raises(AssertionError, match=r"number 2 took more than 0\.4 s"):
        run_each(3, sleep, seconds=0.4)
    with pytest.raises(AssertionError, match=r"number 2 ended .*(?s:.*)3\.\d GB were asked for, 2\.0 are allowed"):
        run_each(3, take)
    with pytest.raises(AssertionError, match="number 2 ended the process by -9"):
        run_each(3, die)


def test_the_files_that_are_mutated_are_sound(tmp_path):
    for kind, (_, read) in KINDS.items():
        sound = {"manifest": MANIFEST, "commit record": RECORD, "config.json": CONFIG, "trainer.json": TRAINER}
        sound |= {"manifest of features": FEATURES, "config.yaml of a run": SETTINGS, "point of a search": POINT}
        sound |= {"study": STUDY, "result of a study's run": CELL, "result of dit-evaluate": SCORES}
        sound |= {"files.json": FILES, "sidecar": SIDECAR, "dataset.json of latents": LABELS}
        sound |= {"record of an average": AVERAGE, "line of metrics.jsonl": LOGGED}
        sound |= {"settings.json of an extraction": BEGUN}
        if kind in sound:
            read(tmp_path, json.dumps(sound[kind]).encode())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_two_hundred_mutants_of_each_kind_end_in_success_or_one_sentence(kind, tmp_path):
    check(kind, 200, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(300)
def test_ten_thousand_mutants_of_each_kind_end_in_success_or_one_sentence(kind, tmp_path):
    check(kind, 10_000, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADED)
@pytest.mark.filterwarnings("ignore")
def test_five_hundred_mutants_that_a_library_loads_end_in_success_or_one_sentence(kind, tmp_path):
    check(kind, 500, tmp_path)
