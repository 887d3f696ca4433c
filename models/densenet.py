"""DenseNet with bottlenecks and compression (DenseNet-BC).

Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017.

    layer         x --BN, ReLU, 1x1 (4k)--BN, ReLU, 3x3 (k)--Concat after x
    transition    BN, ReLU, 1x1 (half), 2x2 average pool
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def norm_conv(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [nn.BatchNorm2d(inputs), nn.ReLU(), conv]


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(*norm_conv(inputs, 4 * growth, 1))
        self.conv = nn.Sequential(*norm_conv(4 * growth, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.bottleneck(x))], dim=1)


class DenseNet(nn.Module):
    """Images (N, channels, H, W) to logits (N, classes).

    Args:
        depths: Layers per dense block; between two blocks a transition.
        growth: Channels that a layer adds, k in the paper.
        stem_width: Channels after the stem.
        stem_stride: None for the ImageNet stem (7x7 of stride 2 and a max pool), else the stride of a 3x3 stem.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        growth: int,
        classes: int,
        channels: int,
        stem_width: int,
        stem_stride: int | None = None,
    ) -> None:
        super().__init__()
        if stem_stride is None:
            stem = nn.Conv2d(channels, stem_width, 7, 2, padding=3, bias=False)
            modules = [stem, nn.BatchNorm2d(stem_width), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
        else:  # the first layer begins with BatchNormalization
            modules = [nn.Conv2d(channels, stem_width, 3, stem_stride, padding=1, bias=False)]
        width = stem_width
        for number, depth in enumerate(depths):
            if number > 0:
                modules.append(nn.Sequential(*norm_conv(width, width // 2, 1), nn.AvgPool2d(2)))
                width //= 2
            modules.append(nn.Sequential(*(DenseLayer(width + i * growth, growth) for i in range(depth))))
            width += depth * growth
        self.features = nn.Sequential(*modules)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.norm(self.features(image)))
        logits: Tensor = self.classifier(self.flatten(self.pool(x)))
        return logits


def densenet121(*, classes: int = 1000, channels: int = 3, growth: int = 32) -> DenseNet:
    return DenseNet((6, 12, 24, 16), growth=growth, classes=classes, channels=channels, stem_width=2 * growth)


def densenet_mini(
    *,
    classes: int = 10,
    channels: int = 1,
    depths: Sequence[int] = (6, 6, 6),
    growth: int = 12,
    stem_width: int = 24,
    stem_stride: int = 1,
) -> DenseNet:
    """The CIFAR form of the paper with few layers."""
    return DenseNet(
        depths,
        growth=growth,
        classes=classes,
        channels=channels,
        stem_width=stem_width,
        stem_stride=stem_stride,
    )
