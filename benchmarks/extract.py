"""How fast extraction is: all of it against the bare VAE, loading against plain Pillow, listing very many files.

Parts that are compared take turns, so that a busy machine slows both; the figures are medians over the rounds, the
ratios medians of each round's ratio. Loading is counted in processor time of one thread.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import Setting
from benchmarks.report import Pieces, Row
from benchmarks.timing import release, seconds_of, spread
from extract.encoder import Encoder, arithmetic, cores_of_this_process
from extract.fill import Draft, ExtractJob, fill, write_latents
from extract.inputs import Loader
from extract.options import PixelOptions
from extract.plan import Plan
from extract.progress import Amount, ExtractProgress
from extract.sources.folders import FolderSource
from extract.sources.listing import cached_listing
from extract.store_folder import OutputFolder
from pipeline.runtime.processes import StopRequest
from pipeline.runtime.units import duration
from pipeline.vae import Vae, load_vae

IMAGENET = 1_281_167
CPU_BOUND, GPU_BOUND = 0.95, 0.90
VAES: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},  # Stable Diffusion's, 83.7 M parameters
    "small": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is measured on a device."""

    vae_size: Literal["sd", "small"]
    """Size of the VAE, whose weights are random: Stable Diffusion's, or one that only shows that this runs."""
    image_size: int
    """Pixels along one side."""
    images: int
    """JPEG files of 500×375 pixels to encode, as most of ImageNet's are."""
    files: int
    """Files to list."""
    rounds: int
    """Turns that count, after one that warms up."""
    load_rounds: int
    """The same for loading."""


def case_of(setting: Setting) -> Case:
    """The sizes for this device."""
    if setting.quick:
        return Case(vae_size="small", image_size=64, images=16, files=2_000, rounds=2, load_rounds=3)
    if setting.on_gpu:
        return Case(vae_size="sd", image_size=256, images=2048, files=1_000_000, rounds=3, load_rounds=15)
    return Case(vae_size="sd", image_size=64, images=16, files=100_000, rounds=3, load_rounds=15)


def pieces(setting: Setting) -> Pieces:
    """Loading on one core; the whole pipeline, both views stored; listing."""
    case, folder = case_of(setting), setting.folder / "extract"
    return {
        "loading": lambda: _loading(images_in(folder, case), case),
        "whole": lambda: _whole(images_in(folder, case), folder, case, setting),
        "listing": lambda: measure_listing(folder / "many", case.files),
    }


def images_in(folder: Path, case: Case) -> Path:
    """The JPEG files, drawn once."""
    data = folder / "images"
    if not data.exists():
        make_images(data, min(case.images, 256), (500, 375))
        link_copies(data, case.images)
    return data


def _loading(data: Path, case: Case) -> list[Row]:
    loading = measure_loading(data, case)
    return [
        Row(
            what=f"read, decode and crop JPEG of 500×375 to {case.image_size} px, one core",
            unit="images/s",
            ours=spread([loading["ours_per_s"]]),
            plain=spread([loading["pillow_per_s"]]),
            ratio=spread(loading["ratios"]),
            wanted_ratio=None if case.vae_size == "small" else 1.0,
            note="the same pixels" if loading["same_pixels"] else "other pixels",
        ),
    ]


def _whole(data: Path, folder: Path, case: Case, setting: Setting) -> list[Row]:
    encoding = measure_encoding(data, folder, case, setting)
    release(setting.device)
    return [
        Row(
            what=f"files to store, {case.vae_size} VAE at {case.image_size} px, both views, "
            f"batch {encoding['batch_size']}",
            unit="images/s",
            ours=spread([encoding["pipeline_per_s"]]),
            limit=encoding["pipeline_per_s"] / encoding["pipeline_over_bare"],
            limit_name="the bare encode",
            wanted_share=None if setting.quick else GPU_BOUND if setting.on_gpu else CPU_BOUND,
            note=f"ImageNet with both views at this rate: {encoding['imagenet_both_views_at_this_rate']}",
            more=encoding,
        ),
    ]


def link_copies(folder: Path, count: int) -> None:
    """Further names of the same files, until there are `count`: drawing them all would take longer than measuring."""
    originals = sorted(folder.rglob("*.jpg"))
    for number in range(len(originals), count):
        original = originals[number % len(originals)]
        original.with_name(f"{number:06d}-again.jpg").hardlink_to(original)


def make_images(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """JPEG files with as much detail as photographs of about 100 kB have, in ten class folders."""
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = draw.integers(-24, 25, (size[1], size[0], 3))
        image = Image.fromarray((np.asarray(coarse, dtype=np.int64) + grain).clip(0, 255).astype(np.uint8))
        path = folder / f"class-{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=85)
    return folder


def alternate(rounds: int, parts: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Rates of each part, taken in turns; the first turn of each warms up and does not count."""
    rates: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, measure in parts.items():
            rate = measure()
            if turn:
                rates[name].append(rate)
    return rates


def summary(rates: dict[str, list[float]], of: str, against: str) -> dict[str, Any]:
    """Medians of rates taken in turns, and the ratio of two of them round by round."""
    ratios = [one / other for one, other in zip(rates[of], rates[against], strict=True)]
    medians = {f"{name}_per_s": round(statistics.median(values), 3) for name, values in rates.items()}
    return {
        **medians,
        f"{of}_over_{against}": round(statistics.median(ratios), 4),
        "ratios": [round(r, 4) for r in ratios],
    }


# --- loading: read, decode and crop on one core ------------------------------------------------------------------


def plain_pillow(path: Path, size: int) -> np.ndarray[Any, Any]:
    """The usual way: a data set that opens a file and converts it, and ADM's crop by its definition."""
    image = Image.open(path).convert("RGB")
    while min(*image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(
        (round(image.size[0] * scale), round(image.size[1] * scale)), resample=Image.Resampling.BICUBIC
    )
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def measure_loading(data: Path, case: Case) -> dict[str, Any]:
    """Rates of reading, decoding and cropping on one core, ours and the usual way, and whether the pixels are equal."""
    loader = loader_of(data, case.image_size)
    paths = [data / key for key in loader.listing.keys]
    same = all(
        np.array_equal(plain_pillow(path, case.image_size), loader(index).crops[0])  # type: ignore[index]
        for index, path in enumerate(paths[:8])
    )

    def ours() -> float:
        return rate_of(lambda: [loader(index) for index in range(len(paths))], len(paths), time.process_time)

    def pillow() -> float:
        return rate_of(lambda: [plain_pillow(path, case.image_size) for path in paths], len(paths), time.process_time)

    result = summary(alternate(case.load_rounds, {"ours": ours, "pillow": pillow}), "ours", "pillow")
    return {**result, "same_pixels": same}


def loader_of(data: Path, size: int) -> Loader:
    source = FolderSource(root=data)
    return Loader(source=source, listing=source.inputs(), options=PixelOptions(image_size=size), seed=0)


def rate_of(do: Callable[[], Any], count: int, clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    do()
    return count / (clock() - began)


# --- encoding: all of it against the VAE on pixels that are ready ------------------------------------------------


def make_vae(folder: Path, size: str) -> Path:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**blocks, **VAES[size], latent_channels=4).save_pretrained(folder)
    return folder


def measure_encoding(data: Path, work: Path, case: Case, setting: Setting) -> dict[str, Any]:
    """Rates of the pipeline and of the bare VAE, compiled on a GPU, and their ratio."""
    device = setting.device
    vae = load_vae(str(make_vae(work / "vae", case.vae_size)), device=device)
    loader = loader_of(data, case.image_size)
    stores = iter(range(10**6))
    with Encoder(
        vae,
        batch_size=4 if setting.quick else None,
        flip=True,
        store_dtype=torch.float16,
        views=2,
        image_px=case.image_size,
        compiled=setting.on_gpu,
    ) as encoder:
        count = len(loader.listing) // encoder.batch_size * encoder.batch_size
        crops = [loader(index).crops for index in range(encoder.batch_size)]
        batches = count // encoder.batch_size
        parts = {
            "pipeline": lambda: run_pipeline(work / f"store-{next(stores)}", loader, encoder, count),
            "bare": lambda: rate_of(lambda: bare(encoder, crops, batches), count),
        }
        if device.type == "cpu":
            parts["bare_all_threads"] = lambda: all_threads(vae, case.image_size, encoder.batch_size, count)
        with arithmetic(device):
            rates = alternate(case.rounds, parts)
    result = summary(rates, "pipeline", "bare")
    seconds = IMAGENET / result["pipeline_per_s"]
    views = {"views_per_image": 2, "encodes_per_s": round(2 * result["pipeline_per_s"], 3)}
    settings = {"vae": case.vae_size, "batch_size": encoder.batch_size, "device": str(device), "images": count}
    return {**settings, **result, **views, "imagenet_both_views_at_this_rate": duration(seconds)}


def run_pipeline(
    out: Path,
    loader: Loader,
    encoder: Encoder,
    count: int,
    write_to: Callable[[OutputFolder], Callable[[Draft], None]] | None = None,
) -> float:
    """Images per second from files to a store's shards on disk, or to those that `write_to` writes.

    Shards hold whole batches, as those of thousands of images do but for their last one.
    """
    whole = max(1, count // 3 // encoder.batch_size) * encoder.batch_size
    plan = Plan(inputs=len(loader.listing), seed=0, samples_per_shard=whole, limit=count)
    output = OutputFolder(path=out, split="train")
    with output.occupied(), StopRequest() as stop:
        output.begin({}, plan="")
        job = ExtractJob(
            output=output,
            span=range(plan.shards),
            rows=plan.rows,
            load=loader,
            key=loader.key,
            encoder=encoder,
            write=partial(write_latents, output, loader, shard_format="safetensors", kind="moments", plan="")
            if write_to is None
            else write_to(output),
            store_dtype="float16",
            workers=cores_of_this_process(),
            fail_on_error=True,
        )
        amount = Amount(plan=plan, span=job.span, sample_bytes=encoder.sample_bytes)
        with ExtractProgress(output, amount, batches_ahead=encoder.batches_ahead) as meter:
            return rate_of(lambda: fill(job, stop, meter), count)


def bare(encoder: Encoder, crops: Sequence[Any], batches: int) -> None:
    """The same passes of the VAE on pixels that are in memory, as many at a time."""
    pending = [encoder.start(crops) for _ in range(batches)]
    for latents in pending:
        latents.result()


def all_threads(vae: Vae, size: int, batch_size: int, count: int) -> float:
    """Images per second (both views) of plain `vae.encode`, one batch at a time on all cores."""
    pixels = torch.zeros(batch_size, 3, size, size)
    return with_all_threads(
        lambda: rate_of(lambda: [vae.encode(pixels) for _ in range(2 * (count // batch_size))], count)
    )


def with_all_threads(measure: Callable[[], float]) -> float:
    """A rate measured with as many threads of PyTorch's as there are cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(cores_of_this_process())
    try:
        return measure()
    finally:
        torch.set_num_threads(threads)


# --- listing ----------------------------------------------------------------------------------------------------


def measure_listing(folder: Path, count: int) -> list[Row]:
    """Seconds to list a folder of that many files, and to load the listing from its cache."""
    for number in range(count):
        if number % 1300 == 0:
            (folder / f"n{number // 1300:08d}").mkdir(parents=True)
        (folder / f"n{number // 1300:08d}" / f"{number:07d}.png").touch()
    source, cache = FolderSource(root=folder), folder.parent / "listing.npz"
    listings = []
    taken = {
        name: seconds_of(lambda: listings.append(cached_listing(source, cache)))
        for name in ("list", "load the listing of")
    }

    def hash_and_plan() -> None:
        _ = listings[-1].sha256
        Plan(inputs=len(listings[-1]), seed=0, samples_per_shard=4096).rows(0)

    taken["hash and plan"] = seconds_of(hash_and_plan)
    return [Row(what=f"{name} {count:,} files", unit="s", ours=spread([one])) for name, one in taken.items()]
