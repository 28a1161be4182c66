"""Trains on digits of 4 channels, and on the very same lifted into 64 by a fixed rotation: what wide latents need.

A digit of 8 × 8 pixels is 4 × 4 cells of 4 numbers. A matrix Q of 64 orthonormal rows and 4 columns, drawn once, turns
each cell z into Q z: the same data, in a plane of 4 of 64 directions, where noise fills all 64. Networks of width 48
then train by `dit-train` on both, and 1,000 digits of each, taken back by Q's transpose, are compared with the real
ones: the Fréchet distance of their 64 pixels, and the share that a support vector classifier names right.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from pipeline.latents.manifest import LatentSpec
from pipeline.latents.writer import StoreDescription, finish_store, write_shard
from pipeline.randomness import Permutation, generator
from pipeline.runtime.console import run_command, say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_json
from sample.__main__ import main as dit_sample
from train.__main__ import main as dit_train

SIDE, FOLD, WIDE = 8, 2, 64
NARROW = FOLD**2
SAMPLES = 1000
TRAIN = "--model DiT-Ti/2 --patch-size 1 --hidden-size 48 --num-heads 4 --depth 4 --blocks modern --objective flow"
TRAIN += " --batch-size 64 --optimizer muon --lr 2e-3 --lr-schedule linear --ema-decay 0.99 --ema-warmup"
TRAIN += (
    " --mixed-precision no --latent-normalization channel --sample-every 0 --no-tensorboard --no-flip --log-every 100"
)
SAMPLE = "--sampler heun --steps 12 --guidance 1 --batch-size 500"
SHIFT = "--time-shift 4"  # √(64 / 4): what --time-shift auto would be if 4 channels were its measure
ROW_FLAGS = {
    "4 channels, velocity": "",
    "64 channels, velocity": "--anyway",
    "64 channels, velocity, shifted": f"--anyway {SHIFT}",
    "64 channels, x_0": "--prediction x0",
    "64 channels, x_0, shifted": f"--prediction x0 {SHIFT}",
    "64 channels, velocity, shifted, head": f"--head-width 96 {SHIFT}",
    "64 channels, x_0, shifted, head": f"--prediction x0 --head-width 96 {SHIFT}",
}
"""What is trained, each with its flags."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is trained and where it goes."""

    out: Path
    """Folder for stores, runs and figures; what is there is not made again."""
    steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 1200
    """Steps of each run, over which the learning rate falls to 0."""
    seeds: Annotated[int, Meta(ge=1, le=100)] = 1
    """Training seeds, 0 … N − 1."""
    rows: str = ""
    """Only these rows, names with a ; between them. Default: all."""


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(Options, run, prog="lifted.py", description=__doc__ or "", argv=argv)


def run(options: Options) -> None:
    """Make the stores, train and sample what is asked for, and print the table."""
    digits, labels = real_digits()
    stores = {NARROW: options.out / "narrow", WIDE: options.out / "wide"}
    for channels, folder in stores.items():
        if not folder.exists():
            write_store(folder, lift(cells(digits), channels), labels)
    figures = {}
    for row in (row for row in ROW_FLAGS if not options.rows or row in options.rows.split(";")):
        store = stores[int(row.split()[0])]
        made = [trained(row, store, seed, options) for seed in range(options.seeds)]
        figures[row] = [measure(each, digits, labels) for each in made]
        write_json(options.out / "figures.json", figures)
    for line in table(figures):
        say(line)


def trained(row: str, store: Path, seed: int, options: Options) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """1,000 digits [N, 64] of a row's run, and their labels; made unless they are there."""
    name = f"{row.replace(' ', '-').replace(',', '')}-{seed}"
    folder, out = options.out / name, options.out / f"{name}.safetensors"
    if not out.exists():
        steps = f"--steps {options.steps} --decay-steps {options.steps} --save-every {options.steps}"
        words = f"--latents {store} --out {folder} --seed {seed} {steps} {TRAIN} {ROW_FLAGS[row]}"
        if dit_train(words.split()):
            raise UserError(f"{row} was not trained; see above")
        words = f"--checkpoint {folder} --out {out} --num-samples {SAMPLES} {SAMPLE}"
        if dit_sample(words.split()):
            raise UserError(f"{row} was not sampled from; see above")
        shutil.rmtree(folder)
    made = load_file(out)
    return pixels(lower(made["latents"])), made["label"].numpy()


def real_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """scikit-learn's digits [N, 64] from −1 to 1, and their labels."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return loaded.data / 8 - 1, loaded.target.astype(np.int64)


def cells(digits: NDArray[np.float64]) -> Tensor:
    """[N, 4, 4, 4]: squares of 2 × 2 pixels as channels."""
    images = torch.from_numpy(digits).view(-1, 1, SIDE, SIDE).float()
    return torch.nn.functional.pixel_unshuffle(images, FOLD)


def pixels(latents: Tensor) -> NDArray[np.float64]:
    """The inverse of `cells`."""
    made: NDArray[np.float64] = torch.nn.functional.pixel_shuffle(latents, FOLD).flatten(1).double().numpy()
    return made


def rotation() -> Tensor:
    """[64, 4] with orthonormal columns, always the same."""
    draws = torch.randn(WIDE, NARROW, generator=generator(0, "rotation"), dtype=torch.float64)
    return torch.linalg.qr(draws).Q.float()


def lift(latents: Tensor, channels: int) -> Tensor:
    """Cells of 4 numbers in a plane of so many."""
    return latents if channels == NARROW else torch.einsum("wc,nchv->nwhv", rotation(), latents)


def lower(latents: Tensor) -> Tensor:
    """Cells of 4 numbers from those of 64: what stands off the plane is left out."""
    return latents if latents.shape[1] == NARROW else torch.einsum("wc,nwhv->nchv", rotation(), latents)


def write_store(folder: Path, latents: Tensor, labels: NDArray[np.int64]) -> None:
    """A store of points, in a keyed order."""
    order = Permutation(len(latents), 0, "lifted digits")[np.arange(len(latents))]
    keys = [f"{number}.png" for number in order]
    chosen = latents[torch.from_numpy(order)][:, None]
    write_shard(folder, "train", 0, "safetensors", chosen, labels[order].tolist(), order.tolist(), keys, kind="point")
    channels, height, width = latents.shape[1:]
    about = StoreDescription(
        split="train",
        shard_format="safetensors",
        latent=LatentSpec(kind="point", channels=channels, height=height, width=width, dtype="float32", downsample=2),
        views=("center",),
        image={"size": SIDE, "crop": "adm-center"},
        vae={"name": "rotation", "class": "none", "sha256": "", "scaling_factor": 1.0, "shift_factor": None},
        classes=[str(digit) for digit in range(10)],
        class_ids=[str(digit) for digit in range(10)],
        seed=0,
    )
    finish_store(folder, about, shards=1)


def measure(
    made: tuple[NDArray[np.float64], NDArray[np.int64]], real: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[float, float]:
    """(Fréchet distance of the pixels, share that is recognised as the digit asked for)."""
    from sklearn.svm import SVC

    digits, asked = made
    named = SVC(gamma=0.064).fit(real, labels).predict(digits)  # 0.001 at 0 … 16
    return frechet(digits, real), float((named == asked).mean())


def frechet(some: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """|m₁ − m₂|² + tr(C₁ + C₂ − 2 √(C₁ C₂)), the distance between two normal distributions."""
    first, second = np.cov(some.T), np.cov(others.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(first @ second).real, 0))
    apart = some.mean(0) - others.mean(0)
    return float(apart @ apart + np.trace(first) + np.trace(second) - 2 * roots.sum())


def table(figures: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Means over the seeds as a Markdown table, with the smallest and largest where there are several."""
    lines = ["| latents, what is predicted | Fréchet distance of the pixels | recognised |", "|---|---|---|"]
    for row, pairs in figures.items():
        distances, shares = np.array(pairs).T
        spread = f" ({distances.min():.3f} … {distances.max():.3f})" if len(pairs) > 1 else ""
        lines.append(f"| {row} | {distances.mean():.3f}{spread} | {shares.mean():.1%} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
