"""Features under a vision encoder of the user's: FD-DINOv2 and the like, CMMD under CLIP, what a classifier names.

FD-DINOv2 is the Fréchet distance of class tokens (Stein et al. 2023, arXiv 2306.04675: DINOv2 ViT-L/14, images resized
to 224 pixels by bicubic interpolation). CMMD is a kernel distance of CLIP's normalised image embeddings (Jayasumana et
al. 2024, arXiv 2401.09603: ViT-L/14 at 336 pixels). Which encoder it is stands in the metric's name and the result.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.features.encoder import EncoderFolder, load_classifier, load_encoder, load_image_embedder
from pipeline.images import resize, to_pixels
from sample.evaluate.metrics import FeatureName

CLIPS = ("clip", "clip_vision_model")
_NAMES = {
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2",
    "dinov3_vit": "DINOv3",
    "siglip": "SigLIP",
    "siglip_vision_model": "SigLIP",
    "vit": "ViT",
    **dict.fromkeys(CLIPS, "CLIP"),
}
"""What the kinds of encoder are called in a metric's name; others by their folder."""

_HEADS: dict[FeatureName, Callable[..., Callable[[Tensor], Tensor]]] = {
    "embedding": load_image_embedder,
    "logits": load_classifier,
}


def name_of(folder: EncoderFolder) -> str:
    """What the encoder is called in a metric's name."""
    return _NAMES.get(folder.kind, folder.name.rpartition("/")[2])


def describe(folder: EncoderFolder) -> dict[str, Any]:
    """What a result says of the encoder."""
    return {"name": folder.name, "kind": folder.kind, "sha256": folder.sha256, "resolution": folder.resolution}


class EncoderFeatures(torch.nn.Module):
    """Images uint8 [n, 3, H, W] to float32: class tokens, or means of patches where there are none; what heads say."""

    def __init__(self, folder: EncoderFolder, wanted: Sequence[FeatureName], device: str) -> None:
        """Load what the wanted features need.

        Raises:
            UserError: the weights do not fit.
        """
        super().__init__()
        self._side = folder.resolution
        place = torch.device(device)
        self._encoder = load_encoder(folder, device=place, dtype=torch.float32) if "encoder" in wanted else None
        self._heads: dict[FeatureName, Callable[[Tensor], Tensor]] = {
            name: load(folder, device=place) for name, load in _HEADS.items() if name in wanted
        }

    def forward(self, images: Tensor, wanted: Sequence[FeatureName]) -> dict[FeatureName, Tensor]:
        """The wanted features of images, each resized as a whole to the encoder's side by PIL's bicubic filter."""
        pixels = torch.from_numpy(to_pixels(_resized(images, self._side)))
        found: dict[FeatureName, Tensor] = {}
        if "encoder" in wanted:
            assert self._encoder is not None, "it was said to be wanted"
            patches, token = self._encoder.tokens(pixels)
            found["encoder"] = patches.mean(1) if token is None else token
        return found | {name: self._heads[name](pixels) for name in wanted if name in _HEADS}


def _resized(images: Tensor, side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[n, side, side, 3], uint8."""
    rows = images.permute(0, 2, 3, 1).numpy()
    if rows.shape[1:3] == (side, side):
        return np.ascontiguousarray(rows)
    return np.stack([np.asarray(resize(Image.fromarray(row), (side, side), Image.Resampling.BICUBIC)) for row in rows])
