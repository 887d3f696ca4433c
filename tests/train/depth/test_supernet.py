"""Supernets and pruned graphs: equal to the original at 0, to each other at 1, one operator once merged."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from onnxcompress.errors import RecipeError
from onnxcompress.model_io import load, to_proto
from onnxcompress.models.convnext import convnext_mini
from onnxcompress.models.deit import deit_mini
from onnxcompress.models.mobilenetv2 import mobilenetv2_mini
from onnxcompress.models.resnet import BasicBlock, Bottleneck, ResNet
from onnxcompress.runtime import Runtime
from onnxcompress.testing import inputs_for, model, relative_error, run
from onnxcompress.train.depth.blocks import find_blocks, without_overlaps
from onnxcompress.train.depth.costs import FewestOperators, block_costs, merge
from onnxcompress.train.depth.kinds import Flow
from onnxcompress.train.depth.offers import with_deletions
from onnxcompress.train.depth.preparation import prepare
from onnxcompress.train.depth.supernet import build_pruned, build_supernet
from onnxcompress.train.export import export_module
from onnxcompress.train.torch_graph import TorchGraph


class GroupNormNet(nn.Module):
    """Two residual blocks with GroupNorm in place of BatchNorm, and one with InstanceNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        norms = [lambda: nn.GroupNorm(2, 8), lambda: nn.GroupNorm(8, 8), lambda: nn.InstanceNorm2d(8, affine=True)]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False), norm()
            )
            for norm in norms
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x.mean((2, 3))


NETWORKS = {
    "group norm": GroupNormNet,
    "mobilenetv2": lambda: mobilenetv2_mini(settings=((1, 8, 1, 1), (6, 8, 2, 1), (6, 12, 1, 2)), stem_width=8),
    "convnext": lambda: convnext_mini(depths=(2,), widths=(32,)),
    "deit": lambda: deit_mini(depth=2, dim=16, heads=2, image_size=16),
    "basic": lambda: ResNet(BasicBlock, (2, 1), (8, 12), classes=4, channels=1, small_images=True),
    "bottleneck": lambda: ResNet(Bottleneck, (2,), (8,), classes=4, channels=1, small_images=True),
}
SIZES = {"batch": 3}


def with_random_norms(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Statistics, scales and biases of normalizations as training might leave them: new ones change nothing."""
    rng = np.random.default_rng(0)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("BatchNormalization", "LayerNormalization"):
            for place, name in enumerate(node.input[1:]):
                shape = onnx.numpy_helper.to_array(tensors[name]).shape
                values = rng.uniform(0.5, 1.5, shape) if place in (0, 3) else rng.normal(size=shape) * 0.3
                tensors[name].CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return proto


@pytest.fixture(scope="module")
def runtime():
    with Runtime() as one:
        yield one


@pytest.fixture(scope="module")
def networks(tmp_path_factory, runtime):
    folder, made = tmp_path_factory.mktemp("networks"), {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            path = folder / f"{name}.onnx"
            export_module(NETWORKS[name](), torch.randn(1, 1, 16, 16), path, dynamic_batch=True, runtime=runtime)
            proto = with_random_norms(onnx.load(path))
            made[name] = (proto, prepare(load(proto), runtime=runtime))
        return made[name]

    return get


def outputs(graph, feeds):
    proto = to_proto(graph)
    onnx.checker.check_model(proto)
    return run(proto, feeds)


def worst(expected, actual):
    return max(relative_error(a, b) for a, b in zip(expected, actual, strict=True))


def linear_operators(graph):
    return sum(node.op in ("Conv", "Gemm", "MatMul") for node in graph.nodes)


# -- equality --------------------------------------------------------------------------------------------------------

CASES = [
    ("mobilenetv2", "basic-3x3", {}),
    ("mobilenetv2", "basic-3x3", {"inverted-residual": Flow("batchnorm", "none")}),
    ("mobilenetv2", "basic-3x3", {"inverted-residual": Flow("nothing", "relu")}),
    ("convnext", "basic-3x3", {}),
    ("convnext", "basic-3x3", {"convnext": Flow(end="own")}),
    ("convnext", "basic-3x3", {"convnext": Flow("batchnorm", "relu")}),
    ("convnext", "basic-3x3", {"convnext": Flow("nothing", "gelu")}),
    ("deit", "basic-3x3", {}),
    ("deit", "basic-3x3", {"ffn": Flow("batchnorm", "own")}),
    ("basic", "basic-3x3", {}),
    ("basic", "basic", {}),
    ("basic", "basic", {"basic": Flow("batchnorm")}),
    ("bottleneck", "basic-3x3", {}),
    ("group norm", "basic-3x3", {}),
]


@pytest.mark.parametrize(("name", "prefer", "flows"), CASES)
def test_supernet_is_the_original_at_0_and_the_pruned_graph_at_1(networks, runtime, name, prefer, flows):
    proto, graph = networks(name)
    blocks = without_overlaps(find_blocks(graph)[0], (prefer,))
    supernet = build_supernet(graph, blocks, flows=flows)
    feeds = inputs_for(proto, sizes=SIZES)
    reference = run(proto, feeds)
    assert worst(reference, outputs(supernet.graph, feeds)) <= 1e-6  # measured 0.0
    names = [block.name for block in blocks]
    pruned = build_pruned(supernet, blocks, names)
    at_one = outputs(supernet.at(dict.fromkeys(names, 1.0)), feeds)
    expected = outputs(pruned, feeds)
    assert worst(at_one, expected) <= 1e-6  # measured 0.0
    assert worst(reference, expected) > 5e-4  # it is another function: measured 1.1e-3 and more
    merged = merge(pruned, runtime=runtime)
    assert worst(expected, outputs(merged, feeds)) <= 1e-5  # measured 2.3e-7
    forced = merge(pruned, cost=FewestOperators(), runtime=runtime)
    assert worst(expected, outputs(forced, feeds)) <= 1e-5  # measured 4.0e-7


@pytest.mark.parametrize("name", ["mobilenetv2", "convnext", "deit", "basic"])
def test_some_blocks_of_a_supernet(networks, name):
    proto, graph = networks(name)
    blocks = without_overlaps(find_blocks(graph)[0], ("basic",))
    supernet = build_supernet(graph, blocks)
    feeds = inputs_for(proto, seed=3, sizes=SIZES)
    for chosen in ([blocks[0].name], [blocks[-1].name], [block.name for block in blocks[::2]]):
        pruned = build_pruned(supernet, blocks, chosen)
        assert worst(outputs(supernet.at(dict.fromkeys(chosen, 1.0)), feeds), outputs(pruned, feeds)) <= 1e-6
    assert worst(run(proto, feeds), outputs(build_pruned(graph, blocks, []), feeds)) == 0.0


@pytest.mark.parametrize("name", ["mobilenetv2", "convnext", "deit", "basic"])
def test_merge_and_deletion_compete_for_a_place(networks, name):
    proto, graph = networks(name)
    blocks = with_deletions(without_overlaps(find_blocks(graph)[0]))
    rivals = [block for block in blocks if block.name.endswith("/delete")]
    merges = [block for block in blocks if block not in rivals]
    assert rivals and all(block.kind == "residual" for block in rivals)
    supernet = build_supernet(graph, blocks)
    feeds = inputs_for(proto, seed=3, sizes=SIZES)
    assert worst(run(proto, feeds), outputs(supernet.graph, feeds)) <= 1e-6  # measured 0.0
    first = rivals[0]
    for chosen in ([rivals[-1]], rivals, [first, *(block for block in merges if block.add != first.add)]):
        names = [block.name for block in chosen]
        at_one = outputs(supernet.at(dict.fromkeys(names, 1.0)), feeds)
        assert worst(at_one, outputs(build_pruned(supernet, blocks, names), feeds)) <= 1e-6  # measured 3e-7
    both = [first.name, next(block.name for block in merges if block.add == first.add)]
    with pytest.raises(RecipeError, match="share node"):
        build_pruned(supernet, blocks, both)


def test_the_original_is_left_alone(networks):
    _, graph = networks("mobilenetv2")
    before = to_proto(graph).SerializeToString()
    blocks, _ = find_blocks(graph)
    build_pruned(build_supernet(graph, blocks), blocks, [block.name for block in blocks])
    assert to_proto(graph).SerializeToString() == before


def test_padding_does_not_move_into_the_mean_of_a_group_norm(networks):
    blocks, refused = find_blocks(networks("group norm")[1])
    assert [block.kind for block in blocks] == ["basic-3x3"] * 3
    assert len(refused) == 3 and all("into its mean" in refusal.reason for refusal in refused)


# -- one operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefer", "cost", "operators"),
    [
        ("mobilenetv2", "basic", None, ["Conv", "Relu"]),
        ("convnext", "basic", None, ["Conv", "Conv", "Add"]),
        ("deit", "basic", None, ["MatMul", "Add"]),
        ("basic", "basic", FewestOperators(), ["Conv"]),  # ReLU follows and is no part of it
        ("basic", "basic-3x3", None, ["Conv"]),
        ("bottleneck", "basic", FewestOperators(), ["Conv"]),
        ("group norm", "basic-3x3", None, ["Conv"]),
    ],
)
def test_every_block_becomes_one_operator(networks, runtime, name, prefer, cost, operators):
    _, graph = networks(name)
    blocks = [b for b in without_overlaps(find_blocks(graph)[0], (prefer,)) if b.kind != "residual"]
    assert len(blocks) > 1
    for block in blocks:
        result = block_costs(graph, block, runtime=runtime, cost=cost, budget_s=0.02)
        assert list(result.operators) == operators, block
        assert result.linear[0] > result.linear[1] == sum(op in ("Conv", "MatMul") for op in operators)
        assert result.latency is not None


def test_capped_block_is_a_3x3_of_half_the_macs(networks):
    _, graph = networks("basic")
    block = next(b for b in find_blocks(graph)[0] if b.kind == "basic-3x3" and not b.shortcut)
    result = block_costs(graph, block)
    assert result.macs[1] * 2 == result.macs[0] and result.latency is None


def test_neighbouring_ffns_become_one_matrix(networks, runtime):
    _, graph = networks("deit")
    blocks, _ = find_blocks(graph)
    pruned = build_pruned(graph, blocks, [block.name for block in blocks])  # attention deleted: nothing between
    assert Counter(node.op for node in merge(pruned, runtime=runtime).nodes)["MatMul"] == 1


@pytest.mark.parametrize(("end", "operator"), [("own", "Clip"), ("relu", "Relu")])
def test_run_ends_in_the_activation_that_is_wanted(networks, runtime, end, operator):
    _, graph = networks("mobilenetv2")
    (block,) = [b for b in find_blocks(graph)[0] if b.kind == "run"]
    cost = block_costs(graph, block, runtime=runtime, budget_s=0.02, flows={"run": Flow(end=end)})
    assert list(cost.operators) == ["Conv", operator]


def test_convnext_block_may_end_in_its_own_activation(networks, runtime):
    _, graph = networks("convnext")
    block = next(b for b in find_blocks(graph)[0] if b.kind == "convnext")
    cost = block_costs(graph, block, runtime=runtime, flows={"convnext": Flow(end="own")})
    assert list(cost.operators) == ["Conv", "Conv", "Add", "Div", "Erf", "Add", "Mul", "Mul"]


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenetv2", "convnext", "deit", "basic"])
def test_numbers_of_a_trained_supernet_go_into_the_pruned_graph(networks, runtime, name):
    torch.set_num_threads(1)
    proto, graph = networks(name)
    blocks = without_overlaps(find_blocks(graph)[0])
    supernet = build_supernet(graph, blocks)
    twin = TorchGraph(supernet.graph)
    own = {key for key, _ in twin.named_parameters()} - {key for key, _ in TorchGraph(graph).named_parameters()}
    assert all(".norm" in key for key in own)  # the new BatchNormalization alone: no lambda, no mask
    level = torch.zeros(())
    for lambda_name in supernet.lambdas.values():
        twin.edit(lambda_name, lambda _: level)
    feeds = inputs_for(proto, sizes={"batch": 4})
    torch_feeds = {key: torch.from_numpy(value) for key, value in feeds.items()}
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-2)
    twin.train()
    for value in (0.0, 0.5, 1.0):
        level.fill_(value)
        optimizer.zero_grad()
        twin(torch_feeds)["output"].square().mean().backward()
        optimizer.step()
    twin.eval()
    with torch.no_grad():
        expected = [twin(torch_feeds)["output"].numpy()]
    pruned = build_pruned(supernet, blocks, [block.name for block in blocks])
    written = twin.write_back(pruned)
    assert not own or own & set(written)
    assert worst(expected, outputs(pruned, feeds)) <= 2e-6  # measured 3.0e-7
    assert worst(outputs(pruned, feeds), outputs(merge(pruned, runtime=runtime), feeds)) <= 1e-5  # measured 4.0e-7


# -- deletion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenetv2", "convnext", "deit", "bottleneck"])
def test_deleted_blocks_are_gone(networks, runtime, name):
    proto, graph = networks(name)
    blocks, _ = find_blocks(graph)
    gone = [block for block in blocks if block.deletable]
    pruned = build_pruned(graph, blocks, [], deleted=[block.name for block in gone])
    left = {node.name for node in pruned.nodes}
    assert not left & {node for block in gone for node in block.nodes}
    feeds = inputs_for(proto, sizes=SIZES)
    merged = merge(pruned, runtime=runtime)
    assert worst(outputs(pruned, feeds), outputs(merged, feeds)) <= 1e-5
    assert linear_operators(pruned) < linear_operators(graph)


def test_block_at_the_output_is_deleted_under_its_name():
    text = "g (float[N,4] x) => (float[N,4] y) { h = Gemm(x, W1) a = Relu(h) p = Gemm(a, W2) y = Add(x, p) }"
    rng = np.random.default_rng(0)
    proto = model(text, W1=rng.normal(size=(4, 8)).astype(np.float32), W2=rng.normal(size=(8, 4)).astype(np.float32))
    graph = prepare(load(proto))
    blocks, _ = find_blocks(graph)
    feeds = inputs_for(proto)
    assert worst([feeds["x"]], outputs(build_pruned(graph, blocks, [], deleted=[blocks[0].name]), feeds)) == 0.0


def test_residual_supernet_fades_the_branch(networks):
    proto, graph = networks("deit")
    blocks = [block for block in find_blocks(graph)[0] if block.kind == "residual"]
    assert len(blocks) == 2
    supernet = build_supernet(graph, blocks)
    feeds = inputs_for(proto, sizes=SIZES)
    names = [block.name for block in blocks]
    at_one = outputs(supernet.at(dict.fromkeys(names, 1.0)), feeds)
    assert worst(at_one, outputs(build_pruned(graph, blocks, [], deleted=names), feeds)) <= 1e-6


# -- refusals --------------------------------------------------------------------------------------------------------


def test_block_that_changes_shape_is_not_deleted(networks):
    _, graph = networks("basic")
    block = next(b for b in find_blocks(graph)[0] if b.shortcut)
    with pytest.raises(RecipeError, match="cannot be deleted"):
        build_pruned(graph, [block], [], deleted=[block.name])


def test_two_forms_of_one_place_are_refused(networks):
    _, graph = networks("basic")
    blocks, _ = find_blocks(graph)
    with pytest.raises(RecipeError, match="share node"):
        build_supernet(graph, blocks)


def test_unknown_block_is_refused(networks):
    _, graph = networks("basic")
    with pytest.raises(RecipeError, match="there is no block 'x'"):
        build_pruned(graph, find_blocks(graph)[0], ["x"])


def test_block_of_another_graph_is_refused(networks):
    _, graph = networks("basic")
    _, other = networks("convnext")
    with pytest.raises(RecipeError, match="is not in this graph"):
        build_pruned(graph, find_blocks(other)[0], [find_blocks(other)[0][0].name])


def test_activation_with_inner_channels_cannot_stand_at_the_end():
    text = """g (float[N,2,4,4] x) => (float[N,2,a,b] y) {
        h = Conv(x, W1) a = PRelu(h, slope) p = Conv(a, W2) y = Add(x, p) }"""
    rng = np.random.default_rng(0)
    shapes = {"W1": (6, 2, 1, 1), "slope": (6, 1, 1), "W2": (2, 6, 1, 1)}
    proto = model(text, **{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
    graph = prepare(load(proto))
    blocks, _ = find_blocks(graph)
    assert [block.kind for block in blocks] == ["ffn"]
    with pytest.raises(RecipeError, match='use end = "relu"'):
        build_supernet(graph, blocks, flows={"ffn": Flow(end="own")})
    build_supernet(graph, blocks)  # none at the end by default
