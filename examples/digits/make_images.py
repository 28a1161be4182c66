"""Writes scikit-learn's 1,797 handwritten digits as ordinary image files in class folders.

The digits (Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI) come inside scikit-learn,
8 × 8 pixels with 17 grey levels; each is enlarged to 64 × 64 by Pillow's bicubic filter.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.runtime.console import run_command, say
from pipeline.runtime.files import make_folder, publish_folder, remove_folder

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE_PX = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Where the digits go."""

    out: Path
    """Folder to make, with one sub-folder per digit, `zero` to `nine`."""


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(Options, write_digits, prog="make_images.py", description=__doc__ or "", argv=argv)


def write_digits(options: Options) -> None:
    """One PNG per digit under `out/NAME/`; a folder that is already there is left as it is."""
    from sklearn.datasets import load_digits

    if options.out.exists():
        say(f"{options.out} is already there")
        return
    digits = load_digits()
    partial = options.out.with_name(f".{options.out.name}.partial")
    remove_folder(partial)
    for name in NAMES:
        make_folder(partial / name)
    for number, (grey, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        enlarge(grey).save(partial / NAMES[digit] / f"{number:04d}.png")
    publish_folder(partial, options.out)
    say(f"wrote {len(digits.images)} digits to {options.out}")


def enlarge(grey: np.ndarray) -> Image.Image:
    """An 8 × 8 array of 0 … 16 as a 64 × 64 grey picture."""
    small = Image.fromarray((grey * (255 / 16)).round().astype(np.uint8))
    return small.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    sys.exit(main())
