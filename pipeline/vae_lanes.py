"""How many images a VAE takes at a time on a GPU, and what it holds then: the same memory whatever the images' size.

The bytes are those of Stable Diffusion's VAE (an AutoencoderKL of 128 channels at full size), read off passes that were
traced storage by storage (`tests/fake_cuda`), which also hold them to 5 %; workspaces come on top.
"""

from typing import Final

ENCODED_PX: Final = 32 * 256 * 256
DECODED_PX: Final = 16 * 256 * 256
PREVIEWED_PX: Final = 4 * 256 * 256
"""Pixels of all images of a lane together: in extraction, in sampling and judging, and beside training."""
PARAMETERS: Final = 83_653_863
_ENCODED, _SENT = 5 * 128, 24
_DECODED = 3 * 256
"""Values of a pixel that stand at the peak: five of the encoder's maps (and in float32 the pixels of two views), three
of the decoder's, which are twice as wide."""


def at_once(pixels: int, image_px: int) -> int:
    """How many images of so many pixels fit into a lane of `pixels`; one at least."""
    return max(1, pixels // image_px)


def encoder_bytes(pixels: int, *, value_bytes: int = 4) -> int:
    """What a pass of the encoder over so many pixels holds beside the weights."""
    return pixels * (_ENCODED * value_bytes + _SENT)


def decoder_bytes(pixels: int, *, value_bytes: int = 4) -> int:
    """What a pass of the decoder to so many pixels holds beside the weights."""
    return pixels * _DECODED * value_bytes
