"""A classifier of 8x8 digits that holds, in one small net, the linear structures that can be merged.

    image (N, 1, 8, 8)
      |  3x3, BN, ReLU
      |  3x3-BN + 1x1-BN + identity-BN, ReLU                      parallel branches (RepVGG, Ding et al. 2021)
      |  x + [1x1 -> 3x3-BN -> 1x1-BN], ReLU                      linear chain beside a skip connection
      |  3x3-BN + 1x1-BN with stride 2, ReLU                      parallel branches without identity
      |  x + [BN -> 1x1-BN, ReLU, 3x3]                            pre-activation BatchNormalization (He et al. 2016)
      |  Concat(1x1, 1x1, 1x1) -> 1x1-BN, ReLU                    parallel 1x1 and the mix of them
      |  global average, linear -> linear                         two Gemm in a row
    logits (N, 10)

BatchNormalization stays a node of its own. The chain is padded at its first convolution, so that the middle never sees
a border of zeros and the chain equals one 3x3 convolution exactly.
"""

from torch import Tensor, cat, nn, relu


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Parallel(nn.Module):
    """3x3 and 1x1, and where the shape allows it the identity, each with its own BatchNormalization."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.large = conv_bn(inputs, outputs, 3, stride, padding=1)
        self.small = conv_bn(inputs, outputs, 1, stride)
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.large(x) + self.small(x)
        return y if self.identity is None else y + self.identity(x)


class Chain(nn.Module):
    """Widen, convolve, narrow: three convolutions without an activation, and a skip connection."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(channels, width, 1, padding=1)
        self.spatial = conv_bn(width, width, 3)
        self.narrow = conv_bn(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.narrow(self.spatial(self.widen(x)))
        return y


class PreActivation(nn.Module):
    """BatchNormalization before the convolution, and a skip connection around both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.mix = conv_bn(channels, channels, 1)
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.spatial(relu(self.mix(self.norm(x))))
        return y


class Branches(nn.Module):
    """Parallel 1x1 convolutions, concatenated, then mixed by another."""

    def __init__(self, channels: int, width: int, count: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(channels, width, 1) for _ in range(count))
        self.mix = conv_bn(count * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mix(cat([branch(x) for branch in self.branches], dim=1))
        return y


class Digits(nn.Module):
    """Images (N, 1, 8, 8) float32 in [0, 1] to logits (N, 10) float32."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(conv_bn(1, 32, 3, padding=1), nn.ReLU()),
            *(Parallel(32, 32), nn.ReLU()),
            *(Chain(32, 64), nn.ReLU()),
            *(Parallel(32, 48, stride=2), nn.ReLU()),
            PreActivation(48),
            *(Branches(48, 32, count=3), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 10))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image))
        return logits
