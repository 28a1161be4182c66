"""Batches of crops through a frozen network, in a way that gives equal bytes whatever else is in the batch.

Every pass has the same number of images (the last one of a shard is padded), because kernels choose their order of
summation by the batch size; padded so, what a sample becomes does not depend on its neighbours. Another batch size,
another device or another version of PyTorch may change the last bits.
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.images import to_pixels
from pipeline.runtime.console import say
from pipeline.runtime.devices import float32_products, memory_explained
from pipeline.runtime.threads import single_threaded
from pipeline.vae_lanes import ENCODED_PX, at_once

CPU_LANE = 4  # one thread computes a whole batch, so larger ones only take memory
GPU_LANE = 32  # of smaller images a GPU takes no more at a time


def lane_of(device: torch.device, image_px: int) -> int:
    """Images in one pass through the network, if the user does not say: on a GPU, no more memory for larger images."""
    if device.type == "cpu":
        return CPU_LANE
    return min(GPU_LANE, at_once(ENCODED_PX, image_px**2))


def cores_of_this_process() -> int:
    """The processor cores that this process may use, those started beside it considered."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local_processes)


@contextmanager
def arithmetic(device: torch.device) -> Iterator[None]:
    """Settings of PyTorch under which equal input gives equal bytes, put back when the block ends.

    On a CPU every batch is computed by one thread, and several batches at a time: which kernels are taken and how sums
    are cut depends on the number of threads (measured: up to 1.4e-6 between 1, 2 and 3 of them on a VAE of Stable
    Diffusion's size), and the bytes must not depend on the machine's cores or on how many processes share them.
    On a GPU: TF32 for float32, and no trial runs to choose kernels.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with single_threaded(), float32_products(device, tf32=True):
        yield


class Network(Protocol):
    """What makes of pixels what is stored: a VAE's encoder, or one whose features are kept."""

    @property
    def device(self) -> torch.device: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """[n, …], float32, of RGB in [−1, 1]."""

    def view_shape(self, image_px: int) -> tuple[int, ...]:
        """The shape of what becomes of one view."""

    def compile_encoder(self) -> None:
        """Compile what `encode` runs."""


class Encoder:
    """Makes what is stored of all views of a batch of images; use it in a `with` block."""

    def __init__(
        self,
        network: Network,
        *,
        batch_size: int | None,
        flip: bool,
        store_dtype: torch.dtype,
        views: int,
        image_px: int,
        compiled: bool = False,
    ) -> None:
        """Ready to encode; with `compiled` the first batch, which runs alone, compiles the network's encoder."""
        on_gpu = network.device.type == "cuda"
        self.network = network
        self.batch_size = batch_size or lane_of(network.device, image_px)
        at_once = 2 if on_gpu else cores_of_this_process()  # on a GPU, one prepares a batch while the other's runs
        self.batches_ahead = at_once
        """Batches that may be under way while the next one is prepared."""
        self._flip, self._store_dtype, self._views, self._image_px = flip, store_dtype, views, image_px
        self._pool = ThreadPoolExecutor(at_once, "encode", initializer=partial(torch.set_num_threads, 1))
        self._to_compile = compiled
        if compiled:
            say("compiling the encoder; the first batch takes a minute or so")
            network.compile_encoder()

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """[views, …] of a stored sample."""
        return self._views, *self.network.view_shape(self._image_px)

    @property
    def sample_bytes(self) -> int:
        return math.prod(self.sample_shape) * self._store_dtype.itemsize

    def room_for(self, samples: int) -> Tensor:
        """Uninitialised memory for a shard."""
        return torch.empty(samples, *self.sample_shape, dtype=self._store_dtype)

    def start(self, crops: Sequence[NDArray[np.uint8]]) -> Future[Tensor]:
        """Begin to encode up to a batch of [crops, size, size, 3] bytes; gives [n, views, …] later."""
        running = self._pool.submit(self._encode, crops)
        if self._to_compile:  # PyTorch 2.11 raises where one thread calls what another is compiling
            wait([running])
            self._to_compile = False
        return running

    def _encode(self, crops: Sequence[NDArray[np.uint8]]) -> Tensor:
        padded = np.zeros((self.batch_size, *crops[0].shape), np.uint8)
        padded[: len(crops)] = crops
        views = []
        with memory_explained(self._too_large):
            for number in range(padded.shape[1]):
                pixels = self._pixels(np.ascontiguousarray(padded[:, number]))
                views.append(self.network.encode(pixels))
                if self._flip:
                    views.append(self.network.encode(pixels.flip(-1)))
            return torch.stack(views, dim=1)[: len(crops)].to(self._store_dtype).cpu()

    def _too_large(self) -> str:
        return (
            f"the GPU has too little memory for batches of {self.batch_size} images of {self._image_px} pixels; "
            f"use --batch-size {max(1, self.batch_size // 2)}"
        )

    def _pixels(self, images: NDArray[np.uint8]) -> Tensor:
        """[n, 3, size, size] in [−1, 1] on the network's device, the same values on every device."""
        if self.network.device.type == "cpu":
            return torch.from_numpy(to_pixels(images))
        sent = torch.from_numpy(images).to(self.network.device)
        return self._values[sent.permute(0, 3, 1, 2).int()]

    @cached_property
    def _values(self) -> Tensor:
        """The value of each of the 256 bytes: a quarter of the transfer, and no division on the device."""
        every_byte = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1).repeat(3, axis=3)
        return torch.from_numpy(to_pixels(every_byte)[0, 0, 0]).to(self.network.device)
