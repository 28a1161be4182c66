"""How fast extraction is: all of it against the bare VAE, loading against plain Pillow, listing a million files.

    python -m benchmarks.extract                      # everything, on the GPU if there is one
    python -m benchmarks.extract --quick              # a small VAE, few and small images: does it run?
    python -m benchmarks.extract --part encode --encode-dtype bfloat16 --compile

Prints one JSON object. Parts that are compared take turns, so that a busy machine slows both; the figures are medians
over the rounds, the ratios medians of each round's ratio. Loading is counted in processor time of one thread.
"""

import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from extract.encoder import Encoder, arithmetic, cores_of_this_process
from extract.fill import ExtractJob, fill
from extract.inputs import Loader
from extract.options import PixelOptions
from extract.plan import Plan
from extract.progress import Amount, ExtractProgress, duration
from extract.sources.folders import FolderSource
from extract.sources.listing import cached_listing
from extract.store_folder import OutputFolder
from pipeline.runtime.console import run_command
from pipeline.runtime.devices import choose_device
from pipeline.runtime.processes import StopRequest, launch
from pipeline.vae import Vae, load_vae

IMAGENET = 1_281_167
VAES: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},  # Stable Diffusion's, 83.7 M parameters
    "small": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkOptions:
    """What to measure, and on what."""

    part: Literal["all", "load", "encode", "list"] = "all"
    """Which part to measure."""
    vae_size: Literal["sd", "small"] = "sd"
    """Size of the VAE, whose weights are random: Stable Diffusion's, or one that only shows that this runs."""
    image_size: int = 256
    """Pixels along one side."""
    images: int = 256
    """JPEG files of 500×375 pixels to encode, as most of ImageNet's are."""
    files: int = 1_000_000
    """Files to list."""
    rounds: int = 3
    """Turns that count, after one that warms up."""
    batch_size: int | None = None
    """As in dit-extract."""
    workers: int | None = None
    """As in dit-extract."""
    device: str = "auto"
    """As in dit-extract."""
    encode_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """As in dit-extract."""
    compile: bool = False
    """As in dit-extract."""
    contiguous: bool = False
    """On a GPU: weights and pixels in PyTorch's usual layout instead of channels_last."""
    quick: bool = False
    """A small VAE, 48 images of 64 pixels, 20,000 files, 2 rounds."""


def run(options: BenchmarkOptions) -> None:
    """Measure, and print the figures as JSON."""
    if options.quick:
        options = replace(options, vae_size="small", image_size=64, images=48, files=20_000, rounds=2)
    results: dict[str, Any] = {"command": " ".join(["python -m benchmarks.extract", *sys.argv[1:]]), **machine()}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = make_images(work / "images", options.images, (500, 375))
        if options.part in {"all", "load"}:
            results["load"] = measure_loading(data, options)
        if options.part in {"all", "encode"}:
            results["encode"] = measure_encoding(data, work, options)
        if options.part in {"all", "list"}:
            results["list"] = measure_listing(work / "many", options.files)
    print(json.dumps(results, indent=1))


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cores": cores_of_this_process(),
        "load_average": os.getloadavg()[0],
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


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


def measure_loading(data: Path, options: BenchmarkOptions) -> dict[str, Any]:
    loader = loader_of(data, options.image_size)
    paths = [data / key for key in loader.listing.keys]
    same = all(
        np.array_equal(plain_pillow(path, options.image_size), loader(index).crops[0])  # type: ignore[index]
        for index, path in enumerate(paths[:8])
    )

    def ours() -> float:
        return rate_of(lambda: [loader(index) for index in range(len(paths))], len(paths), time.process_time)

    def pillow() -> float:
        return rate_of(
            lambda: [plain_pillow(path, options.image_size) for path in paths], len(paths), time.process_time
        )

    result = summary(alternate(options.rounds, {"ours": ours, "pillow": pillow}), "ours", "pillow")
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


def measure_encoding(data: Path, work: Path, options: BenchmarkOptions) -> dict[str, Any]:
    device, _ = choose_device(options.device, launch())
    vae = load_vae(
        str(make_vae(work / "vae", options.vae_size)), device=device, dtype=getattr(torch, options.encode_dtype)
    )
    if options.contiguous:
        vae.model.to(memory_format=torch.contiguous_format)
        vae.model.encode = contiguous(vae.model.encode)
    loader = loader_of(data, options.image_size)
    stores = iter(range(10**6))
    with encoder_of(vae, options) as encoder:
        count = len(loader.listing) // encoder.batch_size * encoder.batch_size
        crops = [loader(index).crops for index in range(encoder.batch_size)]
        batches = count // encoder.batch_size
        parts = {
            "pipeline": lambda: run_pipeline(work / f"store-{next(stores)}", loader, encoder, count, options),
            "bare": lambda: rate_of(lambda: bare(encoder, crops, batches), count),
        }
        if device.type == "cpu":
            parts["bare_all_threads"] = lambda: all_threads(vae, options.image_size, encoder.batch_size, count)
        with arithmetic(device):
            rates = alternate(options.rounds, parts)
    result = summary(rates, "pipeline", "bare")
    seconds = IMAGENET / result["pipeline_per_s"]
    views = {"views_per_image": 2, "encodes_per_s": round(2 * result["pipeline_per_s"], 3)}
    settings = {"vae": options.vae_size, "batch_size": encoder.batch_size, "device": str(device), "images": count}
    return {**settings, **result, **views, "imagenet_both_views_at_this_rate": duration(seconds)}


def contiguous(encode: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    return lambda pixels: encode(pixels.contiguous(memory_format=torch.contiguous_format))


@contextmanager
def encoder_of(vae: Vae, options: BenchmarkOptions) -> Iterator[Encoder]:
    with Encoder(
        vae,
        batch_size=options.batch_size,
        flip=True,
        store_dtype=torch.float16,
        views=2,
        image_px=options.image_size,
        compiled=options.compile,
    ) as encoder:
        yield encoder


def run_pipeline(out: Path, loader: Loader, encoder: Encoder, count: int, options: BenchmarkOptions) -> float:
    """Images per second from files to a store's shards on disk.

    Shards hold whole batches, as those of thousands of images do but for their last one.
    """
    whole = max(1, count // 3 // encoder.batch_size) * encoder.batch_size
    plan = Plan(inputs=len(loader.listing), seed=0, samples_per_shard=whole, limit=count)
    output = OutputFolder(path=out, split="train")
    with output.occupied(), StopRequest() as stop:
        output.begin({}, plan="")
        job = ExtractJob(
            output=output,
            plan=plan,
            plan_hash="",
            span=range(plan.shards),
            loader=loader,
            encoder=encoder,
            shard_format="safetensors",
            store_dtype="float16",
            workers=options.workers or cores_of_this_process(),
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
    threads = torch.get_num_threads()
    torch.set_num_threads(cores_of_this_process())
    pixels = torch.zeros(batch_size, 3, size, size)
    try:
        return rate_of(lambda: [vae.encode(pixels) for _ in range(2 * (count // batch_size))], count)
    finally:
        torch.set_num_threads(threads)


# --- listing ----------------------------------------------------------------------------------------------------


def measure_listing(folder: Path, count: int) -> dict[str, Any]:
    """Seconds to list a folder of that many files, and to load the listing from its cache."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    for number in range(count):
        if number % 1300 == 0:
            (folder / f"n{number // 1300:08d}").mkdir(parents=True)
        path = folder / f"n{number // 1300:08d}" / f"{number:07d}.png"
        path.touch()
    source = FolderSource(root=folder)
    cache = folder.parent / "listing.npz"
    timed: dict[str, Any] = {"files": count}
    for name in ("first_s", "cached_s"):
        began = time.perf_counter()
        listing = cached_listing(source, cache)
        timed[name] = round(time.perf_counter() - began, 2)
    began = time.perf_counter()
    _ = listing.sha256
    Plan(inputs=len(listing), seed=0, samples_per_shard=4096).rows(0)
    return {**timed, "hash_and_plan_s": round(time.perf_counter() - began, 2)}


if __name__ == "__main__":
    description = __doc__.splitlines()[0]
    sys.exit(run_command(BenchmarkOptions, run, prog="benchmarks.extract", description=description))
