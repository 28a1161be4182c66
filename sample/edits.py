"""Images that begin as others: variations of latents, a part made anew, the way between two seeds or two classes.

All go through the samplers as they are: an edit decides where a sampler starts, and what it is told that x_0 is.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint.tensor_files import read_safetensors
from pipeline.classes import find_class
from pipeline.diffusion import GaussianDiffusion, NetworkFn
from pipeline.diffusion.denoiser import at_least_float32
from pipeline.diffusion.process import Process, noise_share
from pipeline.dit import DiTConfig
from pipeline.dit.embeddings import state_noise
from pipeline.images import ImageError, decode_image
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import MOST_IMAGE_BYTES, read_regular
from pipeline.vae import normalize
from sample.options import EditOptions

Numbers = NDArray[np.int64]
Guided = Callable[[Numbers], NetworkFn]
"""The network, guided as it is asked for, for images of these classes."""
NOISE = "sample-noise"
"""The purpose that the noise of images is keyed by."""


class Edit:
    """What is done to images, by their numbers; this one does nothing to them."""

    def takes_noise_of(self, image: int) -> int:
        """The image whose noise an image takes."""
        return image

    def start(self, process: Process, noise: Tensor, images: Numbers) -> Tensor:  # noqa: ARG002 - for those who ask
        """Where the sampler starts, given the starting noise [N, C, h, w]."""
        return noise

    def of_classes(self, guided: Guided, labels: Numbers, images: Numbers) -> NetworkFn:  # noqa: ARG002 - the same
        """The network for images of these classes."""
        return guided(labels)

    def within(self, process: Process, denoise: NetworkFn, images: Numbers) -> NetworkFn:  # noqa: ARG002 - the same
        """What the sampler is given for the network."""
        return denoise


@dataclass(frozen=True, kw_only=True, eq=False)
class Variation(Edit):
    """Image k from latent k, noised to the first of the sampler's timesteps (Meng et al. 2022, arXiv 2108.01073)."""

    latents: Tensor
    """[N, C, h, w] as the network is fed them."""
    first: float
    """Where the sampler begins: a time of a flow, or a timestep of a diffusion's training."""

    def start(self, process: Process, noise: Tensor, images: Numbers) -> Tensor:
        """x_t of the images' latents."""
        x_start = self.latents[images % len(self.latents)].to(noise)
        if isinstance(process, GaussianDiffusion):
            process = replace(process, kept=None)
            return process.q_sample(x_start, process.timesteps(int(self.first), x_start), noise)
        return process.q_sample(x_start, process.timesteps(self.first, x_start), noise)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inpainting(Edit):
    """Image k of latent k but for the cells of a mask: elsewhere x_0 is known, and the sampler is told it.

    So the kept part goes through time as a noised version of itself, in view of which the network makes the rest (the
    replacement of Song et al. 2021, arXiv 2011.13456, section 5), and ends as it is.
    """

    latents: Tensor
    """[N, C, h, w] as the network is fed them."""
    anew: Tensor
    """[h, w], true where the image is made anew."""

    def within(self, process: Process, denoise: NetworkFn, images: Numbers) -> NetworkFn:
        """The network, with what it would give where x_0 is known."""
        known, anew = self.latents[images % len(self.latents)], self.anew
        if isinstance(process, GaussianDiffusion):
            process = replace(process, kept=None)

        def told(x_t: Tensor, t: Tensor) -> Tensor:
            nonlocal known, anew
            output = denoise(x_t, t)
            at = t.long() if isinstance(process, GaussianDiffusion) else noise_share(process, t)
            count = known.shape[1]  # channels of a class token may follow, which is made anew
            x = at_least_float32(x_t[:, :count])
            known, anew = known.to(x), anew.to(x.device)  # sent to a GPU by the first step alone
            would = process.output_for(known, x, at)
            mixed = torch.where(anew, output[:, :count].to(x), would)
            return torch.cat([mixed, output[:, count:].to(x)], dim=1)

        return told


@dataclass(frozen=True, kw_only=True, eq=False)
class Interpolation(Edit):
    """In rows, from image 0 of one seed to image 0 of another, from one class to another, or both.

    Noise goes along the great circle between the two (slerp). Between classes the network's two predictions for the
    same x_t are mixed, (1 − s) · first + s · second, which is the score of p_1^(1 − s) p_2^s: of two classes that are
    Gaussians of one covariance the Gaussian on the straight line between their means, at every noise level.
    """

    config: DiTConfig
    """The network's."""
    to_seed: int | None
    to_class: int | None
    in_a_row: int

    def _shares(self, images: Numbers, like: Tensor) -> Tensor:
        """How far along its row each image is, 0 to 1, [N, 1, 1, 1]."""
        return torch.from_numpy(images % self.in_a_row / (self.in_a_row - 1)).to(like)[:, None, None, None]

    def of_classes(self, guided: Guided, labels: Numbers, images: Numbers) -> NetworkFn:
        """The network between the images' classes and the other one."""
        first = guided(labels)
        if self.to_class is None:
            return first
        second = guided(np.full_like(labels, self.to_class))

        def between(x_t: Tensor, t: Tensor) -> Tensor:
            one = first(x_t, t)
            return torch.lerp(one, second(x_t, t), self._shares(images, one))

        return between

    def takes_noise_of(self, image: int) -> int:  # noqa: ARG002 - of any
        """Image 0: what a sampler draws on the way is the same in all."""
        return 0

    def start(self, process: Process, noise: Tensor, images: Numbers) -> Tensor:  # noqa: ARG002 - any process's
        """Noise of unit variance between that of the two seeds."""
        if self.to_seed is None:
            return noise
        other = state_noise(self.config, self.to_seed, NOISE, 0).to(noise)
        return slerp(noise, other.expand_as(noise), self._shares(images, noise))


def slerp(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Points on the great circle from `first` (share 0) to `second` (1), each [N, C, h, w] (Shoemake 1985)."""
    cosine = torch.nn.functional.cosine_similarity(first.flatten(1), second.flatten(1)).clamp(-1, 1)
    angle = cosine.acos()[:, None, None, None]
    straight = angle < 1e-4  # one seed twice
    weights = [((part * angle).sin() / angle.sin()).where(~straight, part) for part in (1 - share, share)]
    return weights[0] * first + weights[1] * second


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The latents that images begin as."""

    latents: Tensor
    """[N, C, h, w], unscaled."""
    labels: Numbers | None
    sha256: str


def read_source(options: EditOptions, checkpoint: Checkpoint) -> Source | None:
    """What --vary or --inpaint names.

    Raises:
        UserError: it holds no latents of this checkpoint's shape.
    """
    given = options.vary or options.inpaint
    if given is None:
        return None
    if options.vary is not None and checkpoint.config.class_token:
        raise UserError(
            f"--vary {given} begins between noise and image, where the class token that this checkpoint's network "
            f"denoises along with the latent is not known; use --inpaint, or another checkpoint"
        )
    flag, path = ("--vary" if options.vary else "--inpaint"), Path(given.rpartition("@")[0])
    if path.suffix != ".safetensors":
        raise UserError(f"{flag} {given}: {path} must be latents, a .safetensors as dit-sample --out writes it")
    tensors, config = read_safetensors(path), checkpoint.config
    latents, labels = tensors.get("latents"), tensors.get("label")
    shape = [config.in_channels, config.height, config.width]
    if latents is None or list(latents.shape[1:]) != shape or not len(latents) or not latents.isfinite().all():
        found = "no latents" if latents is None else f"latents {list(latents.shape)}"
        raise UserError(
            f"{flag} {given}: {path} holds {found}, but finite ones of shape [N, {str(shape)[1:]} are needed"
        )
    latents = latents.float()
    return Source(
        latents=latents,
        labels=None if labels is None or labels.shape != latents.shape[:1] else labels.long().numpy(),
        sha256=hashlib.sha256(latents.numpy().tobytes()).hexdigest(),
    )


def steps_from(share: float, process: Process, steps: int, timesteps: tuple[float, ...] | None) -> tuple[float, ...]:
    """Of a sampler's steps those that begin at a share of time from data (0) to noise (1), or nearer the data.

    Raises:
        UserError: there are none.
    """
    if isinstance(process, GaussianDiffusion):
        own, last = process.respaced(str(steps)).timestep_map.tolist()[::-1], float(process.steps - 1)
    else:
        own, last = process.step_times(steps)[:-1], 1.0
    left = tuple(t for t in timesteps or own if t <= share * last)
    if not left:
        raise UserError(f"--vary …@{share:g} leaves no step to make; give a later time, or more --steps")
    return left


def make_edit(
    options: EditOptions, source: Source | None, checkpoint: Checkpoint, *, first: float, in_a_row: int
) -> Edit | None:
    """The edit that the options ask for.

    Raises:
        UserError: the mask cannot be read, or there is no such class.
    """
    if options.interpolates:
        to_class = _class_of(options.interpolate_class, checkpoint)
        return Interpolation(
            config=checkpoint.config, to_seed=options.interpolate, to_class=to_class, in_a_row=in_a_row
        )
    if source is None:
        return None
    vae = checkpoint.info.vae
    latents = normalize(source.latents, vae.scaling_factor, vae.shift_factor)
    if options.vary is not None:
        return Variation(latents=latents, first=first)
    config = checkpoint.config
    return Inpainting(latents=latents, anew=read_mask(options.mask, (config.height, config.width)))


def _class_of(text: str | None, checkpoint: Checkpoint) -> int | None:
    """The label that --interpolate-class names, if it is given."""
    if text is None:
        return None
    count, info = checkpoint.config.num_classes, checkpoint.info
    if not count:
        raise UserError("--interpolate-class asks for a class, but this checkpoint is unconditional; leave it away")
    try:
        return find_class(text, info.classes, info.class_ids, count=count)
    except UserError as error:
        raise UserError(f"--interpolate-class: {error}") from error


def read_mask(path: Path, size: tuple[int, int]) -> Tensor:
    """[h, w], true where a picture, made smaller by means of areas, is nearer white than black.

    Raises:
        UserError: it cannot be read, or is all black.
    """
    try:
        picture = decode_image(read_regular(path, most=MOST_IMAGE_BYTES), str(path)).convert("L")
    except (ImageError, OSError) as error:
        raise UserError(f"the mask {path} of --inpaint cannot be read: {error}") from error
    grey = torch.from_numpy(np.asarray(picture, dtype=np.float32))[None, None]
    anew: Tensor = torch.nn.functional.adaptive_avg_pool2d(grey, size)[0, 0] > 127
    if not anew.any():
        raise UserError(
            f"the mask {path} of --inpaint is black everywhere, so nothing would be made; paint it white there"
        )
    return anew


def describe_edit(options: EditOptions, source: Source | None, edit: Edit | None) -> dict[str, Any]:
    """What the sidecar says of it; nothing without one."""
    if isinstance(edit, Interpolation):
        ends = {"to_seed": edit.to_seed, "to_class": edit.to_class}
        return {"edit": {"kind": "interpolation", **{name: end for name, end in ends.items() if end is not None}}}
    if edit is None or source is None:
        return {}
    about: dict[str, Any] = {"latents": len(source.latents), "latents_sha256": source.sha256}
    if isinstance(edit, Inpainting):
        mask = hashlib.sha256(edit.anew.numpy().tobytes()).hexdigest()
        return {"edit": {"kind": "inpainting", **about, "mask_sha256": mask}}
    return {"edit": {"kind": "variation", **about, "from_time": options.share}}
