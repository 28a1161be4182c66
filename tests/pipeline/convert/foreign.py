"""Latents laid out as other projects' own scripts leave them, made by hand: what each file is, and what must come out."""

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from pipeline.checkpoint.weight_files import save_pickled_tensors

COUNT = 14
LABELS = [(5 * index) % 3 for index in range(COUNT)]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A folder or zip, and the store that it must become."""

    path: Path
    latents: np.ndarray
    """[sample, view, values, height, width], unscaled, in float32."""
    labels: list
    keys: list
    layout: str
    vae: dict
    views: tuple
    kind: str


def mean_std(draws):
    """Mean and standard deviation, stacked, and mean and log-variance."""
    mean, std = (
        draws.normal(0, 6, (COUNT, 4, 4, 4)).astype("f4"),
        draws.uniform(1e-4, 0.4, (COUNT, 4, 4, 4)).astype("f4"),
    )
    std[3, 0, 0, 0] = 0  # a float32 that underflowed
    with np.errstate(divide="ignore"):
        logvar = np.maximum(2 * np.log(std.astype("f8")), -30)
    return np.concatenate([mean, std], 1), np.concatenate([mean, logvar], 1)[:, None]


def tool_files(draws):
    """{name: bytes} as `dataset_tool.py encode` writes them, and what they mean."""
    stored, meant = mean_std(draws)
    names = [f"{f'{index:08d}'[:5]}/img-mean-std-{index:08d}.npy" for index in range(COUNT)]
    files = {}
    for name, array in zip(names, stored, strict=True):
        stream = io.BytesIO()
        np.save(stream, array)
        files[name] = stream.getvalue()
    labels = [list(pair) for pair in zip(names, LABELS, strict=True)]
    files["dataset.json"] = json.dumps({"labels": labels}).encode()
    return files, names, meant


def unpack(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pack(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


EDM2_VAE = {
    "name": "stabilityai/sd-vae-ft-mse",
    "class": "AutoencoderKL",
    "sha256": None,
    "scaling_factor": [1 / 4.17, 1 / 4.62, 1 / 3.71, 1 / 3.28],
    "shift_factor": [5.81, 3.25, 0.12, -2.15],
    "pixels": [0, 1],
}
REPA_VAE = {**EDM2_VAE, "scaling_factor": 0.18215, "shift_factor": None, "pixels": [-1, 1]}


def by_the_tool(draws, put, *, layout, vae):
    """What EDM2's tool makes, put somewhere by `put(files)`, which gives the path."""
    files, names, meant = tool_files(draws)
    about = {"latents": meant, "labels": LABELS, "keys": names, "views": ("center",), "kind": "moments"}
    return Made(path=put(files), layout=layout, vae=vae, **about)


def edm2_folder(place, draws):
    return by_the_tool(draws, lambda files: unpack(place / "img64-sd", files), layout="edm2", vae=EDM2_VAE)


def edm2_zip(place, draws):
    return by_the_tool(draws, lambda files: pack(place / "img64-sd.zip", files), layout="edm2", vae=EDM2_VAE)


def repa(place, draws):
    def put(files):
        unpack(place / "data" / "vae-sd", files)
        unpack(place / "data" / "images", {"00000/img00000000.png": b"png", "dataset.json": b"{}"})
        return place / "data"

    return by_the_tool(draws, put, layout="repa", vae=REPA_VAE)


def lightningdit(place, draws):
    folder = place / "vavae_f16d32" / "imagenet_train_64"
    folder.mkdir(parents=True)
    latents = draws.normal(1, 3, (COUNT, 2, 6, 4, 4)).astype("f4")
    keys = []
    for rank, rows in ((0, slice(0, 9)), (1, slice(9, COUNT))):
        name = f"latents_rank{rank:02d}_shard000.safetensors"
        part = torch.from_numpy(latents[rows])
        contents = {
            "latents": part[:, 0].contiguous(),
            "latents_flip": part[:, 1].contiguous(),
            "labels": torch.tensor(LABELS[rows]),
        }
        metadata = {"total_size": str(len(part)), "dtype": "torch.float32", "device": "cpu"}
        save_file(contents, folder / name, metadata=metadata)
        keys += [f"{name}/{row}" for row in range(len(part))]
    mean = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0]).reshape(1, 6, 1, 1)
    std = torch.tensor([4.0, 2.0, 0.5, 1.0, 8.0, 3.0]).reshape(1, 6, 1, 1)
    save_pickled_tensors(folder / "latents_stats.pt", {"mean": mean, "std": std})
    vae = {"name": None, "class": "AutoencoderKL", "sha256": None, "pixels": [-1, 1]}
    vae |= {"scaling_factor": (1 / std.double()).flatten().tolist(), "shift_factor": mean.flatten().tolist()}
    return Made(
        path=folder,
        latents=latents,
        labels=LABELS,
        keys=keys,
        layout="lightningdit",
        vae=vae,
        views=("center", "center-hflip"),
        kind="point",
    )


def mar(place, draws):
    latents = draws.normal(0, 3, (COUNT, 2, 32, 4, 4)).astype("f4")
    synsets = ["n01440764", "n01443537", "n01484850"]
    named = sorted((LABELS[index], f"{synsets[LABELS[index]]}_{index}.JPEG.npz", index) for index in range(COUNT))
    for label, name, index in named:
        (place / "cached" / synsets[label]).mkdir(parents=True, exist_ok=True)
        np.savez(place / "cached" / synsets[label] / name, moments=latents[index, 0], moments_flip=latents[index, 1])
    vae = {"name": "kl16", "class": "AutoencoderKL", "sha256": None, "scaling_factor": 0.2325, "shift_factor": None}
    return Made(
        path=place / "cached",
        latents=latents[[index for *_, index in named]],
        labels=[label for label, *_ in named],
        keys=[f"{synsets[label]}/{name}" for label, name, _ in named],
        layout="mar",
        vae={**vae, "pixels": [-1, 1]},
        views=("center", "center-hflip"),
        kind="moments",
    )


MAKERS = {maker.__name__: maker for maker in (edm2_folder, edm2_zip, repa, lightningdit, mar)}


def make(name, place):
    """The layout's files in a folder, the same at every call."""
    return MAKERS[name](place, np.random.default_rng(7))
