"""Which samples make which batch: a pure function of (seed, position), so that resuming costs nothing.

The stream of positions is endless: epoch e covers positions [e·N, (e+1)·N) and is its own permutation of all N
samples. Batch b covers positions [b·G, (b+1)·G), across an epoch's edge if it falls there, so every batch is full
and every sample comes exactly once per epoch, whatever the processes, the accumulation, or the point of resuming.
A thread reads the batches ahead of the loop.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float16, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from pipeline.randomness import Permutation, generator
from pipeline.runtime.errors import UserError
from pipeline.runtime.threads import read_ahead
from train.options import Order

if TYPE_CHECKING:  # the reader is handed an open store
    from pipeline.features import FeatureStore
    from pipeline.latents import LatentStore

Indices = NDArray[np.int64]
RUN_ROWS, WINDOW_RUNS = 16, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShard:
    """Which part of every global batch this process computes, in how many micro-batches."""

    batch_size: int
    """Samples of the global batch."""
    rank: int = 0
    processes: int = 1
    accumulation: int = 1
    """Micro-batches per process."""

    def __post_init__(self) -> None:
        parts = self.processes * self.accumulation
        if self.batch_size % parts:
            lower = self.batch_size // parts * parts
            raise UserError(
                f"--batch-size {self.batch_size} does not divide among {self.processes} processes × "
                f"--grad-accumulation {self.accumulation}; use {f'{lower} or ' if lower else ''}{lower + parts}"
            )

    @property
    def local_size(self) -> int:
        """Samples per process and step."""
        return self.batch_size // self.processes

    @property
    def micro_size(self) -> int:
        """Samples per process and micro-batch."""
        return self.local_size // self.accumulation

    @property
    def rows(self) -> slice:
        """This process's rows of the global batch."""
        return slice(self.rank * self.local_size, (self.rank + 1) * self.local_size)

    def micro_rows(self, part: int) -> slice:
        """The rows of one micro-batch within this process's rows."""
        return slice(part * self.micro_size, (part + 1) * self.micro_size)


class DataOrder:
    """The endless stream of sample indices: a fresh keyed permutation of the training samples per epoch.

    "scattered" permutes all of them. "runs" cuts the store into runs of 16 neighbours, permutes the runs, and then the
    samples within each window of 64 runs (1,024 samples): a disk reads 16 samples in one place within a few batches.
    The store's own order is random, so its batches are nearly as mixed.
    """

    def __init__(self, samples: int, seed: int, *, held_out: int = 0, order: Order = "scattered") -> None:
        """Order `samples` of a store, without the `held_out` that the same seed always sets aside."""
        self.samples = samples - held_out
        self._in_runs = order == "runs"
        self._seed = seed
        self._held_out = held_out
        self._split = Permutation(samples, seed, "held-out split") if held_out else None
        self._kept: dict[tuple[str | int, ...], Permutation] = {}
        if self.samples < 1:
            raise UserError(
                f"of {samples} samples {held_out} are held out and none is left to train on; lower --validation-share"
            )

    def indices(self, positions: Indices) -> Indices:
        """The store's indices at the given positions of the endless stream."""
        epochs, within = np.divmod(positions, self.samples)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            arranged = self._arranged_in_runs if self._in_runs else self._scattered
            result[chosen] = arranged(int(epoch), within[chosen])
        return result if self._split is None else self._split[result + self._held_out]

    def batch(self, number: int, shard: BatchShard) -> Indices:
        """The indices of one process's rows of global batch `number`."""
        first = number * shard.batch_size
        return self.indices(np.arange(first + shard.rows.start, first + shard.rows.stop, dtype=np.int64))

    def held_out(self, count: int) -> Indices:
        """The first `count` of the samples that training never sees."""
        if self._split is None:
            return np.empty(0, dtype=np.int64)
        return self._split[np.arange(min(count, self._held_out), dtype=np.int64)]

    def _scattered(self, epoch: int, within: Indices) -> Indices:
        return self._permutation("data order", self.samples, epoch)[within]

    def _arranged_in_runs(self, epoch: int, within: Indices) -> Indices:
        """Position → its window → a place in the window → a run and a row of it; what fills no run comes last."""
        whole, window = self.samples // RUN_ROWS * RUN_ROWS, RUN_ROWS * WINDOW_RUNS
        result = np.empty_like(within)
        for first in np.unique(np.where(within < whole, within // window * window, whole)).tolist():
            last = min(first + window, whole) if first < whole else self.samples
            chosen = (within >= first) & (within < last)
            place = self._permutation("window", last - first, epoch, first)[within[chosen] - first]
            if first < whole:
                runs = self._permutation("runs", whole // RUN_ROWS, epoch)[(first + place) // RUN_ROWS]
                result[chosen] = runs * RUN_ROWS + place % RUN_ROWS
            else:
                result[chosen] = whole + place
        return result

    def _permutation(self, purpose: str, length: int, *numbers: int) -> Permutation:
        key: tuple[str | int, ...] = (purpose, *numbers)
        if key not in self._kept:
            if len(self._kept) > 8:
                self._kept.clear()
            self._kept[key] = Permutation(length, self._seed, purpose, *numbers)
        return self._kept[key]


def draw_views(candidates: Indices, number: int, shard: BatchShard, seed: int) -> Indices:
    """Which of the store's views each of this process's samples is seen in, uniform over the candidates."""
    drawn = torch.randint(len(candidates), (shard.batch_size,), generator=generator(seed, "view", number))
    return candidates[drawn.numpy()[shard.rows]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """This process's rows of one global batch."""

    number: int
    latents: Shaped[Tensor, "batch values height width"]
    """As stored, of the view that was drawn: moments [N, 2C, H, W] or points [N, C, H, W], in the store's dtype."""
    labels: Int64[Tensor, " batch"]
    features: Float16[Tensor, "batch patch stored"] | None = None
    """An encoder's, of the same views, as stored; where they are asked for."""
    cls: Float16[Tensor, "batch dim"] | None = None
    """Its class tokens, likewise."""


@dataclass(slots=True)
class _Slot:
    """A buffer that is filled, used and filled again; `copied` tells when the device has read it."""

    latents: Tensor
    labels: Tensor
    columns: dict[str, Tensor]
    """Of an encoder's features."""
    filled: dict[str, Tensor] = field(default_factory=dict)
    """Those of them that the batch has."""
    copied: torch.cuda.Event | None = None


class BatchReader:
    """Iterates over this process's rows of global batches `first`, `first` + 1, …, without end.

    A batch's tensors are valid until the next one is asked for. Use it in a `with` block, which ends its thread.
    """

    def __init__(
        self,
        store: "LatentStore",
        order: DataOrder,
        shard: BatchShard,
        *,
        views: Indices,
        seed: int,
        first: int,
        prefetch: int,
        device: torch.device,
        features: "FeatureStore | None" = None,
        features_until: int | None = None,
        columns: Sequence[str] = ("features",),
    ) -> None:
        """Begin to read.

        Args:
            features: what stands beside the store, to be read of the same samples and views.
            features_until: the first batch without the column of that name.
            columns: what is read of it.
        """
        self.waited_seconds = 0.0
        self._store, self._order, self._shard = store, order, shard
        self._views, self._seed, self._device = views, seed, device
        self._features, self._features_until = features, features_until
        self._pinned = device.type == "cuda"  # from other memory a copy that is not waited for may read too late

        # Buffers that are filled in turn: one more than are read ahead, for the batch in use.
        latent = store.manifest.latent
        channels = latent.channels * (2 if latent.kind == "moments" else 1)
        shape = (shard.local_size, channels, latent.height, latent.width)
        self._slots = [
            _Slot(
                torch.empty(shape, dtype=getattr(torch, latent.dtype), pin_memory=self._pinned),
                torch.empty(shard.local_size, dtype=torch.int64, pin_memory=self._pinned),
                {}
                if features is None
                else features.room_for(shard.local_size, columns=columns, pin_memory=self._pinned),
            )
            for _ in range(prefetch + 1)
        ]
        self._reading = read_ahead(itertools.count(first), self._read, workers=1, window=len(self._slots))

    def __enter__(self) -> "BatchReader":
        self._loaded = self._reading.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reading.__exit__(*error)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            number, slot = next(self._loaded)
            self.waited_seconds += time.perf_counter() - started
            yield self._on_device(number, slot)

    def _on_device(self, number: int, slot: _Slot) -> Batch:
        if self._device.type == "cpu":
            return Batch(number=number, latents=slot.latents, labels=slot.labels, **slot.filled)
        beside = {name: column.to(self._device, non_blocking=self._pinned) for name, column in slot.filled.items()}
        latents = slot.latents.to(self._device, non_blocking=self._pinned)
        labels = slot.labels.to(self._device, non_blocking=self._pinned)
        if self._pinned:
            slot.copied = torch.cuda.Event(blocking=True)
            slot.copied.record()
        return Batch(number=number, latents=latents, labels=labels, **beside)

    def _read(self, number: int) -> _Slot:
        """A batch in its buffer, whose last contents the device has read."""
        slot = self._slots[number % len(self._slots)]
        if slot.copied is not None:
            torch.cuda.set_device(self._device)  # else this thread would open a context on the first GPU
            slot.copied.synchronize()
        indices = self._order.batch(number, self._shard)
        views = draw_views(self._views, number, self._shard, self._seed)
        _, labels = self._store.gather(indices, views, out=slot.latents)
        check_labels(labels.numpy(), len(self._store.manifest.classes), self._store.path)
        slot.labels.copy_(labels)
        is_over = self._features_until is not None and number >= self._features_until
        slot.filled = {name: column for name, column in slot.columns.items() if not (is_over and name == "features")}
        if self._features is not None and slot.filled:
            self._features.gather(indices, views, out=slot.filled)
        return slot


def check_labels(labels: Indices, classes: int, path: str) -> None:
    """Raise UserError unless every label is a class; a store without classes may hold any."""
    low, high = int(labels.min(initial=0)), int(labels.max(initial=-1))
    if classes and (low < 0 or high >= classes):
        raise UserError(
            f"{path} holds a sample with label {low if low < 0 else high}, but its manifest lists {classes} classes, "
            f"0 … {classes - 1}; extract the store again"
        )


def view_candidates(views: list[str], *, flip: bool) -> Indices:
    """The views that training draws from: all of the store's, or those that are not mirrored."""
    chosen = [number for number, view in enumerate(views) if flip or not view.endswith("-hflip")]
    return np.array(chosen, dtype=np.int64)
