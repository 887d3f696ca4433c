"""VGG with BatchNormalization.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015. Configurations A
(11 weight layers) and D (16); BatchNormalization after each convolution came later (Ioffe & Szegedy 2015). The
classifier reads the flattened map, so the image size is fixed: 32 times the side of that map, 7 in the paper.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class VGG(nn.Module):
    """Images (N, channels, image_size, image_size) to logits (N, classes).

    Args:
        depths: 3x3 convolutions per stage; a 2x2 max pool ends each stage.
        widths: Channels per stage.
        hidden: Width of the two hidden linear layers.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        hidden: int,
        classes: int,
        channels: int,
        image_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        side, remainder = divmod(image_size, 2 ** len(depths))
        if remainder:
            raise ValueError(f"image_size {image_size} is not a multiple of {2 ** len(depths)}")
        modules: list[nn.Module] = []
        inputs = channels
        for depth, width in zip(depths, widths, strict=True):
            for _ in range(depth):
                modules += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            modules.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*modules)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            *(nn.Linear(inputs * side * side, hidden), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(hidden, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.flatten(self.features(image)))
        return logits


def vgg11_bn(
    *,
    classes: int = 1000,
    channels: int = 3,
    image_size: int = 224,
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    hidden: int = 4096,
    dropout: float = 0.5,
) -> VGG:
    return VGG(
        (1, 1, 2, 2, 2),
        widths,
        hidden=hidden,
        classes=classes,
        channels=channels,
        image_size=image_size,
        dropout=dropout,
    )


def vgg16_bn(
    *,
    classes: int = 1000,
    channels: int = 3,
    image_size: int = 224,
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    hidden: int = 4096,
    dropout: float = 0.5,
) -> VGG:
    return VGG(
        (2, 2, 3, 3, 3),
        widths,
        hidden=hidden,
        classes=classes,
        channels=channels,
        image_size=image_size,
        dropout=dropout,
    )
