"""Trains a judge: a small convolutional classifier of a store's own pictures, whose features samples are compared by.

    python -m studies.judge --data STORE --out FOLDER/judge
    dit-evaluate --samples RUN --reference STORE --features FOLDER/judge    # FD-judge-2k, precision, recall; recognised

The recipe is fixed, and the folder a function of the store alone (to rounding): a ResNet (He et al. 2015,
arXiv 1512.03385) of transformers with one block for each of three widths, on pictures of 32 pixels, trained with Adam
for about 600 batches, at least one pass. A tenth of the pictures is held out, and tells how well it judges real ones.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pipeline.features.encoder import quiet
from pipeline.images import resize, to_pixels
from pipeline.latents import LatentStore
from pipeline.randomness import Permutation, derive_seed
from pipeline.runtime.console import run_command, say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json
from pipeline.runtime.gate import typed
from pipeline.runtime.publish import making, sweep
from pipeline.runtime.threads import single_threaded
from pipeline.vae import find_vae

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT, VERSION, ABOUT = "dit-judge", 1, "judge.json"
PX, WIDTHS = 32, (16, 32, 64)
BATCH, BATCHES, RATE, HELD_OUT = 64, 600, 1e-3, 10
_DECODED_AT_ONCE = 64
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""Of an encoder that takes RGB in [−1, 1]; its size is added."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeOptions:
    """Of what, and where to."""

    data: str
    """Latent store with classes, written by dit-extract; the judge learns what its VAE makes of it."""
    out: Path
    """Folder to make, as transformers writes one, for dit-evaluate --features; its name is the judge's in metrics."""
    vae: str | None = None
    """The VAE that decodes. Default: the one that the store names."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(JudgeOptions, _run, prog="studies.judge", description=__doc__ or "", argv=argv)


def _run(options: JudgeOptions) -> None:
    with LatentStore(options.data) as store:
        make_judge(store, lambda: decoded(store, options.vae), options.out.absolute())


def identity_of(store: LatentStore) -> str:
    """A digest of what a store holds."""
    return hashlib.sha256(json.dumps(dict(store.manifest), sort_keys=True).encode()).hexdigest()


def decoded(store: LatentStore, vae: str | None) -> NDArray[np.uint8]:
    """The store's pictures, [N, H, W, 3]: its first view, the posterior's mean where there is one."""
    from pipeline.runtime.devices import choose_device

    decoder = find_vae(store.manifest.vae, vae, device=str(choose_device("auto")[0]))
    pictures = []
    for first in range(0, len(store), _DECODED_AT_ONCE):
        stored, _ = store.gather(np.arange(first, min(first + _DECODED_AT_ONCE, len(store)), dtype=np.int64))
        latents = stored.float()
        if store.manifest.latent.kind == "moments":
            latents = latents.chunk(2, dim=1)[0]
        pictures.append(decoder.decode(latents.contiguous()).numpy())
    return np.concatenate(pictures)


def make_once(out: Path, make: Callable[[Path], None]) -> None:
    """Make a file or a folder under a path that is given, unless it is there; of several processes one does it.

    Raises:
        UserError: it cannot be made.
    """
    sweep(out)
    if out.exists():
        return
    try:
        with making(out, overwrite=False, wait=True) as stage:
            make(stage.place(out))
    except UserError:
        if not out.exists():  # made by another process while this one waited
            raise


def make_judge(store: LatentStore, pictures: Callable[[], NDArray[np.uint8]], out: Path) -> None:
    """Train the judge of a store's pictures into a folder, unless it is there.

    Raises:
        UserError: the store has pictures without a class, or the folder is something else.
    """
    about = {"format": FORMAT, "version": VERSION, "data": identity_of(store)}

    def make(folder: Path) -> None:
        classes, labels = store.manifest.classes, store.labels().numpy()
        if not classes or labels.min() < 0:
            raise UserError("a judge learns to tell classes apart, but the store has pictures without one")
        say(f"training a judge of {len(store):,} pictures in {len(classes)} classes")
        recognised = train_judge(pictures(), labels, classes, folder)
        write_json(folder / ABOUT, about | {"recognised": recognised})
        say(f"the judge recognises {recognised:.1%} of real pictures that it has not seen")

    make_once(out, make)
    if not (out / ABOUT).is_file() or not about.items() <= _said(out / ABOUT).items():
        raise UserError(f"{out} is no judge of this store; choose another name, or remove it")
    say(f"{out} is there: the judge of this store")


def _said(path: Path) -> dict[str, Any]:
    return typed(read_json(path), dict[str, Any], f"{path} is damaged", advice="remove its folder")


def train_judge(pictures: NDArray[np.uint8], labels: NDArray[np.int64], classes: Sequence[str], out: Path) -> float:
    """Write the folder of a judge of pictures [N, H, W, 3]; the share of those held out that it recognises."""
    from transformers import ResNetConfig, ResNetForImageClassification

    order = Permutation(len(pictures), 0, "held out from the judge")[np.arange(len(pictures))]
    held, taught = np.split(order, [max(1, len(order) // HELD_OUT)])
    small = np.stack([np.asarray(resize(Image.fromarray(one), (PX, PX), Image.Resampling.BICUBIC)) for one in pictures])
    pixels = torch.from_numpy(to_pixels(small))
    config = ResNetConfig(
        embedding_size=WIDTHS[0],
        hidden_sizes=list(WIDTHS),
        depths=[1] * len(WIDTHS),
        layer_type="basic",
        id2label=dict(enumerate(classes)),
    )
    with single_threaded():  # so that the folder does not depend on the number of cores
        model = begun(lambda: ResNetForImageClassification(config), seed=0)
        epochs = max(1, round(BATCHES * BATCH / max(1, len(taught))))
        for _ in fit(model, pixels[taught], labels[taught], epochs=epochs, seed=0):
            pass
        model.eval()
        with torch.no_grad():
            named = torch.cat([model(pixel_values=part).logits.argmax(1) for part in pixels[held].split(BATCH)])
    write_encoder(model, out, px=PX)
    return float((named.numpy() == labels[held]).mean())


def begun(make: Callable[[], "PreTrainedModel"], *, seed: int) -> "PreTrainedModel":
    """A model of transformers with starting weights that are a function of the seed."""
    with torch.random.fork_rng():
        torch.random.manual_seed(derive_seed(seed, "encoder weights"))
        return make()


def fit(
    model: "PreTrainedModel", pixels: Tensor, labels: NDArray[np.int64], *, epochs: int, seed: int
) -> Iterator[float]:
    """Train a classifier of pixels [N, 3, side, side] in [−1, 1], pass by pass; the mean loss of each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for epoch in range(epochs):
        order, total = Permutation(len(pixels), seed, "encoder order", epoch)[np.arange(len(pixels))], 0.0
        for rows in torch.from_numpy(order).split(BATCH):
            loss = functional.cross_entropy(model(pixel_values=pixels[rows]).logits, torch.from_numpy(labels)[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        yield total / len(pixels)


def write_encoder(model: "PreTrainedModel", folder: Path, *, px: int) -> None:
    """A model and its image processor's settings in a folder, as save_pretrained writes them."""
    with quiet():
        model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PROCESSOR | {"size": {"height": px, "width": px}})


if __name__ == "__main__":
    sys.exit(main())
