"""MobileNetV2: inverted residuals with linear bottlenecks.

Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.

    x --1x1, BN, ReLU6 (t times wider)--3x3 depthwise, BN, ReLU6--1x1, BN--(+ x where stride 1 and equal widths)
"""

from collections.abc import Sequence

from torch import Tensor, nn

# (expansion t, channels c, repeats n, stride s of the first), table 2 of the paper.
IMAGENET = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
MINI = (
    (1, 16, 1, 1),
    (6, 24, 1, 1),
    (6, 40, 5, 2),
    (6, 64, 1, 1),
)


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * inputs
        modules: list[nn.Module] = []
        if expansion > 1:
            modules += [*conv_bn(inputs, width, 1), nn.ReLU6()]
        modules += [*conv_bn(width, width, 3, stride, groups=width), nn.ReLU6()]
        modules += conv_bn(width, outputs, 1)
        self.conv = nn.Sequential(*modules)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.skip else y


class MobileNetV2(nn.Module):
    """Images (N, channels, H, W) to logits (N, classes).

    Args:
        settings: One (t, c, n, s) per stage: expansion, channels, repeats, stride of the first.
        stem_width: Channels after the 3x3 stem.
        stem_stride: Stride of the stem; 1 for small images.
        head_width: Channels of the last 1x1 convolution.
    """

    def __init__(
        self,
        settings: Sequence[tuple[int, int, int, int]],
        *,
        classes: int,
        channels: int,
        stem_width: int,
        stem_stride: int,
        head_width: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        modules: list[nn.Module] = [*conv_bn(channels, stem_width, 3, stem_stride), nn.ReLU6()]
        inputs = stem_width
        for expansion, width, repeats, stride in settings:
            for place in range(repeats):
                modules.append(InvertedResidual(inputs, width, stride if place == 0 else 1, expansion))
                inputs = width
        modules += [*conv_bn(inputs, head_width, 1), nn.ReLU6()]
        self.features = nn.Sequential(*modules)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(head_width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, image: Tensor) -> Tensor:
        x = self.flatten(self.pool(self.features(image)))
        logits: Tensor = self.classifier(self.dropout(x))
        return logits


def mobilenet_v2(*, classes: int = 1000, channels: int = 3, dropout: float = 0.2) -> MobileNetV2:
    return MobileNetV2(
        IMAGENET,
        classes=classes,
        channels=channels,
        stem_width=32,
        stem_stride=2,
        head_width=1280,
        dropout=dropout,
    )


def mobilenetv2_mini(
    *,
    classes: int = 10,
    channels: int = 1,
    settings: Sequence[tuple[int, int, int, int]] = MINI,
    stem_width: int = 16,
    stem_stride: int = 2,
    head_width: int = 192,
) -> MobileNetV2:
    """Eight blocks for images of about 28x28, seven of them with t = 6, five with a skip."""
    return MobileNetV2(
        settings,
        classes=classes,
        channels=channels,
        stem_width=stem_width,
        stem_stride=stem_stride,
        head_width=head_width,
    )
