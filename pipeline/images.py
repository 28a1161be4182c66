"""Any image file as RGB pixels of one size: decode by content, crop, scale to [−1, 1].

Extraction and evaluation both come through here. Every function may run in many threads at once. What happens to each
kind of file is in docs/images.md; a file that cannot be used raises `ImageError` with a reason for people.
"""

import io
import math
import random
import warnings
from typing import cast

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from pipeline.image_kinds import missing_plug_in, plug_in_format, plug_in_kind, what_it_is
from pipeline.image_repair import mended
from pipeline.randomness import derive_seed

Image.init()  # registers every decoder now, not in whichever thread meets a rare format first
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "MPO", "DIB", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
)
"""What is decoded. Formats that start other programs (EPS, WMF) or hold no photographs stay out."""
MOST_RESIZED_PX = 64_000_000
"""A thin image is refused if its short side, brought to size, would make it larger than this."""
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")

# Pillow warns of odd metadata and of large images (89 to 179 megapixels; larger ones it refuses). Neither is news to
# someone who extracts a million files. Set once, because `warnings.catch_warnings` is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Text and profiles beside the pixels are not read; Pillow would refuse an image for more than a megabyte of them.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28
_REDUCED, _DNG_VERSION, _SUB_IMAGES = 254, 50706, 330
"""Tags of TIFF that tell a camera's raw file, whose first picture is a thumbnail."""
_MOST_OF_12_BITS = 4095
_PNG = b"\x89PNG"

Pixels = UInt8[np.ndarray, "size size 3"]
Box = tuple[int, int, int, int]


class ImageError(Exception):
    """An input that is no usable image.

    Attributes:
        reason: why, in words that can stand in a list of skipped files.
        key: which input, where the raiser knew.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(f"{key}: {reason}" if key else reason)
        self.reason = reason
        self.key = key


def decode_image(data: bytes, key: str = "") -> Image.Image:
    """The file's first picture, upright and in RGB, whatever its suffix says.

    Colour profiles are ignored, alpha is composited on white, of 16 bits per channel the upper 8 count.

    Raises:
        ImageError: zero bytes, no image, cut off, damaged, or a decompression bomb.
    """
    if not data:
        raise ImageError("zero bytes", key)
    try:
        formats = _formats_for(data)
        try:
            return _decoded(data, formats)
        except (OSError, SyntaxError, ValueError) as error:
            whole = None if isinstance(error, UnidentifiedImageError) and not data.startswith(_PNG) else mended(data)
            if whole is None:
                raise
            return _decoded(whole, formats)
    except UnidentifiedImageError as error:
        raise ImageError(what_it_is(data), key) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("a decompression bomb: more than 178 megapixels", key) from error
    except ImageError as error:
        raise ImageError(error.reason, key) from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        what = "truncated" if "truncated" in reason.lower() else "cannot be decoded"
        raise ImageError(f"{what} ({reason})", key) from error


def _formats_for(data: bytes) -> tuple[str, ...]:
    """What may be decoded: FORMATS, and what a plug-in reads if this is of its kind.

    Raises:
        ImageError: the plug-in is not installed.
    """
    kind = plug_in_kind(data)
    if kind is None:
        return FORMATS
    name = plug_in_format(kind)
    if name is None:
        raise ImageError(missing_plug_in(kind))
    return (name,)


def _decoded(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=formats)
    _refuse_raw(image, data)
    is_deep = image.mode in SIXTEEN_BITS or any(
        ";16" in str(tile[3]) and "BGR" not in str(tile[3]) for tile in image.tile
    )
    is_integer = image.format == "TIFF" and image.mode == "I"
    image.load()
    if is_integer:
        raise ImageError("32-bit or signed integers, of which black and white are unknown; write 8 or 16 bits")
    rgb = _as_rgb(_upright(image))
    if is_deep:
        _refuse_dark(rgb)
    return rgb


def _refuse_raw(image: Image.Image, data: bytes) -> None:
    """Raise ImageError for a camera's raw file, of which Pillow would give the thumbnail."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    is_thumbnail = bool(int(tags.get(_REDUCED, 0) or 0) & 1) and _SUB_IMAGES in tags
    if is_thumbnail or _DNG_VERSION in tags or data[8:10] == b"CR":
        raise ImageError("a camera's raw file, of which only a thumbnail could be read; develop it first")


def _refuse_dark(image: Image.Image) -> None:
    """Raise ImageError where 16 bits per channel hold 12-bit values or less, whose upper 8 bits are black."""
    lightest = int(np.asarray(image).max())
    if 0 < lightest <= _MOST_OF_12_BITS >> 8:
        raise ImageError(
            "16 bits per channel that hold values of 12 bits or less, which would turn black; bring them to the full "
            "range first"
        )


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; unreadable EXIF turns nothing."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 (damaged metadata, sound pixels)
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in SIXTEEN_BITS:
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return _from_floats(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ImageError("floating-point values outside 0 to 1, so that black and white are unknown")
    return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """The RGB image in that (width, height), by Pillow's filter along one side and then along the other.

    Between the passes Pillow rounds to bytes, so which goes first decides bytes of a store, and Pillow's versions
    choose differently: until 12 always the rows, since 13 the columns where that leaves less to do. Two calls with one
    side each do as 13 does under every version.
    """
    (width, height), (to_width, to_height) = image.size, size
    columns_first = to_height < height and height - to_height > 2 * (width - to_width)
    between = (width, to_height) if columns_first else (to_width, height)
    return image.resize(between, resample).resize(size, resample)


def center_crop(image: Image.Image, size: int) -> Pixels:
    """The middle square of `size` pixels after the short side is brought to `size`, as ADM and DiT do it.

    Halve by BOX while the short side is at least 2 · size, resize by BICUBIC so that it is `size` (the other side
    rounded), cut out the middle (Dhariwal & Nichol 2021, arXiv 2105.05233, their `center_crop_arr`).

    Raises:
        ImageError: the image is so thin that resizing would make more than 64 megapixels.
    """
    while min(image.size) >= 2 * size:
        image = resize(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_RESIZED_PX:
        raise ImageError(
            f"too thin: {image.width}×{image.height} pixels would be resized to {width}×{height}, "
            f"more than {MOST_RESIZED_PX // 10**6} megapixels"
        )
    image = resize(image, (width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def choose_box(
    width: int, height: int, seed: int, *numbers: int, smallest_share: float = 0.5, widest_ratio: float = 4 / 3
) -> Box:
    """A random (left, top, right, bottom) inside the image, the same for the same seed and numbers.

    Its area is a uniform share of the image's between `smallest_share` and 1, the logarithm of its width over its
    height uniform between those of 1 / `widest_ratio` and `widest_ratio`; after ten boxes that did not fit, the
    largest central one of an allowed ratio. (Szegedy et al. 2014, arXiv 1409.4842, there with shares from 0.08:
    a generative model would learn to draw such close-ups.)
    """
    draw = random.Random(derive_seed(seed, "random-resized-crop", *numbers))  # noqa: S311 (pictures, no secrets)
    for _ in range(10):
        area = width * height * (smallest_share + (1 - smallest_share) * draw.random())
        ratio = widest_ratio ** (2 * draw.random() - 1)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int((width - box_width + 1) * draw.random())
            top = int((height - box_height + 1) * draw.random())
            return left, top, left + box_width, top + box_height
    box_width = min(width, max(1, round(height * widest_ratio)))
    box_height = min(height, max(1, round(width * widest_ratio)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def random_resized_crop(image: Image.Image, size: int, box: Box) -> Pixels:
    """The part of the image inside the box, resized to `size` × `size` by BICUBIC with antialiasing."""
    return np.array(resize(image.crop(box), (size, size), Image.Resampling.BICUBIC))


def psnr(picture: UInt8[np.ndarray, "*shape"], other: UInt8[np.ndarray, "*shape"]) -> float:
    """Peak signal-to-noise ratio 10 · log10(255² / mean squared error) in dB; infinite where nothing differs."""
    error = np.mean((picture.astype(np.float64) - other.astype(np.float64)) ** 2)
    return 10 * math.log10(255.0**2 / error) if error else math.inf


def to_pixels(images: UInt8[np.ndarray, "batch height width 3"]) -> Float32[np.ndarray, "batch 3 height width"]:
    """Bytes as the VAE takes them: byte / 127.5 − 1, channels first, float32."""
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32)
    pixels /= np.float32(127.5)
    pixels -= np.float32(1)
    return cast("np.ndarray", pixels)
