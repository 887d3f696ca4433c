"""The reference architectures: published sizes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from onnxcompress.models import convnext, deit, densenet, mobilenetv2, repvgg, resnet, vgg  # noqa: E402

# Learnable parameters of the ImageNet forms as published by the authors or torchvision and timm.
PUBLISHED = {
    resnet.resnet18: 11_689_512,
    resnet.resnet34: 21_797_672,
    resnet.resnet50: 25_557_032,
    densenet.densenet121: 7_978_856,
    mobilenetv2.mobilenet_v2: 3_504_872,
    convnext.convnext_tiny: 28_589_128,
    deit.deit_tiny: 5_717_416,
    deit.deit_small: 22_050_664,
    vgg.vgg11_bn: 132_868_840,
    vgg.vgg16_bn: 138_365_992,
    repvgg.repvgg_a0: 9_108_968,
}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("factory", PUBLISHED, ids=lambda factory: factory.__name__)
def test_parameter_count_is_the_published_one(factory):
    with torch.device("meta"):
        assert parameters(factory()) == PUBLISHED[factory]


def test_merged_repvgg_a0_has_the_published_size():
    """8.30M in table 3 of the paper: each block as one 3x3 convolution with bias."""
    with torch.device("meta"):
        model = repvgg.repvgg_a0()
    merged = sum(block.large[0].weight.numel() + block.large[0].out_channels for block in model.blocks)
    assert merged + parameters(model.linear) == 8_309_384


@pytest.mark.parametrize(("factory", "millions"), [(resnet.resnet20, 0.27), (resnet.resnet56, 0.85)])
def test_cifar_resnets_have_the_published_size(factory, millions):
    """0.27M and 0.85M in table 6 of the paper, whose shortcuts have no weights: at most 2,752 more here."""
    model = factory()
    shortcuts = sum(parameters(m.downsample) for m in model.modules() if getattr(m, "downsample", None) is not None)
    assert shortcuts == 2_752
    assert round((parameters(model) - shortcuts) / 1e6, 2) == millions


@pytest.mark.parametrize("settings", [{"dim": 24, "heads": 5}, {"image_size": 27}])
def test_deit_refuses_sizes_that_do_not_divide(settings):
    with pytest.raises(ValueError, match="is not a multiple of"):
        deit.deit_mini(**settings)


def test_vgg_refuses_a_size_that_does_not_halve():
    with pytest.raises(ValueError, match="image_size 33 is not a multiple of 32"):
        vgg.vgg11_bn(image_size=33)
