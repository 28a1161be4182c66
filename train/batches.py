"""The batches of a run, read ahead by one background thread: one sorted read per batch into a reused buffer.

Worker processes are not used: gathering by batch is faster than copying between processes.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from pipeline.errors import UserError
from train.order import DataOrder, Indices, Share, draw_views


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """This process's rows of one global batch."""

    number: int
    moments: Shaped[Tensor, "batch values height width"]
    """Of the view that was drawn, in the store's dtype."""
    labels: Int64[Tensor, " batch"]


@dataclass(slots=True)
class _Slot:
    """A buffer that is filled, used and filled again; `copied` tells when the device has read it."""

    moments: Tensor
    labels: Tensor
    copied: Any = None


class BatchReader:
    """Iterates over this process's rows of global batches `first`, `first` + 1, …, without end.

    A batch's tensors are valid until the next one is asked for. Close it, or use it in a `with` block.
    """

    def __init__(
        self,
        store: Any,
        order: DataOrder,
        share: Share,
        *,
        views: Indices,
        seed: int,
        first: int,
        prefetch: int,
        device: torch.device,
    ) -> None:
        self.waited_seconds = 0.0
        self._store, self._order, self._share = store, order, share
        self._views, self._seed, self._first, self._device = views, seed, first, device
        self._filled: queue.Queue[tuple[int, _Slot] | BaseException] = queue.Queue()
        self._free: queue.Queue[_Slot | None] = queue.Queue()
        latent = store.manifest.latent
        channels = latent.channels * (2 if latent.kind == "moments" else 1)
        shape = (share.local_size, channels, latent.height, latent.width)
        pinned = device.type == "cuda"
        for _ in range(prefetch + 1):  # one more than are read ahead: the batch in use
            moments = torch.empty(shape, dtype=_torch_dtype(latent.dtype), pin_memory=pinned)
            labels = torch.empty(share.local_size, dtype=torch.int64, pin_memory=pinned)
            self._free.put(_Slot(moments, labels))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="batch reader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            item = self._filled.get()
            self.waited_seconds += time.perf_counter() - started
            if isinstance(item, BaseException):
                raise item
            number, slot = item
            yield self._on_device(number, slot)
            self._free.put(slot)

    def __enter__(self) -> "BatchReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; it ends with the read in flight."""
        self._closing.set()
        self._free.put(None)
        self._thread.join()

    def _on_device(self, number: int, slot: _Slot) -> Batch:
        if self._device.type == "cpu":
            return Batch(number=number, moments=slot.moments, labels=slot.labels)
        moments = slot.moments.to(self._device, non_blocking=True)
        labels = slot.labels.to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            slot.copied = torch.cuda.Event()
            slot.copied.record()
        return Batch(number=number, moments=moments, labels=labels)

    def _read_ahead(self) -> None:
        try:
            number = self._first
            while (slot := self._free.get()) is not None and not self._closing.is_set():
                if slot.copied is not None:
                    slot.copied.synchronize()
                indices = self._order.batch(number, self._share)
                views = draw_views(self._views, number, self._share, self._seed)
                _, labels = self._store.gather(indices, views, out=slot.moments)
                check_labels(labels.numpy(), len(self._store.manifest["classes"]), self._store.path)
                slot.labels.copy_(labels)
                self._filled.put((number, slot))
                number += 1
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that trains
            self._filled.put(error)


def _torch_dtype(name: str) -> torch.dtype:
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def check_labels(labels: Indices, classes: int, path: str) -> None:
    """Nothing, if every label is a class (a store without classes may hold any).

    Raises:
        UserError: a label outside the list.
    """
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
