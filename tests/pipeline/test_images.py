"""Any image file becomes RGB pixels of one size, and a file that cannot says why."""

import hashlib
import io
import struct
import sys
import threading
import warnings
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image, TiffImagePlugin

from pipeline import image_kinds
from pipeline.images import (
    ImageError,
    center_crop,
    choose_box,
    decode_image,
    random_resized_crop,
    to_pixels,
)

SOLID = (200, 100, 50)
GOLDEN_BOXES = [(44, 8, 243, 180), (16, 0, 183, 200), (68, 7, 292, 179)]

GOLDEN_CROPS = [
    "c0666816dc058aeabf57ae5ef34d5e6a22d7ada2cc0ca09090d40d967da433d8",
    "fffa71c5b3d30c4bf76525e489f43cd717cbbff4a33de5bcbe2fc53714852058",
]


def picture(width=24, height=16, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def adm_center_crop(image, size):
    """The published definition, statement by statement: halve by BOX, then BICUBIC, then the middle."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP", "PPM"])
def test_every_format_is_known_by_its_content(kind):
    image = decode_image(encoded(Image.new("RGB", (10, 7), SOLID), kind), "no-suffix")
    assert (image.mode, image.size) == ("RGB", (10, 7))
    assert np.abs(np.asarray(image).astype(int) - SOLID).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_rgb_comes_back_to_the_last_bit(kind):
    original = picture()
    assert np.array_equal(decode_image(encoded(original, kind)), original)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode_image(data).getpixel((3, 3)) == (255, 0, 0), kind


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_turns_the_image_upright_once(kind, orientation):
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("white", (0, 0, 8, 8))
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(stored, kind, exif=exif))
    assert decoded.size == (32, 16)
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(upright)).max() < 40


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # the commands silence Pillow; pytest undoes that
def test_damaged_exif_turns_nothing():
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01\x03")
    assert decode_image(data).size == (24, 16)


def test_cmyk_and_inverted_adobe_cmyk_become_rgb():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.asarray(decode_image(encoded(cmyk, "JPEG", quality=95)))[8, 8].astype(int)
    assert np.abs(red - (255, 0, 0)).max() < 12
    assert decode_image(encoded(cmyk, "TIFF")).getpixel((4, 4)) == (255, 0, 0)


def test_palettes_grey_and_single_bits_become_rgb():
    assert decode_image(encoded(Image.new("RGB", (4, 4), SOLID).convert("P"), "PNG")).mode == "RGB"
    assert decode_image(encoded(Image.new("L", (4, 4), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(encoded(Image.new("1", (4, 4), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_alpha_is_composited_on_white():
    half_red = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert decode_image(encoded(half_red, "PNG")).getpixel((0, 0)) == (255, 127, 127)
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    for kind in ("PNG", "WEBP", "TIFF"):
        assert decode_image(encoded(clear, kind)).getpixel((0, 0)) == (255, 255, 255), kind
    assert decode_image(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_a_colour_marked_transparent_becomes_white():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    for transparency in (0, bytes([0, 255])):
        image = decode_image(encoded(palette, "PNG", transparency=transparency))
        assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == ((255, 255, 255), (40, 50, 60))
    assert decode_image(encoded(palette, "GIF", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    keyed = encoded(Image.new("RGB", (4, 4), SOLID), "PNG", transparency=SOLID)
    assert decode_image(keyed).getpixel((0, 0)) == (255, 255, 255)


def test_of_sixteen_bits_the_upper_eight_count():
    for value, byte in ((0, 0), (0x80FF, 0x80), (65535, 255)):
        grey = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
        assert decode_image(encoded(grey, "PNG")).getpixel((0, 0)) == (byte,) * 3
        assert decode_image(encoded(grey, "TIFF")).getpixel((0, 0)) == (byte,) * 3
    rows = b"".join(b"\x00" + struct.pack(">HHH", 0x12FF, 0x80FF, 0xFFFF) * 2 for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    assert decode_image(b"\x89PNG\r\n\x1a\n" + chunks).getpixel((1, 1)) == (0x12, 0x80, 0xFF)


def test_floating_point_images_are_taken_from_zero_to_one():
    ramp = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert np.asarray(decode_image(encoded(Image.fromarray(ramp), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(ImageError, match="floating-point values outside 0 to 1"):
        decode_image(encoded(Image.fromarray(ramp * 7), "TIFF"))


def test_a_broken_colour_profile_is_ignored():
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        data = encoded(Image.new("RGB", (8, 8), SOLID), kind, icc_profile=b"this is no profile")
        assert np.abs(np.asarray(decode_image(data)).astype(int) - SOLID).max() <= 3, kind


def test_one_pixel_is_an_image():
    pixels = center_crop(decode_image(encoded(Image.new("RGB", (1, 1), SOLID), "PNG")), 64)
    assert pixels.shape == (64, 64, 3)
    assert (pixels == SOLID).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_a_file_that_was_cut_off_is_refused(kind, share):
    data = encoded(picture(240, 160), kind)
    with pytest.raises(ImageError, match=r"a/b\.x: (truncated|cannot be decoded|not an image)"):
        decode_image(data[: int(len(data) * share)], "a/b.x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>not found</html>", "not an image of a known kind, or cut off inside its header"),
        (b"\x89PNG\r\n\x1a\n", "not an image of a known kind, or cut off inside its header"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known kind"),
        (b"\xff\xd8\xff" + bytes(50), "not an image of a known kind, or cut off inside its header"),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(data, reason):
    with pytest.raises(ImageError) as caught:
        decode_image(data, "cat.jpg")
    assert caught.value.reason.startswith(reason)
    assert caught.value.key == "cat.jpg"


def test_a_decompression_bomb_is_refused_before_it_is_unpacked():
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="a decompression bomb: more than 178 megapixels"):
        decode_image(bomb)


def test_noise_never_raises_anything_but_image_errors():
    draw = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        sound = encoded(picture(), kind)
        for _ in range(40):
            damaged = bytearray(sound)
            for place in draw.integers(0, len(damaged), 5):
                damaged[place] = draw.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd metadata, which the commands silence too
                try:
                    assert decode_image(bytes(damaged)).mode == "RGB"
                except ImageError:
                    continue


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize(
    "shape", [(500, 375), (375, 500), (64, 64), (257, 511), (129, 1000), (1023, 769), (1, 3), (40, 30), (512, 512)]
)
def test_the_centre_crop_is_bit_for_bit_the_published_one(size, shape):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8))
    differs = np.abs(center_crop(image, size).astype(int) - adm_center_crop(image, size))
    # before 13, Pillow itself takes the rows of the tallest first
    assert differs.max() <= (int(PIL.__version__.split(".")[0]) < 13 and (shape, size) == ((129, 1000), 64))


def test_a_side_ratio_that_would_fill_the_memory_is_refused():
    with pytest.raises(ImageError, match="too thin: 1×5000 pixels would be resized to 256×1280000, more than 64 mega"):
        center_crop(Image.new("RGB", (1, 5000)), 256)
    assert center_crop(Image.new("RGB", (1, 99)), 64).shape == (64, 64, 3)


def test_boxes_depend_on_their_key_alone_and_stay_inside():
    boxes = [choose_box(300, 200, 0, index, view) for index in range(200) for view in range(2)]
    assert boxes == [choose_box(300, 200, 0, index, view) for index in range(200) for view in range(2)]
    assert len(set(boxes)) > 390
    assert choose_box(300, 200, 0, 1) != choose_box(300, 200, 1, 1)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 300
        assert 0 <= top < bottom <= 200
        assert 0.49 < (right - left) * (bottom - top) / 60_000 <= 1
        assert 0.74 < (right - left) / (bottom - top) < 1.35


def test_a_box_may_be_as_wide_or_as_high_as_the_image_and_begin_anywhere():
    """In an image of 4×4 a box of 4×3 or 3×4 can only be a drawn one: the fallback is 4×4."""
    boxes = {choose_box(4, 4, 0, index) for index in range(300)}
    assert {(0, 0, 4, 3), (0, 1, 4, 4), (0, 0, 3, 4), (1, 0, 4, 4), (0, 0, 4, 4)} <= boxes


def test_boxes_keep_their_values_for_ever():
    assert [choose_box(300, 200, 0, index) for index in range(3)] == GOLDEN_BOXES


def test_a_box_of_an_image_too_thin_for_any_ratio_is_its_middle():
    assert choose_box(1000, 10, 0, 0) == (493, 0, 506, 10)
    assert choose_box(10, 1000, 0, 0) == (0, 493, 10, 506)
    assert choose_box(1, 1, 0, 0) == (0, 0, 1, 1)


def test_a_random_crop_is_the_box_enlarged():
    image = picture(48, 32)
    whole = random_resized_crop(image, 16, (8, 4, 40, 28))
    assert np.array_equal(whole, np.asarray(image.crop((8, 4, 40, 28)).resize((16, 16), Image.Resampling.BICUBIC)))


def test_crops_of_tall_images_keep_their_bytes_under_every_version_of_pillow():
    """Pillow 13 resizes these column by column first, earlier ones row by row; the values are those of 13.0.0."""
    tall = picture(300, 604)
    crops = center_crop(tall, 256), random_resized_crop(tall, 128, (40, 100, 240, 400))
    assert [hashlib.sha256(crop.tobytes()).hexdigest() for crop in crops] == GOLDEN_CROPS


def test_bytes_map_linearly_onto_minus_one_to_one():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = to_pixels(images)
    assert (pixels.dtype, pixels.shape, pixels.flags.c_contiguous) == (np.float32, (1, 3, 16, 16), True)
    assert pixels.min() == -1 and pixels.max() == 1 and abs(pixels[0, 0, 0, 1] - (1 / 127.5 - 1)) < 1e-7
    assert np.array_equal(((pixels + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1), images)


def test_many_threads_decode_what_one_does():
    files = [encoded(picture(64, 48, seed), kind) for seed in range(4) for kind in ("PNG", "JPEG", "WEBP", "GIF")]
    expected = [center_crop(decode_image(data), 32) for data in files]
    failures = []

    def decode_all():
        for data, pixels in zip(files * 3, expected * 3, strict=True):
            if not np.array_equal(center_crop(decode_image(data), 32), pixels):
                failures.append(data)

    threads = [threading.Thread(target=decode_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def gradient(size=64):
    row = np.arange(size) * (256 // size)
    return np.stack([row[:, None] + 0 * row, row + 0 * row[:, None], 255 - row + 0 * row[:, None]], -1).astype(np.uint8)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker_is_whole_and_one_without_pixels_is_not(progressive):
    data = saved(Image.fromarray(gradient()), format="JPEG", quality=90, progressive=progressive)
    assert data.endswith(b"\xff\xd9")
    expected = np.asarray(decode_image(data))
    for end in (data[:-2], data[:-1]):
        assert np.array_equal(np.asarray(decode_image(end)), expected)
    for cut in (8, 40, len(data) // 3):
        with pytest.raises(ImageError, match="truncated"):
            decode_image(data[:-cut])


def chunk(kind, body, *, broken=False):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ broken)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"tEXt", b"key\0value", broken=True),
        chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(1 << 22))),
        chunk(b"iCCP", b"profile\0\0not compressed"),
        chunk(b"gAMA", b"12", broken=True),
    ],
)
def test_what_stands_beside_the_pixels_of_a_png_loses_no_image(extra):
    data = saved(Image.fromarray(gradient()), format="PNG")
    odd = data[:33] + extra + data[33:]
    assert np.array_equal(np.asarray(decode_image(odd)), gradient())
    assert np.array_equal(np.asarray(decode_image(data[:-12])), gradient())
    with pytest.raises(ImageError):
        decode_image(data[: len(data) // 2])


def test_12_bit_values_in_16_bits_and_integers_of_32_are_refused_and_not_turned_black():
    values = np.linspace(0, 4095, 64 * 64).reshape(64, 64)
    for image in (Image.fromarray(values.astype(np.uint16)),):
        for kind in ("PNG", "TIFF"):
            with pytest.raises(ImageError, match="12 bits or less"):
                decode_image(saved(image, format=kind))
    with pytest.raises(ImageError, match="32-bit"):
        decode_image(saved(Image.fromarray((values * 1000).astype(np.int32)), format="TIFF"))
    full = Image.fromarray((values * 16).astype(np.uint16))
    assert np.asarray(decode_image(saved(full, format="PNG"))).max() == 255


@pytest.mark.parametrize("marks", [{50706: b"\1\4\0\0"}, {254: 1, 330: 8}], ids=["version", "reduced"])
def test_a_raw_file_s_thumbnail_is_not_taken_for_its_picture(marks):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in marks.items():
        tags[tag] = value
    with pytest.raises(ImageError, match="camera's raw file"):
        decode_image(saved(Image.fromarray(gradient()), format="TIFF", tiffinfo=tags))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"a photo of a cat", r"leave out \*.txt"),
        (b'{"label": 1}', r"leave out \*.json"),
        (b"PAR1" + bytes(99), "parquet"),
        (b"\x93NUMPY\1\0", "NumPy array"),
        (b"\x89PNG\n\x1a\n" + bytes(99), "line ends changed"),
        (b"/9j/4AAQSkZJRgABAQ", "a JPEG written as base64 text"),
        (b"data:image/png;base64,iVBORw0KGgo", "an image written as base64 text"),
        (bytes(16) + b"\xde\xc0\xef\xbe" + bytes(99), "LMDB"),
        (b"\0\0\0\x18ftypisom" + bytes(99), "video"),
    ],
)
def test_what_is_no_image_is_told_by_its_first_bytes_with_advice_that_fits(data, told):
    with pytest.raises(ImageError, match=told):
        decode_image(data)


@pytest.mark.parametrize(
    ("kind", "module", "name"), [("HEIF", "pillow_heif", "HEIC"), ("JXL", "pillow_jxl", "JPEG XL")]
)
def test_heic_and_jpeg_xl_are_read_by_plug_ins_and_told_where_these_are_missing(kind, module, name, monkeypatch):
    plug_in = pytest.importorskip(module)
    if kind == "HEIF":
        plug_in.register_heif_opener()
    data = saved(Image.fromarray(gradient()), format=kind, quality=95)
    assert np.abs(np.asarray(decode_image(data)).astype(int) - gradient()).mean() < 8
    monkeypatch.setattr(image_kinds, "_formats", {})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImageError, match=f"{name}, which is read where its plug-in is installed: pip install pillow-"):
        decode_image(data)
