"""Pictures for people: labelled grids like a figure in a paper, and pairs of originals and reconstructions.

Drawn with Pillow and its own font; saved as PNG under a temporary name and renamed, with the facts about them inside
as text chunks (`Image.open(path).text` gives them back).
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from pipeline.classes import brief
from pipeline.runtime.files import make_folder, replacing

PAPER = (255, 255, 255)
INK = (34, 34, 34)
PLAIN = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-", "×": "x", "·": "-", "ß": "ss"}
)
SMALLEST_TILE_PX = 64
Images = NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def grid(
    images: Images,
    columns: int,
    *,
    row_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """Images [N, H, W, 3] side by side, row after row, on white.

    Small images are enlarged by a whole factor without smoothing, to at least 64 pixels, so that a label has room.

    Args:
        images: in reading order; the last row may be short.
        columns: images in a full row.
        row_labels: one per row, drawn to its left; long ones are wrapped, then cut.
        captions: one per image, drawn below it.
        title: one line above all.
    """
    enlarged = _enlarge(images)
    count, height, width, _ = enlarged.shape
    if columns < 1 or count < 1:
        raise ValueError(f"a grid needs images and columns, not {count} and {columns}")
    rows = math.ceil(count / columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels for {rows} rows")
    if captions is not None and len(captions) != count:
        raise ValueError(f"{len(captions)} captions for {count} images")
    size = _text_px(height)
    font, gap = _font(size), max(2, height // 32)
    margin = 3 * gap
    label_width = _label_width(row_labels or (), font, most=max(2 * width, 8 * size))
    caption_height = round(size * 1.5) if captions else 0
    head = round(size * 1.4 * 1.6) if title else 0
    left, top = margin + label_width, margin + head
    row_height = height + caption_height + gap
    sheet_width = max(
        left + columns * (width + gap) - gap + margin,
        _width(title, _font(round(size * 1.4))) + 2 * margin if title else 0,
    )
    sheet = Image.new("RGB", (sheet_width, top + rows * row_height - gap + margin), PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((margin, margin), _drawable(title), fill=INK, font=_font(round(size * 1.4)))
    for number, image in enumerate(enlarged):
        row, column = divmod(number, columns)
        x, y = left + column * (width + gap), top + row * row_height
        sheet.paste(Image.fromarray(image), (x, y))
        if captions:
            text = _cut(_drawable(captions[number]), font, width)
            pen.text((x + width / 2, y + height + size * 0.2), text, fill=INK, font=font, anchor="ma")
    for row, label in enumerate(row_labels or ()):
        middle = top + row * row_height + height / 2
        _draw_label(pen, label, font, right=left - 2 * gap, middle=middle, width=label_width, lines=height // size)
    return sheet


def pairs(
    originals: Images, reconstructions: Images, captions: Sequence[str], *, columns: int = 4, title: str | None = None
) -> Image.Image:
    """A contact sheet of originals, each with its reconstruction to its right and one caption below both.

    Args:
        originals: [N, H, W, 3].
        reconstructions: the same shape, in the same order.
        captions: one per pair.
        columns: pairs in a row.
        title: one line above all.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(f"originals {originals.shape} and reconstructions {reconstructions.shape} differ in shape")
    left, right = _enlarge(originals), _enlarge(reconstructions)
    seam = np.full((*left.shape[:2], 2, 3), PAPER, dtype=np.uint8)
    return grid(np.concatenate([left, seam, right], axis=2), columns, captions=captions, title=title)


def save_png(path: Path, image: Image.Image | Images, text: Mapping[str, str] | None = None) -> None:
    """Write the image as a PNG that appears whole or not at all; `text` goes into text chunks.

    Raises:
        UserError: the disk is full or read-only, or there is no permission.
    """
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    notes = PngInfo()
    for key, value in (text or {}).items():
        notes.add_itxt(key, value)
    make_folder(path.absolute().parent)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=notes)


def _enlarge(images: Images) -> Images:
    factor = math.ceil(SMALLEST_TILE_PX / max(1, min(images.shape[1:3])))
    return images.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else images


def _text_px(tile_px: int) -> int:
    """A size of type that is read easily beside tiles of this height."""
    return min(32, max(12, round(tile_px / 8)))


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _drawable(text: str) -> str:
    """The text on one line, in letters that Pillow's own font has: accents dropped, other scripts as `?`."""
    plain = unicodedata.normalize("NFKD", " ".join(brief(text).split()).translate(PLAIN))
    return "".join(letter for letter in plain if not unicodedata.combining(letter)).encode("ascii", "replace").decode()


def can_be_drawn(text: str) -> bool:
    """Whether Pillow's own font has the letters of a text, or plain ones in their place."""
    return "?" not in _drawable(text.replace("?", "."))


def _width(text: str, font: Font) -> int:
    return math.ceil(font.getlength(_drawable(text)))


def _cut(text: str, font: Font, width: float) -> str:
    """The text, or as much of its beginning as fits, with dots after it."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip(" ,;-") + "..."


def _label_width(labels: Sequence[str], font: Font, *, most: int) -> int:
    """Room for the widest label, its distance to the images included; 0 without labels."""
    if not labels:
        return 0
    return min(max(_width(label, font) for label in labels), most) + round(font.getlength("  "))


def _draw_label(
    pen: ImageDraw.ImageDraw, label: str, font: Font, *, right: float, middle: float, width: float, lines: int
) -> None:
    """The label flush right, in as many lines as it needs and its row has room for."""
    words, written = _drawable(label).split(), [""]
    for word in words:
        longer = f"{written[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            written[-1] = longer
        else:
            written.append(word)
    written = [line for line in written if line] or [""]
    lines = max(1, lines - 1)
    if len(written) > lines:
        written = [*written[: lines - 1], " ".join(written[lines - 1 :])]
    text = "\n".join(_cut(line, font, width) for line in written)
    pen.multiline_text((right, middle), text, fill=INK, font=font, anchor="rm", align="right", spacing=2)
