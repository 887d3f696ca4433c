"""Every reference architecture through the twin and back: equal numbers, gradients everywhere, weights that return."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from onnxcompress import models
from onnxcompress.model_io import load, to_proto
from onnxcompress.models import convnext, deit, densenet, mobilenetv2, repvgg, resnet, vgg
from onnxcompress.testing import relative_error, run
from onnxcompress.train.export import export_module
from onnxcompress.train.torch_graph import TorchGraph

# Small forms, and max|d| / max|y| measured against onnxruntime; the limit is 1e-5.
NETWORKS = {
    "resnet-basic": (lambda: resnet.resnet20(channels=1, widths=(4, 8, 16)), (3, 1, 16, 16), 2e-6),
    "resnet-imagenet": (lambda: resnet.resnet18(classes=10, widths=(4, 8, 8, 16)), (2, 3, 64, 64), 2e-6),
    "resnet-bottleneck": (lambda: resnet.resnet50(classes=10, widths=(4, 4, 8, 8)), (2, 3, 64, 64), 5e-6),
    "densenet": (lambda: densenet.densenet_mini(depths=(2, 2), growth=4, stem_width=8), (2, 1, 12, 12), 2e-6),
    "mobilenetv2": (mobilenetv2.mobilenetv2_mini, (2, 1, 28, 28), 5e-6),
    "convnext": (lambda: convnext.convnext_mini(depths=(1, 1), widths=(8, 16)), (2, 1, 16, 16), 2e-6),
    "deit": (lambda: deit.deit_mini(dim=16, depth=2, heads=2), (2, 1, 28, 28), 2e-6),
    "repvgg": (lambda: repvgg.repvgg_mini(widths=(4, 4, 8, 8)), (2, 1, 16, 16), 2e-6),
    "vgg": (
        lambda: vgg.vgg11_bn(classes=10, image_size=32, hidden=16, widths=(4, 4, 8, 8, 8), dropout=0.0),
        (2, 3, 32, 32),
        2e-6,
    ),
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def exported(request, tmp_path_factory):
    make, shape, limit = NETWORKS[request.param]
    torch.manual_seed(0)
    module, images = make().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    _disturb(module)
    path = tmp_path_factory.mktemp("models") / "model.onnx"
    export_module(module, images, path, input_names=["x"], output_names=["y"], dynamic_batch=True)
    return module, images, path, limit


def _disturb(module: nn.Module) -> None:
    """Running statistics and scales as training leaves them, not the zeros and ones of a new network."""
    generator = torch.Generator().manual_seed(2)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)


def test_the_twin_equals_onnxruntime_and_the_module(exported):
    module, images, path, limit = exported
    with torch.no_grad():
        found = TorchGraph(load(path))({"x": images})["y"].numpy()
        hand_written = module(images).numpy()
    assert relative_error(run(onnx.load(path), {"x": images.numpy()})[0], found) <= limit
    assert relative_error(hand_written, found) <= limit


def test_a_training_step_moves_the_twin_as_it_moves_the_module(exported):
    module, images, path, _ = exported
    twin = TorchGraph(load(path)).train()
    module.train()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    labels = torch.arange(len(images)) % 10
    for network, forward in ((module, lambda: module(images)), (twin, lambda: twin({"x": images})["y"])):
        network.zero_grad()
        torch.manual_seed(0)
        nn.functional.cross_entropy(forward(), labels).backward()
    theirs = {name: p.grad for name, p in module.named_parameters()}
    ours = dict(twin.named_parameters())
    assert all(p.grad is not None for p in ours.values())
    same = set(theirs) & set(ours)
    assert len(same) >= 0.6 * len(theirs)  # a few initializers have names of their own
    for name in same:
        a, b = theirs[name], ours[name].grad
        assert a.shape == b.shape
        scale = max(float(a.abs().max()), 1e-3)  # a bias before BatchNormalization has no gradient but rounding
        assert float((a - b).abs().max()) <= 2e-3 * scale, name  # measured 4e-4, of a sum that cancels
    for name, buffer in twin.named_buffers():
        if "running" in name:
            assert torch.allclose(buffer, module.state_dict()[name], rtol=1e-4, atol=1e-5), name
    module.load_state_dict(state)
    module.eval()


def test_round_trip(exported):
    _, images, path, limit = exported
    graph = load(path)
    twin = TorchGraph(graph)
    assert twin.write_back() == []
    before = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.01)
        expected = twin({"x": images})["y"].numpy()
    changed = twin.write_back()
    after = to_proto(graph)
    onnx.checker.check_model(after)
    assert set(changed) == {n for n, p in twin.named_parameters() if p.abs().sum() > 0}
    assert relative_error(expected, run(after, {"x": images.numpy()})[0]) <= limit
    for tensor in after.graph.initializer:
        same = np.array_equal(before[tensor.name], onnx.numpy_helper.to_array(tensor))
        assert same == (tensor.name not in changed)


def _committed() -> list[str]:
    return sorted(f.removesuffix(".onnx") for f in os.listdir(models.path("digits").parent) if f.endswith(".onnx"))


@pytest.mark.parametrize("name", _committed())
def test_the_committed_files(name):
    proto = onnx.load(models.path(name))
    twin = TorchGraph(load(proto))
    side = proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    images = np.random.default_rng(0).uniform(0, 1, (3, 1, side, side)).astype(np.float32)
    with torch.no_grad():
        found = twin({"image": torch.from_numpy(images)})["logits"].numpy()
    assert relative_error(run(proto, {"image": images})[0], found) < 1e-5  # measured 2e-7 to 2e-6
