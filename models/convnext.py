"""ConvNeXt, version 1.

Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, "A ConvNet for the 2020s", CVPR 2022.

    x --7x7 depthwise--LayerNorm over channels--1x1 (4C)--GELU--1x1 (C)--times gamma--(+ x)

The two 1x1 convolutions work on the last axis, as linear layers between two transpositions, as in the paper's own form.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPSILON = 1e-6


class ChannelNorm(nn.Module):
    """LayerNormalization over the channels of (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


class Block(nn.Module):
    def __init__(self, channels: int, layer_scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPSILON)
        self.expand = nn.Linear(channels, 4 * channels)
        self.gelu = nn.GELU()
        self.reduce = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.reduce(self.gelu(self.expand(self.norm(y))))
        z: Tensor = x + (self.gamma * y).permute(0, 3, 1, 2)
        return z


class ConvNeXt(nn.Module):
    """Images (N, channels, H, W) to logits (N, classes).

    Args:
        depths: Blocks per stage.
        widths: Channels per stage; between two stages a LayerNorm and a 2x2 convolution of stride 2.
        patch_size: Kernel and stride of the stem.
        layer_scale: Where gamma starts.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        classes: int,
        channels: int,
        patch_size: int,
        layer_scale: float,
    ) -> None:
        super().__init__()
        stem = nn.Conv2d(channels, widths[0], patch_size, patch_size)
        modules: list[nn.Module] = [nn.Sequential(stem, ChannelNorm(widths[0]))]
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if number > 0:
                before = widths[number - 1]
                modules.append(nn.Sequential(ChannelNorm(before), nn.Conv2d(before, width, 2, 2)))
            modules.append(nn.Sequential(*(Block(width, layer_scale) for _ in range(depth))))
        self.features = nn.Sequential(*modules)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.norm = nn.LayerNorm(widths[-1], eps=EPSILON)
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        x = self.flatten(self.pool(self.features(image)))
        logits: Tensor = self.head(self.norm(x))
        return logits


def convnext_tiny(*, classes: int = 1000, channels: int = 3, layer_scale: float = 1e-6) -> ConvNeXt:
    return ConvNeXt(
        (3, 3, 9, 3),
        (96, 192, 384, 768),
        classes=classes,
        channels=channels,
        patch_size=4,
        layer_scale=layer_scale,
    )


def convnext_mini(
    *,
    classes: int = 10,
    channels: int = 1,
    depths: Sequence[int] = (2, 4),
    widths: Sequence[int] = (32, 64),
    patch_size: int = 2,
    layer_scale: float = 0.1,
) -> ConvNeXt:
    """Six blocks for images of about 28x28."""
    return ConvNeXt(
        depths,
        widths,
        classes=classes,
        channels=channels,
        patch_size=patch_size,
        layer_scale=layer_scale,
    )
