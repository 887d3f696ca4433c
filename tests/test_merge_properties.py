"""Random networks of linear operators through the merging passes: whatever they do, the outputs stay the same.

Chains of convolutions, skips, parallel branches, concatenations and heads, in one to three spatial axes, with any
group, stride, dilation and asymmetric pads, are merged with a cost model to which every merge pays, and with the
default one. What the algebra does not allow must be left alone, so that the errors are those of rounding in float32.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxcompress.cost import MacsAndBytes, OperatorSpec, Price
from onnxcompress.model_io import to_proto
from onnxcompress.passes.fuse_concat_into_conv import FuseConcatIntoConv
from onnxcompress.passes.fuse_conv_chain import FuseConvChain
from onnxcompress.passes.fuse_conv_into_conv_transpose import FuseConvIntoConvTranspose
from onnxcompress.passes.fuse_conv_into_flatten_gemm import FuseConvIntoFlattenGemm
from onnxcompress.passes.fuse_conv_into_global_pool_gemm import FuseConvIntoGlobalPoolGemm
from onnxcompress.passes.fuse_parallel_convs import FuseParallelConvs
from onnxcompress.passes.fuse_sibling_convs import FuseSiblingConvs
from onnxcompress.passes.fuse_skip_into_conv import FuseSkipIntoConv
from onnxcompress.passes.replace_conv_before_pool import ReplaceConvBeforePool
from onnxcompress.rewrite import Settings
from onnxcompress.shapes import infer_shapes
from onnxcompress.testing import graph_of, inputs_for, relative_error, run

PASSES = (
    FuseConvIntoGlobalPoolGemm,
    ReplaceConvBeforePool,
    FuseConvIntoFlattenGemm,
    FuseConvIntoConvTranspose,
    FuseSkipIntoConv,
    FuseParallelConvs,
    FuseSiblingConvs,
    FuseConcatIntoConv,
    FuseConvChain,
)
LEAST = 7  # size of a dynamic axis, and more
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class AlwaysPays:
    """Counts operators, heavy ones tenfold, and no bytes: every merge has fewer."""

    def price(self, specs: Sequence[OperatorSpec]) -> Price:
        return Price(float(sum(10 if spec.op in HEAVY else 1 for spec in specs)), 0)


class Net:
    """A network under construction; ``draw`` decides its structure, ``rng`` its numbers."""

    def __init__(self, draw, rng: np.random.Generator, axes: int, dynamic: Sequence[bool]) -> None:
        self.draw, self.rng, self.axes, self.dynamic = draw, rng, axes, dynamic
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def pick(self, *options):
        return self.draw(st.sampled_from(options))

    def constant(self, values: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant(self.rng.normal(size=shape) * scale)

    def node(self, op: str, inputs: Sequence[str], **attrs) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attrs))
        return name

    def conv(self, x, *, channels=None, same_size=False, strides=None, kernel=None, pads=None, bias=None, group=None):
        """A Conv on ``x``, a triple of name, channels and spatial sizes, the least ones where they are dynamic."""
        name, inside, size = x
        channels = channels or self.draw(st.integers(1, 6))
        kernel = kernel or [self.draw(st.integers(1, 3)) for _ in size]
        dilations = [self.draw(st.integers(1, 2)) for _ in size]
        strides = strides or ([1] * self.axes if same_size else [self.pick(1, 1, 2) for _ in size])
        reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        if pads is None and same_size:
            begin = [self.draw(st.integers(0, r)) for r in reach]
            pads = begin + [r - b for r, b in zip(reach, begin, strict=True)]
        elif pads is None and self.pick(True, True, False):
            pads = [self.pick(0, 0, 1, 2) for _ in range(2 * self.axes)]
        pads = pads or [0] * (2 * self.axes)
        out = [(n + pads[i] + pads[i + self.axes] - reach[i] - 1) // strides[i] + 1 for i, n in enumerate(size)]
        assume(min(out) > 0)
        groups = [g for g in range(1, inside + 1) if inside % g == 0 and channels % g == 0]
        group = group or self.pick(1, *groups)
        scale = 1 / math.sqrt(inside // group * math.prod(kernel))
        inputs = [name, self.normal(channels, inside // group, *kernel, scale=scale)]
        if self.pick(True, False) if bias is None else bias:
            inputs.append(self.normal(channels))
        attrs = {"strides": strides, "dilations": dilations, "pads": pads, "group": group}
        return self.node("Conv", inputs, **attrs), channels, out

    def pool(self, x):
        name, channels, size = x
        kernel = [self.draw(st.integers(1, 2)) for _ in size]
        strides = [self.draw(st.integers(1, 2)) for _ in size]
        assume(all(n >= k for n, k in zip(size, kernel, strict=True)))
        out = [(n - k) // s + 1 for n, k, s in zip(size, kernel, strides, strict=True)]
        return self.node("AveragePool", [name], kernel_shape=kernel, strides=strides), channels, out

    def affine(self, x):
        """A BatchNormalization, or a constant per channel."""
        name, channels, size = x
        kind = self.pick("BatchNormalization", "Mul", "Sub")
        if kind == "BatchNormalization":
            variance = self.constant(self.rng.uniform(0.5, 2, channels))
            statistics = [self.normal(channels), self.normal(channels), self.normal(channels), variance]
            return self.node(kind, [name, *statistics]), channels, size
        return self.node(kind, [name, self.normal(channels, *[1] * self.axes)]), channels, size

    # -- blocks: each takes and gives a triple -----------------------------------------------------------------------

    def chain(self, x):
        for _ in range(self.draw(st.integers(2, 4))):
            x = self.pool(x) if self.pick(*[False] * 7, True) else self.conv(x)
        return x

    def padded_last(self, x):
        """Pads before the first Conv, or none before the later ones: what merges exactly."""
        first = self.conv(x, kernel=self.pick(None, [1] * self.axes), bias=self.pick(True, False))
        for _ in range(self.draw(st.integers(1, 2))):
            pads = self.pick(None, [0] * (2 * self.axes))
            first = self.conv(first, kernel=[1] * self.axes if pads is None else None, pads=pads)
        return first

    def skip(self, x):
        _, channels, size = x
        inner = self.conv(x, same_size=True, channels=channels)
        if self.pick(True, False, False):
            inner = self.conv(inner, same_size=True, channels=channels)
        other = self.affine(x) if self.pick(True, False) else x
        pair = [inner[0], other[0]]
        if self.pick(True, False):
            pair.reverse()
        total = self.node(self.pick("Add", "Add", "Sub", "Sum"), pair)
        if self.pick(True, False, False):
            total = self.node("Sub", [self.normal(1, channels, *[1] * self.axes), total])
        return total, channels, size

    def parallel(self, x):
        channels, strides = self.draw(st.integers(1, 6)), [self.pick(1, 1, 2) for _ in range(self.axes)]
        branches = []
        for _ in range(self.draw(st.integers(2, 3))):
            branch = x
            if self.pick(True, False, False):
                branch = self.conv(x, kernel=[1] * self.axes, strides=[1] * self.axes, pads=[0] * (2 * self.axes))
            branches.append(self.conv(branch, channels=channels, same_size=True, strides=strides))
        assume(len({tuple(branch[2]) for branch in branches}) == 1)
        if self.pick(True, False):
            return self.node("Sum", [branch[0] for branch in branches]), channels, branches[0][2]
        total = branches[0][0]
        for branch in branches[1:]:
            total = self.node(self.pick("Add", "Sub"), self.draw(st.permutations([total, branch[0]])))
        return total, channels, branches[0][2]

    def concat(self, x):
        kernel = [self.draw(st.integers(1, 3)) for _ in range(self.axes)]
        branches = [
            self.conv(x, same_size=True, kernel=self.pick(None, kernel)) for _ in range(self.draw(st.integers(1, 3)))
        ]
        if self.pick(True, False):
            branches.append(x)
        assume(len(branches) > 1)
        joined = self.node("Concat", [branch[0] for branch in self.draw(st.permutations(branches))], axis=1)
        after = joined, sum(branch[1] for branch in branches), x[2]
        return self.conv(after, group=1) if self.pick(True, True, False) else after

    def transpose(self, x):
        if self.pick(True, False):
            x = self.conv(x, kernel=[1] * self.axes, strides=[1] * self.axes, pads=[0] * (2 * self.axes))
        name, inside, size = x
        channels, kernel = self.draw(st.integers(1, 4)), [self.draw(st.integers(1, 3)) for _ in size]
        strides = [self.draw(st.integers(1, 2)) for _ in size]
        groups = [g for g in range(1, inside + 1) if inside % g == 0 and channels % g == 0]
        group = self.pick(1, *groups)
        inputs = [name, self.normal(inside, channels // group, *kernel), *([self.normal(channels)] * self.pick(0, 1))]
        made = self.node("ConvTranspose", inputs, strides=strides, group=group)
        out = [s * (n - 1) + k for n, s, k in zip(size, strides, kernel, strict=True)]
        return self.conv((made, channels, out), kernel=[1] * self.axes)

    def pooled(self, x):
        """A 1x1 Conv and a pool that may count its padding, or leave it out."""
        ones = [1] * self.axes
        name, channels, size = self.conv(x, kernel=ones, strides=self.pick(ones, None), pads=[0] * (2 * self.axes))
        pads = [self.pick(0, 1) for _ in range(2 * self.axes)]
        out = [(n + pads[i] + pads[i + self.axes] - 2) // 2 + 1 for i, n in enumerate(size)]
        assume(min(out) > 0)
        attrs = {"kernel_shape": [2] * self.axes, "strides": [2] * self.axes, "pads": pads}
        return self.node("AveragePool", [name], count_include_pad=self.pick(0, 1), **attrs), channels, out

    def head(self, x):
        """A global mean and a Gemm behind a Conv, or a Gemm of everything; gives a pair of names."""
        name, channels, size = self.conv(x, kernel=self.pick([1] * self.axes, None))
        if not any(self.dynamic) and self.pick(True, False):
            flat, features = self.node("Flatten", [name]), channels * math.prod(size)
        elif self.pick(True, False):
            flat, features = self.node("Flatten", [self.node("GlobalAveragePool", [name])]), channels
        else:
            flat = self.node("ReduceMean", [name], axes=list(range(2, self.axes + 2)), keepdims=0)
            features = channels
        if self.pick(True, False):
            return self.node("MatMul", [flat, self.normal(features, 3)])
        return self.node("Gemm", [flat, self.normal(3, features), self.normal(3)], transB=1, alpha=0.5)


@st.composite
def networks(draw) -> onnx.ModelProto:
    axes = draw(st.sampled_from([1, 2, 2, 2, 3]))
    dynamic = [draw(st.sampled_from([False, False, True])) for _ in range(axes)]
    net = Net(draw, np.random.default_rng(draw(st.integers(0, 2**32 - 1))), axes, dynamic)
    channels = draw(st.integers(1, 6))
    size = [LEAST if free else draw(st.integers(4, 9)) for free in dynamic]
    x = "x", channels, size
    blocks = (net.chain, net.padded_last, net.skip, net.parallel, net.concat, net.transpose, net.pooled)
    for _ in range(draw(st.integers(1, 3))):
        x = draw(st.sampled_from(blocks))(x)
        if draw(st.sampled_from([True, False, False])):
            x = (net.node("Relu", [x[0]]), *x[1:])
    outputs = [net.head(x) if draw(st.sampled_from([True, False, False])) else x[0]]
    if draw(st.sampled_from([True, False, False, False])):
        outputs.append(draw(st.sampled_from([node.output[0] for node in net.nodes])))
    kind = onnx.TensorProto.FLOAT
    shape = [f"S{i}" if free else n for i, (n, free) in enumerate(zip(size, dynamic, strict=True))]
    graph = helper.make_graph(
        net.nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, ["N", channels, *shape])],
        [helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(outputs)],
        net.weights,
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def merge(model: onnx.ModelProto, cost) -> tuple[onnx.ModelProto, Counter]:
    """All passes in turn until none of them rewrites."""
    graph = graph_of(model)
    done: Counter = Counter()
    for _ in range(10):
        before = sum(done.values())
        for cls in PASSES:
            done[cls.name] += cls(Settings(cost=cost)).apply(graph).rewrites
            infer_shapes(graph)
        if sum(done.values()) == before:
            return to_proto(graph), done
    raise AssertionError(f"the passes do not come to rest: {done}")


def check(model: onnx.ModelProto) -> Counter:
    seen: Counter = Counter()
    for cost in (AlwaysPays(), MacsAndBytes()):
        merged, done = merge(model, cost)
        onnx.checker.check_model(merged)
        seen += done
        for seed, sizes in (
            (0, {"S0": LEAST, "S1": LEAST + 1, "S2": LEAST}),
            (1, {"S0": LEAST + 3, "S1": LEAST, "S2": LEAST + 2}),
        ):
            feeds = inputs_for(model, seed=seed, sizes=sizes)
            for a, b in zip(run(model, feeds), run(merged, feeds), strict=True):
                assert relative_error(a, b) <= TOLERANCE, (relative_error(a, b), done)
    return seen


# The largest of 28,000 outputs of 3,500 networks was 6.2e-6, where a difference cancels; 99.9 % were below 1.3e-6. What
# the class-4 pairs among them would have erred by is 1e-2 and more.
TOLERANCE = 5e-5


@given(networks())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_merging_keeps_the_outputs(model):
    check(model)


@pytest.mark.slow
@given(networks())
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
def test_merging_keeps_the_outputs_of_many(model):
    check(model)


@pytest.mark.slow
def test_every_pass_has_something_to_do():
    seen: Counter = Counter()

    @given(networks())
    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def gather(model):
        for cost in (AlwaysPays(), MacsAndBytes()):
            seen.update(merge(model, cost)[1])

    gather()
    assert min(seen[cls.name] for cls in PASSES) >= 3, seen
