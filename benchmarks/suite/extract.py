"""The extraction pipeline against the bare VAE on pixels that are ready, and loading against plain Pillow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.extract import BenchmarkOptions, make_images, measure_encoding, measure_loading
from benchmarks.report import Row
from benchmarks.suite.setting import Setting
from benchmarks.timing import Spread, release, spread

CPU_BOUND, GPU_BOUND = 0.95, 0.90


def measure(setting: Setting) -> list[Row]:
    """Loading on one core; the whole pipeline, both views stored."""
    folder = setting.folder / "extract"
    count, side, rounds = (2048, 256, 3) if setting.on_gpu else (16, 64, 2) if setting.quick else (16, 64, 3)
    data = make_images(folder / "images", min(count, 256), (500, 375))
    link_copies(data, count)
    options = BenchmarkOptions(
        vae_size="small" if setting.quick else "sd",
        image_size=side,
        images=count,
        rounds=rounds,
        device=setting.device.type,
        compile=setting.on_gpu,
    )
    loading = measure_loading(data, replace(options, rounds=3 if setting.quick else 15))
    encoding = measure_encoding(data, folder, options)
    release(setting.device)
    of_bare = encoding["pipeline_over_bare"]
    return [
        Row(
            what=f"read, decode and crop JPEG of 500×375 to {side} px, one core",
            unit="images/s",
            ours=_one(loading["ours_per_s"]),
            plain=_one(loading["pillow_per_s"]),
            ratio=_spread(loading["ratios"]),
            wanted_ratio=None if setting.quick else 1.0,
            note="the same pixels" if loading["same_pixels"] else "other pixels",
        ),
        Row(
            what=f"files to store, {options.vae_size} VAE at {side} px, both views, batch {encoding['batch_size']}",
            unit="images/s",
            ours=_one(encoding["pipeline_per_s"]),
            limit=encoding["pipeline_per_s"] / of_bare,
            limit_name="the bare encode",
            wanted_share=None if setting.quick else GPU_BOUND if setting.on_gpu else CPU_BOUND,
            note=f"ImageNet with both views at this rate: {encoding['imagenet_both_views_at_this_rate']}",
            more={"loading": loading, "encoding": encoding},
        ),
    ]


def link_copies(folder: Path, count: int) -> None:
    """Further names of the same files, until there are `count`: drawing them all would take longer than measuring."""
    originals = sorted(folder.rglob("*.jpg"))
    for number in range(len(originals), count):
        original = originals[number % len(originals)]
        original.with_name(f"{number:06d}-again.jpg").hardlink_to(original)


def _one(value: float) -> Spread:
    return Spread(median=value, least=value, greatest=value, count=1)


def _spread(values: list[Any]) -> Spread:
    return spread([float(value) for value in values])
