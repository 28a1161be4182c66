"""What an evaluation costs: images per second through the FID network, and seconds for each metric on 50,000 images.

    python -m benchmarks.evaluate [--images 64] [--rows 5000] [--batch-size 32]

Run on a machine with a GPU it uses that. The network's weights are arbitrary; speed does not depend on them.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.randomness import generator
from pipeline.runtime.console import run_command
from sample.evaluate.inception import FIDInception
from sample.evaluate.metrics import (
    fit_gaussian,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from sample.evaluate.neighbours import precision_and_recall


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkOptions:
    """How much to measure."""

    images: int = 64
    """Images to send through the network."""
    image_size: int = 256
    """Their pixels along one side."""
    batch_size: int = 32
    """Images in one batch."""
    rows: int = 5_000
    """Feature vectors on each side of a metric."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda."""


def seconds(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall-clock and processor seconds of one call; they tell whether the machine had other things to do."""
    if device != "cpu":
        torch.cuda.synchronize()
    start, busy = time.perf_counter(), time.process_time()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def time_of_features(options: BenchmarkOptions, layout: torch.memory_format) -> tuple[int, float, float]:
    """Images, wall-clock seconds and processor seconds, from bytes in memory to features in memory."""
    network = FIDInception().eval().to(options.device)
    network = network.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs lack it
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    draws = generator(0, "benchmark-images")
    batch = torch.randint(0, 256, shape, generator=draws, dtype=torch.uint8).permute(0, 3, 1, 2)
    batches = max(1, options.images // options.batch_size)

    def through() -> None:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for _ in range(batches):
                features = network(batch.to(options.device), ("features_2048", "spatial", "logits_unbiased"))
                for rows in features.values():
                    rows.cpu()

    network(batch.to(options.device), ("spatial",))
    return (batches * options.batch_size, *seconds(through, options.device))


def run(options: BenchmarkOptions) -> int:
    """Measure and print."""
    print(f"device {options.device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    for name, layout in (("plain", torch.contiguous_format), ("channels last", torch.channels_last)):
        images, wall, busy = time_of_features(options, layout)
        print(
            f"features, {name} layout, batches of {options.batch_size}: {images / wall:.1f} images/s "
            f"({images / busy:.1f} per second of one processor), {50_000 * wall / images / 60:.1f} min for 50,000"
        )
    draw = np.random.default_rng(0)
    mixing = draw.standard_normal((2048, 2048), dtype=np.float32) / 45
    ours = draw.standard_normal((options.rows, 2048), dtype=np.float32) @ mixing
    theirs = draw.standard_normal((options.rows, 2048), dtype=np.float32) @ mixing + 0.01
    fitted = [fit_gaussian([ours]), fit_gaussian([theirs])]
    works: dict[str, Callable[[], object]] = {
        "Gaussian of one side": lambda: fit_gaussian([ours]),
        "FID of two Gaussians": lambda: frechet_distance(*fitted),
        "Inception Score": lambda: inception_score([ours[:, :1008]]),
        "precision and recall": lambda: precision_and_recall(ours, theirs, device=options.device),
        "KID, 100 subsets": lambda: kernel_distance(ours, theirs, seed=0),
    }
    for name, work in works.items():
        wall, busy = seconds(work, options.device)
        print(f"{name}, {options.rows} rows: {wall:.2f} s ({busy:.2f} s of one processor)")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(BenchmarkOptions, run, prog="python -m benchmarks.evaluate", description=__doc__ or ""))
