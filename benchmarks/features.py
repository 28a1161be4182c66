"""How fast an encoder's features are made: all of `dit-extract --features` beside the encoder alone.

Three works take turns: the whole pass (read, decode and crop files, encode both views, reduce each patch to 64 numbers,
write shards with their checksums); its passes through the network on crops that are in memory, which are the limit; and
the plain one, transformers' model on pixels that lie on the device, on a CPU with all threads. The encoders have
DINOv2's sizes and random weights.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.arithmetic import ENCODER_PATCH, ENCODER_PX, ENCODERS
from benchmarks.extract import (
    CPU_BOUND,
    GPU_BOUND,
    IMAGENET,
    alternate,
    bare,
    link_copies,
    loader_of,
    make_images,
    rate_of,
    run_pipeline,
    with_all_threads,
)
from benchmarks.machine import Setting
from benchmarks.report import Pieces, Row
from benchmarks.timing import finish, release, spread
from extract.encoder import Encoder, arithmetic
from extract.feature_network import FeatureNetwork
from extract.fill import Draft
from extract.store_folder import OutputFolder
from pipeline.features.encoder import VisionEncoder, find_encoder, load_encoder
from pipeline.features.manifest import Columns
from pipeline.features.pca import Projection
from pipeline.features.writer import FeatureRows, write_shard
from pipeline.runtime.units import duration

TINY = (32, 2, 2)
DIM, VIEWS = 64, 2


def pieces(setting: Setting) -> Pieces:
    """On a GPU every encoder in float32 (TF32) and bfloat16; on a CPU the smallest in float32."""
    names = list(ENCODERS) if setting.on_gpu else list(ENCODERS)[:1]
    dtypes = (torch.float32, torch.bfloat16) if setting.on_gpu else (torch.float32,)
    return {
        f"{name} in {str(dtype)[6:]}": partial(_measure, name, dtype, setting) for name in names for dtype in dtypes
    }


def _measure(name: str, dtype: torch.dtype, setting: Setting) -> list[Row]:
    sizes, side = (TINY, 2 * ENCODER_PATCH) if setting.quick else (ENCODERS[name], ENCODER_PX)
    images = 16 if setting.quick else 2048 if setting.on_gpu else 8
    data = make_images(setting.folder / "images", min(images, 256), (500, 375))
    link_copies(data, images)
    folder = find_encoder(str(make_encoder(setting.folder / "encoder", sizes, side)))
    with arithmetic(setting.device):
        encoder = load_encoder(folder, device=setting.device, dtype=dtype)
        rates, batch_size = _rates(encoder, data, setting)
    release(setting.device)
    of_limit, of_plain = (
        spread([ours / other for ours, other in zip(rates["pass"], rates[against], strict=True)])
        for against in ("bare", "plain")
    )
    ours = spread(rates["pass"])
    size = f"{name}'s way in small" if setting.quick else name
    return [
        Row(
            what=f"files to features, {size} at {side} px in {str(dtype)[6:]}, both views, batch {batch_size}",
            unit="images/s",
            ours=ours,
            plain=spread(rates["plain"]),
            ratio=of_plain,
            limit=ours.median / of_limit.median,
            limit_name="the bare encoder",
            wanted_share=None if setting.quick else GPU_BOUND if setting.on_gpu else CPU_BOUND,
            note=f"ImageNet with both views at this rate: {duration(IMAGENET / ours.median)}",
            more={"rates": rates},
        )
    ]


def make_encoder(folder: Path, sizes: tuple[int, int, int], side: int) -> Path:
    """A DINOv2 of that (width, depth, heads) and its image processor, as transformers writes them."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    width, depth, heads = sizes
    shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    Dinov2Model(Dinov2Config(**shape, image_size=side, patch_size=ENCODER_PATCH)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def _rates(encoder: VisionEncoder, data: Path, setting: Setting) -> tuple[dict[str, list[float]], int]:
    """({work: images/s in each round}, images in a batch)."""
    about, device = encoder.about, setting.device
    dim = min(DIM, about.width // 2)
    projection = Projection(mean=torch.zeros(about.width), components=torch.eye(about.width)[:dim]).to(device)
    columns = Columns(views=VIEWS, tokens=about.grid[0] * about.grid[1], dim=dim, cls=about.width)
    loader, outs = loader_of(data, about.resolution), iter(range(10**6))
    with Encoder(
        FeatureNetwork(encoder=encoder, projection=projection),
        batch_size=4 if setting.quick else None,
        flip=True,
        store_dtype=torch.float16,
        views=VIEWS,
        image_px=about.resolution,
    ) as passes:
        count = len(loader.listing) // passes.batch_size * passes.batch_size
        batches = count // passes.batch_size
        crops = [loader(index).crops for index in range(passes.batch_size)]
        pixels = torch.zeros(passes.batch_size, 3, about.resolution, about.resolution, device=device)

        def write_to(output: OutputFolder) -> Callable[[Draft], None]:
            def write(draft: Draft) -> None:
                rows = FeatureRows(
                    columns=columns,
                    values=draft.latents[: len(draft.kept)],
                    indices=np.array(draft.kept, dtype=np.int64),
                    keys=[loader.key(index) for index in draft.kept],
                )
                write_shard(output.place, output.split, draft.shard, rows, plan="")

            return write

        def plain() -> None:
            with torch.no_grad():
                for _ in range(VIEWS * batches):
                    encoder.model(pixel_values=pixels.to(encoder.dtype))
            finish(device)

        parts = {
            "pass": lambda: run_pipeline(setting.folder / f"features-{next(outs)}", loader, passes, count, write_to),
            "bare": lambda: rate_of(lambda: bare(passes, crops, batches), count),
            "plain": lambda: with_all_threads(lambda: rate_of(plain, count)),
        }
        return alternate(setting.rounds(3), parts), passes.batch_size
