"""ResNet: residual blocks, for ImageNet and for small images.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016. The stride of a bottleneck stands on its
3x3 convolution, as in the figures that everybody quotes since. Where a shortcut changes shape it is a 1x1 convolution
with BatchNormalization (option B of the paper), in the small-image form as well.

    ImageNet stem    7x7 stride 2, BN, ReLU, 3x3 max pool stride 2      four stages
    CIFAR stem       3x3, BN, ReLU                                      three stages
"""

from collections.abc import Sequence

from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The shortcut, or None where it is the identity."""
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        z: Tensor = self.relu(y + shortcut)
        return z


class Bottleneck(nn.Module):
    """1x1 narrows, 3x3, 1x1 widens fourfold, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        z: Tensor = self.relu(y + shortcut)
        return z


class ResNet(nn.Module):
    """Images (N, channels, H, W) to logits (N, classes).

    Args:
        block: BasicBlock or Bottleneck.
        depths: Blocks per stage; every stage but the first halves the image.
        widths: Channels per stage, before the block's expansion.
        stem_width: Channels after the stem; by default those of the first stage.
        small_images: The CIFAR stem in place of the ImageNet stem.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        classes: int,
        channels: int,
        stem_width: int | None = None,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        inputs = stem_width or widths[0]
        self.conv1 = conv(channels, inputs, 3) if small_images else conv(channels, inputs, 7, 2)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.maxpool = None if small_images else nn.MaxPool2d(3, 2, padding=1)
        stages = []
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for place in range(depth):
                blocks.append(block(inputs, width, 2 if number > 0 and place == 0 else 1))
                inputs = block.expansion * width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(image)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        logits: Tensor = self.fc(self.flatten(self.pool(self.stages(x))))
        return logits


def resnet18(*, classes: int = 1000, channels: int = 3, widths: Sequence[int] = (64, 128, 256, 512)) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), widths, classes=classes, channels=channels)


def resnet34(*, classes: int = 1000, channels: int = 3, widths: Sequence[int] = (64, 128, 256, 512)) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), widths, classes=classes, channels=channels)


def resnet50(*, classes: int = 1000, channels: int = 3, widths: Sequence[int] = (64, 128, 256, 512)) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), widths, classes=classes, channels=channels)


def resnet20(*, classes: int = 10, channels: int = 3, widths: Sequence[int] = (16, 32, 64)) -> ResNet:
    return ResNet(BasicBlock, (3, 3, 3), widths, classes=classes, channels=channels, small_images=True)


def resnet56(*, classes: int = 10, channels: int = 3, widths: Sequence[int] = (16, 32, 64)) -> ResNet:
    return ResNet(BasicBlock, (9, 9, 9), widths, classes=classes, channels=channels, small_images=True)
