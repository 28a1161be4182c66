"""ARCHITECTURE.md's last table, put to the test: each thing is added through the files named there, and works.

For every row a small dummy is written into a copy of the packages; it must show up in `--help` and work in a real run.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "extract", "train", "sample")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A thing that is added: to which files, seen in whose help, and used how."""

    thing: str
    edits: dict = field(default_factory=dict)
    """{file: (text before which the dummy's goes, the dummy's text)}"""
    files: dict = field(default_factory=dict)
    """{new file: its text}"""
    help: tuple
    """(module, word)"""
    runs: tuple
    """Commands after `python -m`; {work} is a folder, {store}, {run} and {images} are there."""
    leaves: str = ""
    """A file in {work} that must be there afterwards."""


TRAIN = "train --latents {store} --out {work}/run --model DiT-Ti/2 --steps 1 --batch-size 2 --sample-every 0"
EXTRACT = "extract --vae demo --image-size 64 --no-flip --out {work}/store"
SAMPLE = "sample --samples-per-class 1 --steps 2 --out {work}/grid.png"

ROWS = [
    Row(
        thing="another sampler",
        edits={
            "pipeline/diffusion/samplers.py": (
                "SAMPLERS: dict[str, SamplerSpec] = {\n",
                (
                    "def dummy(process, denoise, noise, draw, *, steps, on_step=told_no_one):\n"
                    "    return process.start(noise)\n\n\n"
                    "SAMPLERS: dict[str, SamplerSpec] = {\n"
                    '    "dummy": SamplerSpec(function=dummy, objective="ddpm", help="a dummy"),\n'
                ),
            )
        },
        help=("sample", "dummy (a dummy)"),
        runs=(f"{SAMPLE} --checkpoint {{run}} --sampler dummy",),
        leaves="grid.png",
    ),
    Row(
        thing="another objective",
        edits={
            "pipeline/diffusion/process.py": (
                "OBJECTIVES: dict[str, ObjectiveSpec] = {\n",
                (
                    "OBJECTIVES: dict[str, ObjectiveSpec] = {\n"
                    '    "dummy": ObjectiveSpec(module="dummy", kind="Dummy", help="a dummy"),\n'
                ),
            )
        },
        files={
            "pipeline/diffusion/dummy.py": '"""A dummy."""\nimport dataclasses\nfrom typing import ClassVar\n'
            "from pipeline.diffusion.flow import RectifiedFlow\n\n\n"
            "@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)\n"
            'class Dummy(RectifiedFlow):\n    """A dummy."""\n\n    objective: ClassVar[str] = "dummy"\n'
        },
        help=("train", "dummy is a dummy"),
        runs=(f"{TRAIN} --objective dummy", f"{SAMPLE} --checkpoint {{work}}/run"),
        leaves="grid.png",
    ),
    Row(
        thing="another conditioning design",
        edits={
            "pipeline/dit/config.py": (
                'DESIGNS: dict[str, Design] = {\n    "adaln-zero": Design(modulation_vectors=6, zero_start=True),\n',
                (
                    'DESIGNS: dict[str, Design] = {\n    "adaln-zero": Design(modulation_vectors=6, zero_start=True),\n'
                    '    "dummy": Design(modulation_vectors=4, added_tokens=1),\n'
                ),
            ),
            "pipeline/dit/blocks.py": (
                "    if design.added_tokens:\n",
                (
                    "    if design.added_tokens == 1:\n"
                    "        return torch.cat([tokens, y[:, None]], dim=1), t + y\n"
                    "    if design.added_tokens:\n"
                ),
            ),
        },
        help=("train", "dummy"),
        runs=(f"{TRAIN} --conditioning dummy", f"{SAMPLE} --checkpoint {{work}}/run"),
        leaves="grid.png",
    ),
    Row(
        thing="another MLP or norm in the block",
        edits={
            "pipeline/dit/config.py": (
                "    qk_norm: bool = False\n",
                '    dummy_mlp: bool = False\n    """A dummy."""\n    qk_norm: bool = False\n',
            ),
            "pipeline/dit/blocks.py": (
                "        self.mlp = Mlp(",
                "        self.mlp = nn.Linear(config.hidden_size, config.hidden_size) if config.dummy_mlp else Mlp(",
            ),
        },
        help=("train", "--dummy-mlp"),
        runs=(f"{TRAIN} --dummy-mlp", f"{SAMPLE} --checkpoint {{work}}/run"),
        leaves="grid.png",
    ),
    Row(
        thing="another shard format",
        edits={
            "pipeline/latents/names.py": ('FORMATS = {"', 'FORMATS = {"dummy": ".dummy", "'),
        },
        files={
            "pipeline/latents/dummy_shards.py": '"""A dummy."""\n'
            "from pipeline.latents.safetensors_shards import decode_integers, pieces, read_layout\n"
        },
        help=("extract", "dummy"),
        runs=(
            f"{EXTRACT} --data {{images}} --format dummy",
            "pipeline.inspect {work}/store --verify",
            TRAIN.replace("{store}", "{work}/store"),
        ),
        leaves="store/train-00000.dummy",
    ),
    Row(
        thing="another kind of image source",
        edits={
            "extract/sources/selection.py": (
                "SOURCES: dict[str, SourceKind] = {\n",
                (
                    "def _open_dummy(given):\n"
                    "    from extract.sources.dummy import DummySource\n\n"
                    '    return DummySource(root=Path(given.data.removeprefix("dummy:")))\n\n\n'
                    "SOURCES: dict[str, SourceKind] = {\n"
                    '    "dummy": SourceKind(\n'
                    '        help="dummy:FOLDER", suits=lambda given: given.data.startswith("dummy:"), open=_open_dummy\n'
                    "    ),\n"
                ),
            )
        },
        files={
            "extract/sources/dummy.py": '"""A dummy."""\nfrom extract.sources.folders import FolderSource\n\n\n'
            'class DummySource(FolderSource):\n    """A dummy."""\n'
        },
        help=("extract", "dummy:FOLDER"),
        runs=(f"{EXTRACT} --data dummy:{{images}}",),
        leaves="store/manifest.json",
    ),
    Row(
        thing="another project's latents",
        edits={
            "pipeline/convert/layouts.py": (
                "LAYOUTS: dict[str, LayoutSpec] = {\n",
                (
                    "LAYOUTS: dict[str, LayoutSpec] = {\n"
                    '    "dummy": LayoutSpec(help="a dummy", suits=lambda path: path.name == "images", module="dummy"),\n'
                ),
            )
        },
        files={
            "pipeline/convert/dummy.py": '"""A dummy."""\nimport numpy as np\n'
            "from pipeline.convert.source import Source\n\n\n"
            "def listed(path):\n"
            "    return Source(\n"
            '        origin="a", names=["b"], labels=np.zeros(1, np.int64), kind="point", shape=(4, 2, 2), unknown=(),\n'
            "        rows=lambda indices: [np.ones((1, 4, 2, 2))] * len(indices), unscaled=lambda rows, vae: rows,\n"
            '        vae={"name": "demo", "class": "", "scaling_factor": 1.0, "shift_factor": None}, overrides={},\n'
            "        channels=4,\n"
            "    )\n"
        },
        help=("pipeline.convert", "dummy (a dummy)"),
        runs=("pipeline.convert --from {images} --to {work}/store --format store",),
        leaves="store/manifest.json",
    ),
    Row(
        thing="another metric",
        edits={
            "sample/evaluate/metrics.py": (
                "METRICS: dict[str, MetricSpec] = {\n",
                (
                    "METRICS: dict[str, MetricSpec] = {\n"
                    '    "dummy": MetricSpec(\n'
                    '        title="Dummy",\n'
                    "        function=lambda compared: Outcome(value=42.0),\n"
                    '        features="features_2048",\n'
                    "        of_gaussian=True,\n"
                    "        standard=False,\n"
                    "    ),\n"
                ),
            )
        },
        help=("sample.evaluate", "dummy"),
        runs=(
            "sample.evaluate --samples {work}/a.npz --reference {work}/b.npz --metrics dummy --out {work}/result.json",
        ),
        leaves="result.json",
    ),
    Row(
        thing="a flag",
        edits={
            "train/options.py": (
                "    save_every: Free[Amount] = 10_000\n",
                '    dummy: int = 3\n    """A dummy."""\n    save_every: Free[Amount] = 10_000\n',
            )
        },
        help=("train", "--dummy INT"),
        runs=(f"{TRAIN} --dummy 4",),
        leaves="run/config.yaml",
    ),
]


def run(tree, *words, cwd):
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twelve pictures in two classes, their store, and a run of two steps."""
    work = tmp_path_factory.mktemp("made")
    for number in range(12):
        path = work / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    there = {"images": work / "images", "store": work / "store", "run": work / "run", "work": work}
    for words in (f"{EXTRACT} --data {{images}}", TRAIN):
        done = run(ROOT, *words.format(**there).split(), cwd=work)
        assert done.returncode == 0, done.stderr
    return there


@pytest.fixture
def copied(tmp_path):
    """A copy of the packages to write dummies into."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / "tree" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "tree"


def table():
    """{what is added: files named} of the last table of ARCHITECTURE.md."""
    text = (ROOT / "ARCHITECTURE.md").read_text().split("## Where would I change X?")[1]
    lines = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", text, flags=re.MULTILINE)[1:]
    return {thing: re.findall(r"`([\w/.]+)`", files) for thing, files in lines}


def add(row, tree):
    for name, (before, text) in row.edits.items():
        path = tree / name
        content = path.read_text()
        assert content.count(before) == 1, f"{name} has changed: adapt the dummy of {row.thing!r}"
        path.write_text(content.replace(before, text))
    for name, text in row.files.items():
        (tree / name).write_text(text)


def test_the_table_and_the_dummies_name_the_same_files():
    named = table()
    assert sorted(named) == sorted(row.thing for row in ROWS)
    for row in ROWS:
        in_new_folder = {str(Path(name).parent) for name in row.files}
        assert {*row.edits} == {name for name in named[row.thing] if name.endswith(".py")}, row.thing
        assert in_new_folder == {name.rstrip("/") for name in named[row.thing] if not name.endswith(".py")}, row.thing


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.thing)
def test_what_is_added_there_shows_up_in_the_help(row, copied):
    add(row, copied)
    module, word = row.help
    shown = run(copied, module, "--help", cwd=copied)
    assert shown.returncode == 0, shown.stderr
    assert word in " ".join(shown.stdout.replace("│", " ").split())


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.thing)
def test_what_is_added_there_works_in_a_real_run(row, copied, made, tmp_path):
    add(row, copied)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    there = {**made, "work": tmp_path}
    for words in row.runs:
        done = run(copied, *words.format(**there).split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / row.leaves).exists()
    if row.thing == "another metric":
        assert "42" in (tmp_path / row.leaves).read_text()
    if row.thing == "a flag":
        assert "dummy: 4" in (tmp_path / row.leaves).read_text()
