"""The reference architectures: published sizes, and small forms of each through the exporter and onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")

from onnxcompress.models import convnext, deit, densenet, mobilenetv2, repvgg, resnet, vgg  # noqa: E402
from onnxcompress.runtime import Runtime  # noqa: E402
from onnxcompress.train.export import export_module  # noqa: E402

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


# Small forms: a factory, its settings, the image size, and operators that must be there, how often.
SMALL = {
    "resnet18": (resnet.resnet18, {"widths": (8, 8, 16, 16)}, 32, {"Conv": 20, "BatchNormalization": 20, "MaxPool": 1}),
    "resnet50": (resnet.resnet50, {"widths": (4, 4, 8, 8)}, 32, {"Conv": 53, "BatchNormalization": 53, "Add": 16}),
    "resnet20": (resnet.resnet20, {"widths": (4, 8, 8)}, 12, {"Conv": 21, "BatchNormalization": 21, "Add": 9}),
    "densenet121": (densenet.densenet121, {"growth": 4}, 32, {"BatchNormalization": 121, "Concat": 58}),
    "densenet_mini": (densenet.densenet_mini, {"depths": (2, 2), "growth": 4}, 12, {"Concat": 4, "AveragePool": 1}),
    "mobilenet_v2": (mobilenetv2.mobilenet_v2, {}, 32, {"BatchNormalization": 52, "Add": 10, "Clip": 35}),
    "mobilenetv2_mini": (mobilenetv2.mobilenetv2_mini, {}, 12, {"BatchNormalization": 25, "Add": 5, "Clip": 17}),
    "convnext_mini": (convnext.convnext_mini, {"widths": (8, 16)}, 12, {"LayerNormalization": 9, "Erf": 6}),
    "deit_mini": (deit.deit_mini, {"image_size": 12, "dim": 16}, 12, {"LayerNormalization": 13, "Softmax": 6}),
    "repvgg_mini": (repvgg.repvgg_mini, {"widths": (4, 4, 8, 8)}, 12, {"BatchNormalization": 18, "Add": 11}),
    "vgg11_bn": (vgg.vgg11_bn, {"image_size": 32, "widths": (4, 4, 8, 8, 8), "hidden": 16}, 32, {"Gemm": 3}),
    "vgg16_bn": (vgg.vgg16_bn, {"image_size": 32, "widths": (4, 4, 8, 8, 8), "hidden": 16}, 32, {"Conv": 13}),
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


def randomize(model, images):
    """Give every parameter and statistic numbers that show in the output, and make the output depend on the image."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim in (2, 4):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.2 * noise)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.5  # half of the statistics from this batch
        model.train()(images)
    return model.eval()


@pytest.fixture(scope="module")
def runtime():
    with Runtime() as own:
        yield own


@pytest.mark.parametrize("name", SMALL)
def test_exports_and_matches_torch(name, runtime, tmp_path):
    factory, settings, size, expected = SMALL[name]
    torch.manual_seed(0)
    example = torch.randn(8, 2, size, size)
    model = randomize(factory(classes=7, channels=2, **settings), example)
    path = tmp_path / "model.onnx"
    names = {"input_names": ["image"], "output_names": ["logits"]}
    export_module(model, example, path, dynamic_batch=True, runtime=runtime, **names)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    ops = [node.op_type for node in proto.graph.node]
    assert {op: ops.count(op) for op in expected} == expected
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.shape for i in session.get_inputs()] == [["batch", 2, size, size]]
    for batch in (1, 3):
        image = torch.randn(batch, 2, size, size)
        with torch.no_grad():
            wanted = model(image).numpy()
        (logits,) = session.run(["logits"], {"image": image.numpy()})
        assert logits.shape == (batch, 7)
        largest = np.abs(wanted).max()
        assert batch == 1 or np.ptp(wanted, axis=0).max() > 1e-3 * largest  # it depends on the image: 4e-3 at least
        assert np.abs(logits - wanted).max() / largest <= 3e-6  # measured 6.6e-7
