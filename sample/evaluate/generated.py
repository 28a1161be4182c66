"""Images made while they are evaluated: a latent store through its VAE, a checkpoint through the reverse process."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.latents import LatentStore
from pipeline.latents.manifest import latent_json
from pipeline.runtime.devices import choose_device, float32_products
from pipeline.runtime.errors import UserError
from pipeline.runtime.threads import finite_rows, one_thread_each
from pipeline.vae import Vae, check_latents, find_vae
from sample.decode import NotFiniteError, decode_in_lanes, decode_lane
from sample.evaluate.image_set import digest_of, names_of
from sample.evaluate.options import PART_IMAGES, EvaluateOptions
from sample.options import ImageOptions, SampleOptions
from sample.resolve import SamplingJob, resolve, resolve_again


class StoreImages:
    """What the VAE makes of a store's latents: the first view of every sample, the posterior's mean where there is one.

    Compared with the images that the store was extracted from, this is the reconstruction FID of the VAE.
    """

    kind = "latent store, decoded"
    part_size = PART_IMAGES
    sorted_by_name = False

    def __init__(self, path: str, store: LatentStore, vae: Vae, *, tf32: bool = True) -> None:
        self.path = path
        self.store = store
        self.vae = vae
        self._tf32 = tf32
        self.count = len(store)
        latent = store.manifest.latent
        self.size = (latent.width * latent.downsample, latent.height * latent.downsample)

    def name_of(self, index: int) -> str:
        return f"sample {index} of {self.path}"

    def key(self) -> str:
        on_gpu = [] if self.vae.device.type == "cpu" else [self._tf32]
        return digest_of([dict(self.store.manifest), self.vae.sha256, str(self.vae.dtype), *on_gpu])

    def describe(self) -> dict[str, Any]:
        return {
            "view": self.store.manifest.views[0],
            "latent": latent_json(self.store.manifest.latent),
            "decoded": "mean of the posterior" if self._has_moments else "latent",
            "decode_dtype": str(self.vae.dtype).removeprefix("torch."),
            "vae": self.vae.describe(),
        }

    @property
    def _has_moments(self) -> bool:
        return self.store.manifest.latent.kind == "moments"

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        """Give images start … stop − 1.

        Raises:
            UserError: a latent is not finite; its place in the store is named.
        """
        size = decode_lane(self.vae.device, pixels=self.size[0] * self.size[1])
        for at in range(start, stop, batch_size):
            stored, _ = self.store.gather(np.arange(at, min(at + batch_size, stop), dtype=np.int64))
            latents = stored.float().chunk(2, dim=1)[0] if self._has_moments else stored.float()
            self._check_finite(finite_rows(latents), at, "latents")
            with float32_products(self.vae.device, tf32=self._tf32), one_thread_each(self.vae.device) as in_lanes:
                finite, images = decode_in_lanes(self.vae, latents.contiguous(), size=size, in_lanes=in_lanes)
            self._check_finite(finite, at, "decoded pixels")
            yield images.numpy()

    def _check_finite(self, finite: torch.Tensor, first: int, what: str) -> None:
        broken = (~finite).nonzero().flatten().tolist()
        if broken:
            raise UserError(
                f"{what} are not finite (NaN or infinity) for {names_of(self, first, broken)}; "
                f"dit-inspect --verify checks the store; --decode-dtype float32 is the safest"
            )

    def labels(self) -> NDArray[np.int64] | None:
        """Those of the store."""
        return self.store.labels().numpy()

    def close(self) -> None:
        """Close the store's files."""
        self.store.close()


def open_store(path: str, options: EvaluateOptions) -> StoreImages:
    """A store's images.

    Raises:
        UserError: the store is unfinished or damaged, or its VAE is not to be found.
    """
    store = LatentStore(path)
    vae = find_vae(
        store.manifest.vae,
        options.vae,
        device=str(choose_device(options.compute.device)[0]),
        dtype=getattr(torch, options.compute.decode_dtype),
        allow_other=options.allow_other_vae,
    )
    latent = store.manifest.latent
    check_latents(vae, channels=latent.channels, downsample=latent.downsample)
    return StoreImages(path, store, vae, tf32=options.compute.mixed_precision != "no")


class CheckpointImages:
    """What a checkpoint samples: the very images that `dit-sample` makes with the same settings."""

    kind = "checkpoint, sampled"
    sorted_by_name = False

    def __init__(self, path: str, job: SamplingJob) -> None:
        self.path = path
        self.job = job
        self.count = len(job.labels)
        self.part_size = job.batch_size
        latent = job.recipe["latent"]
        self.size = (latent["width"] * latent["downsample"], latent["height"] * latent["downsample"])

    def name_of(self, index: int) -> str:
        label = self.job.labels.values[min(index, self.count - 1)]  # past the end is padding
        return f"image {index} of class {label} of {self.path}"

    def key(self) -> str:
        return digest_of({name: value for name, value in self.job.recipe.items() if name != "versions"})

    def describe(self) -> dict[str, Any]:
        return {
            "recipe": {name: value for name, value in self.job.recipe.items() if name not in {"output", "versions"}}
        }

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        """Give images start … stop − 1; the reverse process always runs on its own batch size, padded at the end."""
        step = self.job.batch_size
        for at in range(start, stop, step):
            labels = self.job.labels.of_batch(at, step)
            images = self._sample(at, labels)[: min(step, stop - at)]
            for first in range(0, len(images), batch_size):
                yield images[first : first + batch_size]

    def _sample(self, first: int, labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        generator = self.job.generator
        try:
            with generator.arithmetic():
                return generator.pixels(generator.latents(first, labels))
        except NotFiniteError as error:
            raise UserError(
                f"{error.what} are not finite with --seed {generator.plan.seed}: {names_of(self, first, error.rows)}; "
                f"try --mixed-precision no, --decode-dtype float32, a lower --guidance or other --weights"
            ) from error

    def labels(self) -> NDArray[np.int64] | None:
        """Those that are asked for."""
        return self.job.labels.values

    def close(self) -> None:
        """No file is open."""


def open_checkpoint(path: str, options: EvaluateOptions) -> CheckpointImages:
    """The images that a checkpoint will be asked for.

    Raises:
        UserError: the checkpoint, its VAE or the settings are not as they must be.
    """
    return CheckpointImages(path, resolve(_asked(path, options)))


def with_settings(images: CheckpointImages, options: EvaluateOptions) -> CheckpointImages:
    """What the same networks make with another seed or another reverse process.

    Raises:
        UserError: the settings do not fit the checkpoint.
    """
    return CheckpointImages(images.path, resolve_again(_asked(images.path, options), images.job))


def _asked(path: str, options: EvaluateOptions) -> SampleOptions:
    return SampleOptions(
        checkpoint=path,
        out="evaluated.npz",
        weights=options.weights,
        vae=options.vae,
        allow_other_vae=options.allow_other_vae,
        images=ImageOptions(num_samples=options.num_samples, labels=options.labels),
        reverse=options.reverse,
        compute=options.compute,
    )
