"""The pictures the demo VAE learns from, made by drawing: nobody's photographs, nothing to download.

Dead leaves (Matheron's model: shapes of all sizes that fall on each other, whose edges and contrasts are like those of
natural images; Ruderman 1997, "Origins of scaling in natural images"), smooth gradients, strokes and glyph-like
shapes, in colour and in grey, some of them blurred or covered with grain, as photographs are.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

CANVAS_PX = 128
Painter = Callable[[np.random.Generator], Image.Image]


def draw_canvas(draw: np.random.Generator) -> NDArray[np.uint8]:
    """One picture [128, 128, 3] of a kind chosen by the generator."""
    canvas = PAINTERS[draw.choice(len(PAINTERS), p=SHARES)](draw)
    canvas = canvas.resize((CANVAS_PX, CANVAS_PX), Image.Resampling.BOX)
    if draw.random() < 0.35:
        canvas = canvas.filter(ImageFilter.GaussianBlur(float(draw.uniform(0.3, 2.5))))
    if draw.random() < 0.25:
        canvas = ImageEnhance.Color(canvas).enhance(float(draw.uniform(0.0, 0.6)))
    if draw.random() < 0.15:
        canvas = ImageOps.grayscale(canvas).convert("RGB")
    pixels = np.asarray(canvas)
    if draw.random() < 0.2:
        grain = draw.normal(0, draw.uniform(1, 12), (CANVAS_PX, CANVAS_PX, 1 if draw.random() < 0.5 else 3))
        pixels = np.clip(pixels + grain, 0, 255).round().astype(np.uint8)
    return pixels


def _color(draw: np.random.Generator) -> str:
    """A colour: half the time any, else a muted one, black or white."""
    kind = draw.random()
    if kind < 0.5:
        red, green, blue = draw.integers(0, 256, 3)
    elif kind < 0.85:
        grey = draw.integers(0, 256)
        red, green, blue = np.clip(grey + draw.integers(-40, 41, 3), 0, 255)
    else:
        red = green = blue = 255 * draw.integers(0, 2)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _shape(draw: np.random.Generator, center: NDArray[np.float64], radius: float) -> list[tuple[float, float]]:
    """Corners of a star-shaped polygon: an ellipse, a rectangle or a ragged leaf, turned at random."""
    corners = int(draw.choice([3, 4, 5, 7, 24]))
    angles = np.linspace(0, 2 * math.pi, corners, endpoint=False, dtype=np.float64)
    if draw.random() < 0.5:
        angles = np.sort(draw.uniform(0, 2 * math.pi, corners))
    stretch = draw.uniform(0.3, 1.0)
    ragged = radius * (draw.uniform(0.6, 1.0, corners) if draw.random() < 0.3 else np.ones(corners))
    x, y = ragged * np.cos(angles), ragged * stretch * np.sin(angles)
    turn = draw.uniform(0, 2 * math.pi)
    turned = np.stack([x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)], axis=1)
    return [(float(a), float(b)) for a, b in turned + center]


def _dead_leaves(draw: np.random.Generator) -> Image.Image:
    """Shapes whose radii follow r^-3 between two limits, the oldest lowest."""
    side = 2 * CANVAS_PX
    canvas = Image.new("RGB", (side, side), _color(draw))
    pen = ImageDraw.Draw(canvas)
    smallest, largest = draw.uniform(3, 24), draw.uniform(60, 180)
    count = int(draw.integers(40, 260))
    uniform = draw.random(count)
    radii = (smallest**-2 + uniform * (largest**-2 - smallest**-2)) ** -0.5
    palette = [_color(draw) for _ in range(int(draw.integers(3, 24)))]
    for radius in radii:
        color = palette[draw.integers(len(palette))] if draw.random() < 0.7 else _color(draw)
        pen.polygon(_shape(draw, draw.uniform(0, side, 2), radius), fill=color)
    if draw.random() < 0.5:
        canvas = _shade(draw, canvas)
    return canvas


def _ramp(draw: np.random.Generator, side: int) -> Image.Image:
    """A grey picture that changes smoothly: a few random values enlarged by a bicubic filter."""
    cells = int(draw.integers(2, 6))
    coarse = draw.integers(0, 256, (cells, cells)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def _shade(draw: np.random.Generator, canvas: Image.Image) -> Image.Image:
    """The picture under uneven light."""
    light = ImageEnhance.Brightness(_ramp(draw, canvas.width)).enhance(0.6).point(lambda value: value + 100)
    return ImageChops.multiply(canvas, light.convert("RGB"))


def _gradients(draw: np.random.Generator) -> Image.Image:
    """Two colours that run into each other, perhaps with a shape or two of another gradient."""
    side = CANVAS_PX
    canvas = Image.merge("RGB", [_ramp(draw, side) for _ in range(3)])
    if draw.random() < 0.5:
        canvas = ImageOps.colorize(_ramp(draw, side), _color(draw), _color(draw))
    for _ in range(int(draw.integers(0, 4))):
        mask = Image.new("L", (side, side))
        ImageDraw.Draw(mask).polygon(_shape(draw, draw.uniform(0, side, 2), draw.uniform(10, 60)), fill=255)
        canvas.paste(ImageOps.colorize(_ramp(draw, side), _color(draw), _color(draw)), mask=mask)
    return canvas


def _strokes(draw: np.random.Generator) -> Image.Image:
    """Curved lines of a few widths on a plain or a smooth ground, as pens and brushes leave them."""
    side = 2 * CANVAS_PX
    plain = draw.random() < 0.6
    canvas = Image.new("RGB", (side, side), _color(draw)) if plain else _gradients(draw).resize((side, side))
    pen = ImageDraw.Draw(canvas)
    width = float(draw.uniform(2, 36))
    inks = [_color(draw) for _ in range(int(draw.integers(1, 4)))]
    for _ in range(int(draw.integers(3, 24))):
        knots = draw.uniform(-0.1, 1.1, (4, 2)) * draw.uniform(0.3, 1.0) * side
        knots = knots + draw.uniform(0, 0.6, 2) * side
        t = np.linspace(0, 1, 20)[:, None]
        bezier = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]
        curve = sum(weight * knot for weight, knot in zip(bezier, knots, strict=True))
        thick = max(1, round(width * draw.uniform(0.6, 1.4)))
        ink = inks[draw.integers(len(inks))]
        pen.line([(float(x), float(y)) for x, y in curve], fill=ink, width=thick, joint="curve")
    return canvas


def _glyphs(draw: np.random.Generator) -> Image.Image:
    """Letters and signs of Pillow's own font, in all sizes, turned a little."""
    side = 2 * CANVAS_PX
    canvas = Image.new("RGB", (side, side), _color(draw))
    if draw.random() < 0.3:
        canvas = _gradients(draw).resize((side, side))
    signs = "ABCDEFGHKLMNOPRSTUVWXYZabcdefghkmnopqrstuvwxyz&?!#%@$+=<>()[]{}"
    size: Any = draw.uniform(24, 150)  # older type stubs of Pillow know whole sizes only
    ink = _color(draw)
    for _ in range(int(draw.integers(2, 20))):
        stamp = Image.new("L", (int(size * 1.4), int(size * 1.4)))
        sign = signs[draw.integers(len(signs))]
        ImageDraw.Draw(stamp).text((size * 0.2, 0), sign, fill=255, font=ImageFont.load_default(size))
        stamp = stamp.rotate(float(draw.normal(0, 20)), Image.Resampling.BILINEAR)
        ink = _color(draw) if draw.random() < 0.3 else ink
        place = tuple(int(corner) for corner in draw.integers(-20, side - 20, 2))
        canvas.paste(ink, (place[0], place[1]), stamp)
    return canvas


PAINTERS: tuple[Painter, ...] = (_dead_leaves, _gradients, _strokes, _glyphs)
SHARES = (0.55, 0.15, 0.15, 0.15)
