"""What an evaluation costs: images per second through the FID network, and seconds for each metric.

The network's weights are arbitrary; speed does not depend on them. Beside ours, the network in PyTorch's usual layout.
"""

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.machine import Setting
from benchmarks.report import Pieces, Row
from benchmarks.timing import Work, interleaved, rates, ratios, seconds_of, spread
from pipeline.randomness import generator
from sample.evaluate.inception import FIDInception
from sample.evaluate.metrics import fit_gaussian, frechet_distance, inception_score, kernel_distance
from sample.evaluate.neighbours import precision_and_recall


def pieces(setting: Setting) -> Pieces:
    """A row of the network, and one per metric."""
    return {"features": lambda: [_features(setting)], "metrics": lambda: _metrics(setting)}


def _features(setting: Setting) -> Row:
    batch, side = (256, 256) if setting.on_gpu else (2, 64) if setting.quick else (8, 256)
    draws = generator(0, "benchmark-images")
    pixels = torch.randint(0, 256, (batch, side, side, 3), generator=draws, dtype=torch.uint8).permute(0, 3, 1, 2)
    layouts = {"plain": torch.contiguous_format, "ours": torch.channels_last}
    works = {name: _through(pixels, layout, setting) for name, layout in layouts.items()}
    times = interleaved(works, rounds=setting.rounds(3), device=setting.device)
    ours = rates(times["ours"], batch)
    return Row(
        what=f"features of {side}-pixel images, batch {batch}, from bytes to features in memory",
        unit="images/s",
        ours=ours,
        plain=rates(times["plain"], batch),
        ratio=ratios(times),
        note=f"{50_000 / ours.median / 60:.1f} min for 50,000",
    )


def _through(pixels: torch.Tensor, layout: torch.memory_format, setting: Setting) -> Work:
    network = FIDInception().eval().to(setting.device)
    network = network.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs lack it

    def work() -> None:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features = network(pixels.to(setting.device), ("features_2048", "spatial", "logits_unbiased"))
            for rows in features.values():
                rows.cpu()

    return work


def _metrics(setting: Setting) -> list[Row]:
    rows, width = (50, 64) if setting.quick else (5_000, 2048)
    draw = np.random.default_rng(0)
    mixing = draw.standard_normal((width, width), dtype=np.float32) / 45
    ours = draw.standard_normal((rows, width), dtype=np.float32) @ mixing
    theirs = draw.standard_normal((rows, width), dtype=np.float32) @ mixing + 0.01
    fitted = [fit_gaussian([ours]), fit_gaussian([theirs])]
    works: dict[str, Callable[[], object]] = {
        "Gaussian of one side": lambda: fit_gaussian([ours]),
        "FID of two Gaussians": lambda: frechet_distance(*fitted),
        "Inception Score": lambda: inception_score([ours[:, :1008]]),
        "precision and recall": lambda: precision_and_recall(ours, theirs, device=str(setting.device)),
        "KID, 100 subsets": lambda: kernel_distance(ours, theirs, seed=0),
    }
    return [
        Row(what=f"{name}, {rows:,} rows of {width:,}", unit="s", ours=spread([seconds_of(work, setting.device)]))
        for name, work in works.items()
    ]
