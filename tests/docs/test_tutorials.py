"""Every command of every tutorial runs, in order, on tiny data that lies where the tutorial says.

Nothing is left out. What makes it short is stated here: SMALLER is put behind the words of each command, and INSTEAD is
what is replaced in a line. The Hub and Slurm's commands are stand-ins on this machine.
"""

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.dit import DiT, DiTConfig
from tests.docs.page_commands import blocks, command_lines, program_of
from tests.encoders import write_vae
from tests.examples.test_cluster import SCONTROL, SRUN
from tests.fake_hub import TOKEN, Repository, serving

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
SMALLER = {
    "dit-extract": "--image-size 64 --batch-size 4 --samples-per-shard 8",
    "dit-train": "--model DiT-Ti/2 --batch-size 8 --steps 4 --save-every 2 --sample-every 2 --log-every 1 --preview-steps 2 --preview-classes 2 --lr-warmup-steps 1 --validate-every 2",
    "dit-sample": "--batch-size 4 --steps 2",
    "dit-evaluate": "",
    "dit-tune": "--points 2 --steps 2 --batch-size 8",
    "dit-inspect": "",
    "dit-convert": "",
    "dit-view": "--port 0",
}
INSTEAD = {
    r"/data/": "data/",
    r"/data\b": "data",
    r"step-0002000": "step-0000002",
    r"--num-samples \d+": "--num-samples 8",
    r"((dit-sample|sample\.sbatch).*--config paper-256)": r"\1 --num-samples 8",  # the preset says 50,000
    r"--(nproc-per-node|num_processes) 8": r"--\1 2",
    r":29500": ":0",
    r"(sample\.sbatch.*)": rf"\1 {SMALLER['dit-sample']}",
    r"(train\.sbatch.*)": rf"\1 {SMALLER['dit-train']}",
    r"(extract\.sbatch.*)": rf"\1 {SMALLER['dit-extract']}",
    # FID takes 2,048 images, and the weights of its network are no part of this project
    r"(dit-tune.*) --inception \S+": r"\1 --features pixels",
    r"--inception \S+": "--inception data/inception.safetensors --metrics is,precision,recall",
}
SBATCH = """#!/bin/bash
# The first task of a job, here and now, with the variables that Slurm would set.
IFS=, read -ra given <<< "${1#--export=ALL,}"
shift
export SLURM_JOB_ID=4711 SLURM_JOB_NODELIST=n1 SLURM_NTASKS=1 SLURM_ARRAY_TASK_ID=0 "${given[@]}"
exec bash "$@"
"""
SYNSETS = {"n01440764": "tench", "n01443537": "goldfish", "n02099601": "golden retriever", "n09472597": "volcano"}


def picture(number, side=64):
    rows, columns = np.mgrid[:side, :side] / side
    waves = [np.sin(rows * (number % 5 + 1) + channel) * np.cos(columns * (number % 7 + 1)) for channel in range(3)]
    image = Image.fromarray(np.uint8(127 + 127 * np.stack(waves, -1)))
    image.save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write_imagenet(data):
    inner = {}
    for label, synset in enumerate(SYNSETS):
        files = {f"{synset}_{n}.JPEG": picture(10 * label + n) for n in range(6)}
        inner[f"{synset}.tar"] = write_tar(data / "class.tar", files).read_bytes()
        (data / "imagenet" / synset).mkdir(parents=True)
        for name, jpeg in files.items():
            (data / "imagenet" / synset / name).write_bytes(jpeg)
    (data / "class.tar").unlink()
    write_tar(data / "ILSVRC2012_img_train.tar", inner)
    write_tar(data / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_{n:08d}.JPEG": picture(n) for n in range(1, 9)})
    kit = data / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    columns = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    rows = [(k, synset, words, "", 0, 0, 0, 0) for k, (synset, words) in enumerate(SYNSETS.items(), 1)]
    table = np.array(rows, dtype=[(name, "O") for name in columns]).reshape(-1, 1)
    scipy.io.savemat(kit / "meta.mat", {"synsets": table})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n4\n4\n3\n2\n1\n")


def write_released_weights(path):
    """A state dict as the release's, 1,000 classes on 8×8 cells, with weights that are not those of a fresh network."""
    state = DiT(DiTConfig(input_size=8, hidden_size=128, depth=2, num_heads=4, num_classes=1000)).state_dict()
    torch.save({name: tensor + 0.02 * torch.ones_like(tensor) for name, tensor in state.items()}, path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What the tutorials find in /data."""
    from sample.evaluate.inception import FIDInception

    folder = tmp_path_factory.mktemp("data")
    write_imagenet(folder)
    for number in range(24):
        place = folder / "photos" / ("cat", "dog")[number % 2] / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(number, side=80))
    write_released_weights(folder / "DiT-XL-2-256x256.pt")
    images = np.stack([np.asarray(Image.open(io.BytesIO(picture(number)))) for number in range(24)])
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=images)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(FIDInception().state_dict(), folder / "inception.safetensors")
    return folder


@pytest.fixture
def there(data, tmp_path):
    """(the folder to work in, its variables): the data, the examples, stand-ins for Slurm's commands, and a Hub."""
    (tmp_path / "data").mkdir()
    for path in data.iterdir():
        (tmp_path / "data" / path.name).symlink_to(path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    with serving() as hub:
        hub.repositories["stabilityai/sd-vae-ft-ema"] = Repository()
        vae = {path.name: path.read_bytes() for path in write_vae(tmp_path / "vae").iterdir()}
        hub.repositories["stabilityai/sd-vae-ft-ema"].files |= vae
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        variables = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "HF_TOKEN": TOKEN}
        variables |= {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        variables |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        yield tmp_path, {**os.environ, **variables}


def made_small(line):
    for written, instead in INSTEAD.items():
        line = re.sub(written, instead, line)
    program = program_of(line)
    return f"{line} {SMALLER[program[0]]}".strip() if program else line


def test_every_line_that_is_replaced_stands_in_a_tutorial():
    text = "\n".join(
        line for page in TUTORIALS for block in blocks(page.read_text(), "bash") for line in command_lines(block)
    )
    for written in INSTEAD:
        assert re.search(written, text), written


@pytest.mark.slow
@pytest.mark.timeout(1800)  # of a machine that does other things, too
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_the_commands_of_a_tutorial_run_in_order(page, there):
    work, variables = there
    text = page.read_text()
    lines = [made_small(line) for block in blocks(text, "bash") for line in command_lines(block)]
    assert len(lines) >= 3
    python = "\n".join(blocks(text, "python"))
    if python:
        (work / "typed.py").write_text(python)
        lines.append("python typed.py")
    words = [sys.executable, str(ROOT / "tests" / "docs" / "at_once.py")]
    ended = subprocess.run(
        words, input="\n".join(lines), cwd=work, env=variables, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
