"""What a training step holds, and how that grows with the batch: measured at two batch sizes, against the arithmetic.

Peak memory is fixed + per image · images: weights, gradients, optimizer and average are fixed; activations are per
image. The table's values are of XL/2 in bfloat16 with float32 weights, as traced without a GPU.
"""

from functools import partial
from pathlib import Path

from benchmarks.machine import Setting
from benchmarks.report import Pieces, Row
from benchmarks.timing import peak_bytes, spread
from benchmarks.train import our_step, write_data

EXPECTED_GIB = {
    ("DiT-XL/2", 32, False): (10.06 + 1.26, 0.41),
    ("DiT-XL/2", 32, True): (10.06 + 1.26, 0.047),
    ("DiT-XL/2", 64, False): (10.06 + 1.26, 1.61),
    ("DiT-XL/2", 64, True): (10.06 + 1.26, 0.19),
}
"""(model, cells along a side, activations computed again) → (fixed, per image)."""
NEAR = 0.05


def pieces(setting: Setting) -> Pieces:
    """Per network, size and way of checkpointing two rows: fixed and per image."""
    cases = EXPECTED_GIB if setting.on_gpu and not setting.quick else {("DiT-Ti/2", 8, True): None}
    return {_name(*case): partial(_memory, *case, setting) for case in cases}


def _name(model: str, side: int, again: bool) -> str:
    return f"{model} at {8 * side} px" + (", checkpointing" if again else "")


def _memory(model: str, side: int, again: bool, setting: Setting) -> list[Row]:
    data = setting.folder / f"memory-{side}"
    if not data.exists():
        data.mkdir()
        write_data(data, side)
    small = (8 if side == 32 else 4) if setting.on_gpu else 8
    peaks = [_peak(model, data, images, again, setting) for images in (small, 3 * small)]
    if None in peaks:
        return []  # this system does not let a process reset its peak
    first, second = (peak / 2**30 for peak in peaks if peak is not None)
    per_image = (second - first) / (2 * small)
    expected = EXPECTED_GIB.get((model, side, again), (None, None))
    return [
        Row(
            what=f"{_name(model, side, again)}: {what}, GiB",
            unit="",
            ours=spread([found]),
            plain=None if wanted is None else spread([wanted]),
            wanted_at_most=None if wanted is None else (1 + NEAR) * wanted,
            note=f"from batches of {small} and {3 * small}" + ("" if wanted is None else "; “plain” is the arithmetic"),
        )
        for what, found, wanted in zip(
            ("fixed", "per image"), (first - small * per_image, per_image), expected, strict=True
        )
    ]


def _peak(model: str, data: Path, images: int, again: bool, setting: Setting) -> int | None:
    build = partial(our_step, model, data, images, device=setting.device, checkpointing=again)
    return peak_bytes(build, setting.device)
