"""The loss on held-out samples under fixed noise and timesteps: comparable from step to step and run to run."""

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion import Process
from pipeline.dit.embeddings import DRAWN_FOR
from pipeline.features.store import FeatureStore
from pipeline.features.targets import TokenNormalization
from pipeline.latents import LatentStore
from pipeline.randomness import derive_seed, generator
from pipeline.runtime.devices import widest_float
from train.checkpointing import TrainState
from train.data import Indices
from train.distributed import Hardware
from train.losses import Draws, LatentNormalization, Model, sample_losses
from train.metrics import Numbers

CHUNK = 32


class Validation:
    """A fixed set of samples, views, noise and timesteps, dealt out to the processes in chunks of equal size."""

    def __init__(
        self,
        store: LatentStore,
        indices: Indices,
        normalization: LatentNormalization,
        process: Process,
        hardware: Hardware,
        *,
        null_class: int,
        seed: int,
        tokens: tuple[FeatureStore, TokenNormalization] | None = None,
    ) -> None:
        """`tokens`: where the class tokens of a network that has one are, and how it is fed them."""
        self._store, self._indices = store, np.sort(indices)
        self._normalization, self._process, self._hardware = normalization, process, hardware
        self._null_class, self._tokens = null_class, tokens
        self._seed = derive_seed(seed, "validation")

    def losses(self, state: TrainState) -> Numbers:
        """The loss of the raw and of the averaged weights; every process must call it."""
        values: Numbers = {"validation_loss": self.loss(state.placement.evaluate)}
        with state.averages["ema"].exchanged_with(state.placement.weights):
            values["validation_loss_ema"] = self.loss(state.placement.evaluate)
        return values

    @torch.no_grad()
    def loss(self, model: Model) -> float:
        """The mean loss over the whole set; every process must call it, each computes its chunks.

        Every process makes the same number of forward passes (a sharded network needs all of them): a missing chunk
        is computed on another's samples and counts nothing.
        """
        hardware = self._hardware
        chunks = -(-len(self._indices) // CHUNK)
        total = torch.zeros(2, dtype=torch.float64)
        for first in range(0, chunks, hardware.processes):
            mine = first + hardware.rank
            losses = self._chunk_losses(model, min(mine, chunks - 1))
            if mine < chunks:
                total += torch.tensor([losses.sum().item(), len(losses)], dtype=torch.float64)
        summed = hardware.all_reduce_sum(total.to(hardware.device, widest_float(hardware.device))).tolist()
        return summed[0] / summed[1]

    def _chunk_losses(self, model: Model, chunk: int) -> Tensor:
        device = self._hardware.device
        indices = self._indices[chunk * CHUNK : (chunk + 1) * CHUNK]
        stored, labels = self._store.gather(indices, np.zeros(len(indices), dtype=np.int64))
        class_token = None
        if self._tokens is not None:
            features, normalization = self._tokens
            out = features.room_for(len(indices), columns=["cls"])
            class_token = normalization.of(features.gather(indices, out=out)["cls"].to(device))
        return sample_losses(
            model,
            self._process,
            self._normalization,
            stored.to(device),
            labels.to(device),
            self._draws(chunk, len(indices)).to(device),
            null_class=self._null_class,
            class_token=class_token,
        )["loss"].double()

    def _draws(self, chunk: int, count: int) -> Draws:
        """Drawn on the CPU for a whole chunk, so that they are the same on every device and for every number."""
        manifest = self._store.manifest.latent
        shape = (CHUNK, manifest.channels, manifest.height, manifest.width)
        return Draws(
            t=self._process.draw_timesteps(CHUNK, generator(self._seed, "timestep", chunk)),
            noise=torch.randn(shape, generator=generator(self._seed, "diffusion noise", chunk)),
            posterior=torch.randn(shape, generator=generator(self._seed, "posterior noise", chunk)),
            dropped=torch.zeros(CHUNK, dtype=torch.bool),
            token=self._token_noise(chunk),
        ).rows(slice(count))

    def _token_noise(self, chunk: int) -> Tensor | None:
        if self._tokens is None:
            return None
        dim = self._tokens[0].manifest.columns.cls
        return torch.randn((CHUNK, dim), generator=generator(self._seed, DRAWN_FOR, chunk))
