"""Originals beside their reconstructions, to see whether a VAE suits the data before anything is extracted."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from extract.inputs import Loader
from extract.plan import Plan
from pipeline.image_grid import pairs, save_png
from pipeline.images import psnr, to_pixels
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes
from pipeline.runtime.publish import making
from pipeline.vae import Vae

_AT_A_TIME = 8
_TRIED = 10  # inputs looked at for each one drawn, before giving up


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """An image, what the VAE makes of it, and how far they are apart."""

    key: str
    original: NDArray[np.uint8]
    """[size, size, 3]"""
    decoded: NDArray[np.uint8]
    """[size, size, 3], decoded from the posterior's mean."""

    @property
    def psnr(self) -> float:
        """How far apart they are, in dB."""
        return psnr(self.original, self.decoded)


def draw_preview(path: Path, loader: Loader, plan: Plan, vae: Vae, *, count: int) -> float:
    """The mean PSNR of the first `count` usable images of the shuffled order, after drawing them to a PNG file.

    Raises:
        UserError: none of the inputs that were tried is an image.
    """
    shown = list(reconstructions(loader, plan, vae, count=count))
    mean = sum(one.psnr for one in shown) / len(shown)
    originals, decoded = (np.stack([getattr(one, name) for one in shown]) for name in ("original", "decoded"))
    captions = [f"{one.psnr:.1f} dB  {one.key.rpartition('/')[2]}" for one in shown]
    title = f"{vae.name}: originals and reconstructions, mean PSNR {mean:.1f} dB"
    sheet = pairs(originals, decoded, captions, columns=min(4, len(shown)), title=title)
    with explained_writes(path), making(path.absolute(), overwrite=True) as stage:
        save_png(stage.place(path.absolute()), sheet, {"mean_psnr_db": f"{mean:.3f}", "vae": vae.name})
    for one in shown:
        say(f"  {one.psnr:6.2f} dB  {one.key}")
    say(f"preview: mean PSNR {mean:.2f} dB over {len(shown)} images, drawn to {path}")
    return mean


def reconstructions(loader: Loader, plan: Plan, vae: Vae, *, count: int) -> Iterator[Reconstruction]:
    """Reconstructions of the first usable images of the shuffled order."""
    found: list[tuple[str, NDArray[np.uint8]]] = []
    reason = ""
    for index in plan.first(min(plan.samples, count * _TRIED)):
        loaded = loader(int(index))
        if loaded.crops is None:
            reason = f"{loader.key(int(index))}: {loaded.reason}"
        else:
            found.append((loader.key(int(index)), loaded.crops[0]))
        if len(found) == count:
            break
    if not found:
        raise UserError(f"none of the inputs tried for --preview is an image ({reason}); check --data")
    for start in range(0, len(found), _AT_A_TIME):
        part = found[start : start + _AT_A_TIME]
        originals = np.stack([pixels for _, pixels in part])
        latents = vae.encode(torch.from_numpy(to_pixels(originals)))
        decoded = vae.decode(latents.chunk(2, dim=1)[0] if vae.kind == "moments" else latents).numpy()
        for (key, original), picture in zip(part, decoded, strict=True):
            yield Reconstruction(key=key, original=original, decoded=picture)
