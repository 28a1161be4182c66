"""The image resize of TensorFlow 1, which the FID network was always fed through."""

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sample.evaluate.metrics import FeatureName


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


FEATURE_WIDTHS: dict[str, int] = {
    "features_768": 768,
    "features_2048": 2048,
    "spatial": 7 * 17 * 17,
    "logits_unbiased": 1008,
    "logits": 1008,
}
SPATIAL_CHANNELS = 7
INPUT_PX = 299


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation with TensorFlow's epsilon, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    """The 3 × 3 running mean over those neighbours that lie inside the image."""
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    """The 3 × 3 running maximum."""
    return functional.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(nn.Module):
    """35 × 35 grid: 1×1, 5×5, two 3×3 and a pooled branch."""

    def __init__(self, inputs: int, *, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64, 1)
        self.branch5x5_1 = Convolution(inputs, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        fives = self.branch5x5_2(self.branch5x5_1(x))
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), fives, threes, self.branch_pool(_average(x))], dim=1)


class BlockB(nn.Module):
    """From 35 × 35 to 17 × 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), threes, functional.max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(nn.Module):
    """17 × 17 grid: 7×7 filters as rows and columns, `inner` channels wide inside."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        along_row, along_column = (0, 3), (3, 0)
        self.branch1x1 = Convolution(768, 192, 1)
        self.branch7x7_1 = Convolution(768, inner, 1)
        self.branch7x7_2 = Convolution(inner, inner, row, padding=along_row)
        self.branch7x7_3 = Convolution(inner, 192, column, padding=along_column)
        self.branch7x7dbl_1 = Convolution(768, inner, 1)
        self.branch7x7dbl_2 = Convolution(inner, inner, column, padding=along_column)
        self.branch7x7dbl_3 = Convolution(inner, inner, row, padding=along_row)
        self.branch7x7dbl_4 = Convolution(inner, inner, column, padding=along_column)
        self.branch7x7dbl_5 = Convolution(inner, 192, row, padding=along_row)
        self.branch_pool = Convolution(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], dim=1)


class BlockD(nn.Module):
    """From 17 × 17 to 8 × 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(768, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(768, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        threes = self.branch3x3_2(self.branch3x3_1(x))
        sevens = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([threes, sevens, functional.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """8 × 8 grid: filters that fan out. The network's second such block pools by maximum, a quirk of this release."""

    def __init__(self, inputs: int, *, pool: Literal["average", "maximum"]) -> None:
        super().__init__()
        self.pool = _average if pool == "average" else _maximum
        self.branch1x1 = Convolution(inputs, 320, 1)
        self.branch3x3_1 = Convolution(inputs, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, dim=1)


class FIDInception(nn.Module):
    """Features of images under the network that FID, sFID and the Inception Score are defined by."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = BlockA(192, pooled=32)
        self.Mixed_5c = BlockA(256, pooled=64)
        self.Mixed_5d = BlockA(288, pooled=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, pool="average")
        self.Mixed_7c = BlockE(2048, pool="maximum")
        self.fc = nn.Linear(2048, 1008)

    def _to_17x17(self, images: Tensor) -> Tensor:
        """What enters Mixed_6d: [N, 768, 17, 17]."""
        x = resize_bilinear(images.to(self.fc.weight.device), height=INPUT_PX, width=INPUT_PX)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        return self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))

    def forward(self, images: Tensor, wanted: Collection[FeatureName]) -> dict[FeatureName, Tensor]:
        """The wanted features [N, width] of images [N, 3, H, W] in levels 0 … 255, uint8 or float.

        `spatial` are the first 7 channels of Mixed_6d's 1×1 branch after its ReLU (`mixed_6/conv:0` in ADM),
        flattened channels last as TensorFlow lays them out; `logits_unbiased` are the class scores without
        the bias, from which ADM takes the Inception Score.
        """
        features: dict[FeatureName, Tensor] = {}
        x = self._to_17x17(images)
        if "spatial" in wanted:
            spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]
            features["spatial"] = spatial.permute(0, 2, 3, 1).flatten(1)
        if set(wanted) <= set(features):
            return features
        x = self.Mixed_6e(self.Mixed_6d(x))
        if "features_768" in wanted:
            features["features_768"] = x.mean(dim=(2, 3))
        pooled = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))
        if "features_2048" in wanted:
            features["features_2048"] = pooled
        if "logits_unbiased" in wanted:
            features["logits_unbiased"] = functional.linear(pooled, self.fc.weight)
        if "logits" in wanted:
            features["logits"] = self.fc(pooled)
        return features
