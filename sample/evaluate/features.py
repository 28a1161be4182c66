"""Features of a set of images under the FID network, cut into parts that any number of processes share through files.

A part holds a fixed run of images and is cut into batches (on a CPU, into lanes) on its own, so that every image meets
the same batch whatever the number of processes and cores: the features are equal to the bit, and so are the metrics,
which the main process takes from the parts in order. Finished parts survive a kill; the next run makes only the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from pipeline.runtime.console import progress
from pipeline.runtime.devices import float32_products
from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import Launch
from pipeline.runtime.threads import CPU_MICRO_BATCH, one_thread_each
from sample.evaluate.image_set import ImageSet, image_digests, names_of
from sample.evaluate.metrics import FeatureName
from sample.work_folder import WorkFolder

DIGESTS = "pixels_sha256"


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """One array of all parts, part after part, as often as wanted; one part is in memory at a time."""

    work: WorkFolder
    name: str

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for part in range(self.work.chunks):
            with safe_open(self.work.chunk_path(part), framework="numpy") as file:  # looked at by drop_damaged
                yield file.get_tensor(self.name)

    def rows(self) -> NDArray[Any]:
        """All rows as one array."""
        return np.concatenate(list(self))


def make_features(
    images: ImageSet,
    network: torch.nn.Module,
    wanted: Sequence[FeatureName],
    work: WorkFolder,
    *,
    place: Launch,
    wait: bool,
    batch_size: int,
    device: str,
) -> None:
    """Put every part of the features into the work folder.

    Args:
        wait: whether to return when all are there, in place of when all are there or in other processes' hands.

    Raises:
        UserError: an image cannot be read, or its features are not finite; it is named.
    """
    network = network.to(device)
    if device == "cpu":  # half the time there, as benchmarks/evaluate.py shows
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def finished() -> int:
        """The images whose features are there, whoever made them."""
        return min((work.chunks - len(work.missing())) * images.part_size, images.count)

    bar = progress(images.count, unit="images", description=f"features of {images.kind}", initial=finished())

    def show() -> None:
        bar.n = finished()
        bar.refresh()

    for part in work.unclaimed(rank=place.rank, world_size=place.world_size, wait=wait, idle=show):
        start = part * images.part_size
        stop = min(start + images.part_size, images.count)
        work.write(part, _features_of_part(images, start, stop, network, wanted, batch_size, device))
        show()
    show()
    bar.close()


def _features_of_part(
    images: ImageSet,
    start: int,
    stop: int,
    network: torch.nn.Module,
    wanted: Sequence[FeatureName],
    batch_size: int,
    device: str,
) -> dict[str, NDArray[Any]]:
    found: dict[str, list[NDArray[Any]]] = {name: [] for name in (*wanted, DIGESTS)}
    at = start
    for batch in images.batches(start, stop, batch_size):
        found[DIGESTS].append(image_digests(batch))
        for name, rows in _features_of_batch(batch, network, wanted, device).items():
            _check_finite(rows, images, at)
            found[name].append(rows)
        at += len(batch)
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def _features_of_batch(
    batch: NDArray[np.uint8], network: torch.nn.Module, wanted: Sequence[FeatureName], device: str
) -> dict[FeatureName, NDArray[np.float32]]:
    def lane(part: torch.Tensor) -> dict[FeatureName, torch.Tensor]:
        with torch.inference_mode():
            found = network(part.permute(0, 3, 1, 2), wanted)
            together = torch.cat(list(found.values()), dim=1).cpu()  # one copy, as a GPU's host waits for each
            return dict(zip(found, together.split([rows.shape[1] for rows in found.values()], dim=1), strict=True))

    size = CPU_MICRO_BATCH if device == "cpu" else len(batch)
    place = torch.device(device)
    # TF32 would move features by a thousandth; FIDs are compared to the second decimal.
    with float32_products(place, tf32=False), one_thread_each(place) as in_lanes:
        parts = list(in_lanes(lane, torch.from_numpy(batch).split(size)))
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in wanted}


def _check_finite(rows: NDArray[np.float32], images: ImageSet, first: int) -> None:
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist()
    if broken:
        raise UserError(
            f"features are not finite (NaN or infinity) for {names_of(images, first, broken)}; "
            f"check --inception and these images"
        )
