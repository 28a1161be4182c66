"""The image resize of TensorFlow 1, which the FID network was always fed through."""

import torch
from torch import Tensor


def _taps(length: int, wanted: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return, per output position, the two input positions it lies between and the weight of the second."""
    position = torch.arange(wanted, dtype=torch.float32, device=device) * (length / wanted)
    lower = position.floor()
    upper = (lower + 1).clamp(max=length - 1)
    return lower.long(), upper.long(), position - lower


def resize_bilinear(images: Tensor, *, height: int, width: int) -> Tensor:
    """Float32 images [N, C, height, width], bilinear in the manner of `tf.image.resize_bilinear` of TensorFlow 1.

    With `align_corners=False` and without half-pixel centres, output pixel i looks at input position i · (in
    / out): the grid is anchored at the top left corner, and nothing is averaged when an image shrinks.
    PyTorch's `interpolate` has no such mode (it has half-pixel centres), and FIDs differ by whole points
    between the two.
    """
    images = images.to(torch.float32)
    left, right, across = _taps(images.shape[-1], width, images.device)
    images = torch.lerp(images[..., left], images[..., right], across)
    top, bottom, down = _taps(images.shape[-2], height, images.device)
    return torch.lerp(images[..., top, :], images[..., bottom, :], down[:, None])
