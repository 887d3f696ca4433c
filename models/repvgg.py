"""RepVGG in its training form: parallel branches that a merge turns into one 3x3 convolution each.

Ding, Zhang, Ma, Han, Ding, Sun, "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021.

    block    ReLU(3x3-BN(x) + 1x1-BN(x) + BN(x))        the last branch where the shape stays the same
"""

from collections.abc import Sequence

from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.large = conv_bn(inputs, outputs, 3, stride)
        self.small = conv_bn(inputs, outputs, 1, stride)
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x) + self.small(x)
        if self.identity is not None:
            y = y + self.identity(x)
        z: Tensor = self.relu(y)
        return z


class RepVGG(nn.Module):
    """Images (N, channels, H, W) to logits (N, classes).

    Args:
        depths: Blocks per stage.
        widths: Channels per stage.
        strides: Stride of the first block of each stage.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        *,
        classes: int,
        channels: int,
    ) -> None:
        super().__init__()
        blocks, inputs = [], channels
        for depth, width, stride in zip(depths, widths, strides, strict=True):
            for place in range(depth):
                blocks.append(Block(inputs, width, stride if place == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(inputs, classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.flatten(self.pool(self.blocks(image))))
        return logits


def repvgg_a0(*, classes: int = 1000, channels: int = 3) -> RepVGG:
    return RepVGG((1, 2, 4, 14, 1), (48, 48, 96, 192, 1280), (2,) * 5, classes=classes, channels=channels)


def repvgg_mini(
    *,
    classes: int = 10,
    channels: int = 1,
    depths: Sequence[int] = (1, 2, 3, 1),
    widths: Sequence[int] = (16, 16, 32, 64),
    strides: Sequence[int] = (1, 1, 2, 2),
) -> RepVGG:
    return RepVGG(depths, widths, strides, classes=classes, channels=channels)
