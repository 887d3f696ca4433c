"""Channel groups by operator: what goes together, what goes with it, what stays and why; both models agree."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx
import pytest

from onnxcompress.channels.groups import Channels, MacsModel, find_channels
from onnxcompress.channels.removing import remove_and_zero, remove_channels
from onnxcompress.cost import count
from onnxcompress.testing import DEFAULT_OPSET, assert_equivalent, graph_of, model, relative_error, run

RNG = np.random.default_rng(3)
X = "float[N,3,6,6] x"
Y = "float[N,?,?,?] y"


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Float weights; names that start with v are variances, so positive."""
    found = {}
    for name, shape in shapes.items():
        values = RNG.normal(size=shape).astype(np.float32)
        found[name] = np.abs(values) + 0.5 if name.startswith("v") else values
    return found


def channels_of(proto: onnx.ModelProto) -> Channels:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return find_channels(graph_of(copy))


def free(proto: onnx.ModelProto) -> dict[str, int]:
    """Size by name of the groups that can be pruned."""
    return {group.name: group.size for group in channels_of(proto).groups if not group.frozen}


def reasons(proto: onnx.ModelProto) -> str:
    return " | ".join(group.frozen for group in channels_of(proto).groups if group.frozen)


def check(proto: onnx.ModelProto, sizes: Mapping[str, int] | None = None) -> list[str]:
    """Prune a part of each free group alone, then of all; compare with the zeroed model. Operators of the last one.

    Where no group is approximate, zeros in what makes the channels alone must give the same.
    """
    found = channels_of(proto)
    rng = np.random.default_rng(0)
    each = {
        g.name: sorted(rng.choice(g.size, max(1, g.size // 3), replace=False).tolist())
        for g in found.groups
        if not g.frozen and g.size > 1
    }
    assert each
    pruned = proto
    for removed in [*({name: indices} for name, indices in each.items()), each]:
        pruned, zeroed = remove_and_zero(proto, removed)
        onnx.checker.check_model(pruned, full_check=True)
        assert_equivalent(zeroed, pruned, rel=2e-6, sizes=sizes)  # measured 4.4e-7: sums in another order
        if not any(found.by_name[name].approximate for name in removed):
            _, zeroed = remove_and_zero(proto, removed, makers_alone=True)
            assert_equivalent(zeroed, pruned, rel=2e-6, sizes=sizes)
        expected = MacsModel(found).macs(removed)
        assert count(graph_of(pruned)).macs == pytest.approx(expected, rel=1e-9)
        assert count(graph_of(pruned)).macs < count(graph_of(proto)).macs
    # The channels mattered: the zeroed model is another one.
    sample = {
        v.name: RNG.normal(size=[d.dim_value or 2 for d in v.type.tensor_type.shape.dim]) for v in proto.graph.input
    }
    feeds = {name: value.astype(np.float32) for name, value in sample.items()}
    if all(v.type.tensor_type.elem_type == 1 for v in proto.graph.input):
        assert max(relative_error(a, b) for a, b in zip(run(proto, feeds), run(pruned, feeds), strict=True)) > 1e-3
    return [node.op_type for node in pruned.graph.node]


CONV = "Conv<pads=[1,1,1,1]>"

# name: nodes, weights, sizes of the free groups in order
CHAINS: dict[str, tuple[str, dict[str, tuple[int, ...]], list[int]]] = {
    "conv": (
        "a = Conv(x, w1, b1) r = Relu(a) y = Conv(r, w2)",
        {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (4, 8, 1, 1)},
        [8],
    ),
    "batchnorm": (
        "a = Conv(x, w1) n = BatchNormalization(a, s, b, m, v) r = Relu(n) y = Conv(r, w2)",
        {"w1": (8, 3, 3, 3), "s": (8,), "b": (8,), "m": (8,), "v": (8,), "w2": (4, 8, 3, 3)},
        [8],
    ),
    "residual": (
        f"a = Conv(x, w1) r = Relu(a) c = {CONV}(r, w2, b2) d = Relu(c) e = {CONV}(d, w3)"
        " s = Add(e, r) y = Conv(s, w4)",
        {"w1": (6, 3, 1, 1), "w2": (9, 6, 3, 3), "b2": (9,), "w3": (6, 9, 3, 3), "w4": (4, 6, 1, 1)},
        [6, 9],
    ),
    "depthwise": (
        "a = Conv(x, w1) d = Conv<group=12, pads=[1,1,1,1]>(a, w2, b2) s = Sigmoid(d) m = Mul(s, d) y = Conv(m, w3)",
        {"w1": (12, 3, 1, 1), "w2": (12, 1, 3, 3), "b2": (12,), "w3": (4, 12, 1, 1)},
        [12],
    ),
    "depthwise multiplier": (
        "a = Conv(x, w1) d = Conv<group=6>(a, w2) y = Conv(d, w3)",
        {"w1": (6, 3, 1, 1), "w2": (12, 1, 3, 3), "w3": (4, 12, 1, 1)},
        [6],
    ),
    "whole groups": (
        "a = Conv(x, w1) d = Conv<group=4>(a, w2) y = Conv(d, w3)",
        {"w1": (12, 3, 1, 1), "w2": (8, 3, 3, 3), "w3": (4, 8, 1, 1)},
        [4],
    ),
    "positions of groups": (
        "a = Conv(x, w1) d = Conv<group=2>(a, w2, b2) y = Conv(d, w3)",
        {"w1": (12, 3, 1, 1), "w2": (8, 6, 3, 3), "b2": (8,), "w3": (4, 8, 1, 1)},
        [6, 4],
    ),
    "conv transpose": (
        "a = Conv(x, w1) t = ConvTranspose<strides=[2,2]>(a, w2, b2) y = Conv(t, w3)",
        {"w1": (8, 3, 1, 1), "w2": (8, 6, 2, 2), "b2": (6,), "w3": (4, 6, 1, 1)},
        [8, 6],
    ),
    "conv transpose, whole groups": (
        "a = Conv(x, w1) t = ConvTranspose<group=4>(a, w2) y = Conv(t, w3)",
        {"w1": (8, 3, 1, 1), "w2": (8, 2, 2, 2), "w3": (4, 8, 1, 1)},
        [4],
    ),
    "conv transpose, positions": (
        "a = Conv(x, w1) t = ConvTranspose<group=2>(a, w2) y = Conv(t, w3)",
        {"w1": (8, 3, 1, 1), "w2": (8, 5, 2, 2), "w3": (4, 10, 1, 1)},
        [4, 5],
    ),
    "concat": (
        "a = Conv(x, w1) b = Conv(x, w2) c = Concat<axis=1>(a, x, b) y = Conv(c, w3)",
        {"w1": (5, 3, 1, 1), "w2": (7, 3, 1, 1), "w3": (4, 15, 1, 1)},
        [5, 7],
    ),
    "split": (
        "a = Conv(x, w1) b, c = Split<axis=1>(a, sizes) d = Relu(b) e = Conv(c, w2)"
        " f = Concat<axis=1>(d, e) y = Conv(f, w3)",
        {"w1": (10, 3, 1, 1), "w2": (4, 6, 1, 1), "w3": (4, 8, 1, 1)},
        [4, 6, 4],
    ),
    "split and residual": (
        "a = Conv(x, w1) b, c = Split<axis=1>(a) e = Conv(c, w2) s = Add(e, b) y = Conv(s, w3)",
        {"w1": (12, 3, 1, 1), "w2": (6, 6, 1, 1), "w3": (4, 6, 1, 1)},
        [6, 6],
    ),
    "slice": (
        "a = Conv(x, w1) b = Slice(a, start, end, axes) r = Relu(b) y = Conv(r, w2)",
        {"w1": (12, 3, 1, 1), "w2": (4, 7, 1, 1)},
        [5, 7],  # those that nothing reads are a group too
    ),
    "squeeze and excite": (
        "a = Conv(x, w1) p = GlobalAveragePool(a) q = Conv(p, w2, b2) r = Relu(q) u = Conv(r, w3, b3) s = Sigmoid(u)"
        " m = Mul(a, s) y = Conv(m, w4)",
        {"w1": (8, 3, 1, 1), "w2": (6, 8, 1, 1), "b2": (6,), "w3": (8, 6, 1, 1), "b3": (8,), "w4": (4, 8, 1, 1)},
        [8, 6],
    ),
    "hard swish of parts": (
        "a = Conv(x, w1) p = Add(a, three) q = Clip(p, zero, six) r = Mul(a, q) t = Div(r, six)"
        " y = Conv<pads=[1,1,1,1]>(t, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 3, 3)},
        [8],
    ),
    "a scalar that is added": (
        "a = Conv(x, w1) p = Mul(a, six) q = Add(p, three) y = Conv<pads=[1,1,1,1]>(q, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 3, 3)},
        [8],
    ),
    "constants per channel": (
        "a = Conv(x, w1) p = Mul(a, s) q = Sub(o, p) r = PRelu(q, slope) y = Conv(r, w2)",
        {"w1": (8, 3, 1, 1), "s": (8, 1, 1), "o": (1, 8, 1, 1), "slope": (8, 1, 1), "w2": (4, 8, 1, 1)},
        [8],
    ),
    "instance norm": (
        "a = Conv(x, w1) n = InstanceNormalization(a, s, b) y = Conv(n, w2)",
        {"w1": (8, 3, 1, 1), "s": (8,), "b": (8,), "w2": (4, 8, 1, 1)},
        [8],
    ),
    "pools": (
        "a = Conv(x, w1) m = MaxPool<kernel_shape=[2,2]>(a) n = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1]>(m)"
        " y = Conv(n, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
        [8],
    ),
    "pad and resize": (
        "a = Conv(x, w1) p = Pad(a, pads) u = Resize(p, , scales) y = Conv(u, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
        [8],
    ),
    "depth to space": (
        "a = Conv(x, w1) d = DepthToSpace<blocksize=2>(a) y = Conv(d, w2)",
        {"w1": (12, 3, 1, 1), "w2": (4, 3, 1, 1)},
        [3],
    ),
    "depth to space, column row": (
        'a = Conv(x, w1) d = DepthToSpace<blocksize=2, mode="CRD">(a) y = Conv(d, w2)',
        {"w1": (12, 3, 1, 1), "w2": (4, 3, 1, 1)},
        [3],
    ),
    "space to depth": (
        "a = Conv(x, w1) d = SpaceToDepth<blocksize=2>(a) y = Conv(d, w2)",
        {"w1": (6, 3, 1, 1), "w2": (4, 24, 1, 1)},
        [6],
    ),
    "channel shuffle": (
        "a = Conv(x, w1) b = Reshape(a, five) c = Transpose<perm=[0,2,1,3,4]>(b) d = Reshape(c, four) y = Conv(d, w2)",
        {"w1": (12, 3, 1, 1), "w2": (4, 12, 1, 1)},
        [3, 4],
    ),
    "sum over channels": (
        "a = Conv(x, w1) n = Mul(a, a) s = ReduceSum(n, axes) y = Conv(s, w2)",
        {"w1": (6, 3, 1, 1), "w2": (4, 1, 1, 1)},
        [6],
    ),
    "gather": (
        "a = Conv(x, w1) g = Gather<axis=1>(a, picks) y = Conv(g, w2)",
        {"w1": (6, 3, 1, 1), "w2": (4, 4, 1, 1)},
        [3, 3],
    ),
}
NUMBERS = {
    "sizes": np.array([4, 6]),
    "start": np.array([3]),
    "end": np.array([10]),
    "axes": np.array([1]),
    "zero": np.array(0, np.float32),
    "three": np.array(3, np.float32),
    "six": np.array(6, np.float32),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "five": np.array([0, 3, 4, 6, 6]),
    "four": np.array([0, 12, 6, 6]),
    "picks": np.array([1, 4, -1, 1]),
}


def chain(
    text: str, shapes: Mapping[str, tuple[int, ...]], opset: int = DEFAULT_OPSET, **more: np.ndarray
) -> onnx.ModelProto:
    """A model whose text names weights and numbers."""
    numbers = {
        name: value for name, value in NUMBERS.items() if any(f"{p}{name}{q}" in text for p in " (" for q in ",)")
    }
    made = {**numbers, **weights(**shapes), **more}
    if opset > DEFAULT_OPSET:  # which takes axes of ReduceMean and ReduceMax as inputs
        text = re.sub(r"(Reduce(?:Mean|Max))<axes=\[1\]>\((\w+)\)", r"\1(\2, axes)", text)
        made |= {"axes": NUMBERS["axes"]} if "axes" in text else {}
    return model(f"g ({X}) => ({Y}) {{ {text} }}", opset=opset, **made)


@pytest.mark.parametrize("name", CHAINS)
def test_channels_go_with_what_belongs_to_them(name):
    text, shapes, sizes = CHAINS[name]
    proto = chain(text, shapes)
    assert list(free(proto).values()) == sizes
    check(proto)


def test_removed_channels_leave_every_weight_and_attribute_in_step():
    text, shapes, _ = CHAINS["whole groups"]
    proto = chain(text, shapes)
    ((name, _),) = free(proto).items()
    pruned, _ = remove_and_zero(proto, {name: [1]})
    dims = {tensor.name: list(tensor.dims) for tensor in pruned.graph.initializer}
    assert dims == {"w1": [9, 3, 1, 1], "w2": [6, 3, 3, 3], "w3": [4, 6, 1, 1]}
    assert onnx.helper.get_attribute_value(pruned.graph.node[1].attribute[0]) == 3


HEADS = {
    "flatten": "a = Conv(x, w1) r = Relu(a) f = Flatten(r) y = Gemm<transB=1>(f, w2, b2)",
    "reshape": "a = Conv(x, w1) r = Relu(a) f = Reshape(r, target) y = Gemm<transB=1>(f, w2, b2)",
    "pool, squeeze": "a = Conv(x, w1) r = Relu(a) p = GlobalAveragePool(r) s = Squeeze(p, spatial)"
    " y = Gemm<transB=1>(s, w3, b2)",
    "reduce": "a = Conv(x, w1) r = Relu(a) p = ReduceMean<axes=[2,3], keepdims=0>(r) y = Gemm<transB=1>(p, w3, b2)",
    "matmul": "a = Conv(x, w1) p = ReduceMean<axes=[2,3], keepdims=0>(a) t = MatMul(p, w4) u = Add(t, b2)"
    " v = Relu(u) y = MatMul(v, w5)",
}


@pytest.mark.parametrize("name", HEADS)
def test_channels_reach_a_head(name):
    shapes = {"w1": (6, 3, 3, 3), "w2": (5, 96), "b2": (5,), "w3": (5, 6), "w4": (6, 5), "w5": (5, 2)}
    numbers = {"target": np.array([-1, 96]), "spatial": np.array([2, 3])}
    proto = model(f"g ({X}) => (float[N,?] y) {{ {HEADS[name]} }}", **numbers, **weights(**shapes))
    used = {i for node in proto.graph.node for i in node.input}
    for tensor in [t for t in proto.graph.initializer if t.name not in used]:
        proto.graph.initializer.remove(tensor)
    assert next(iter(free(proto).values())) == 6
    check(proto)


FUSED = """
  q0 = MatMul(x, wqkv) q1 = Add(q0, bqkv) r = Reshape(q1, to_heads) t = Transpose<perm=[2,0,3,1,4]>(r)
  s0, s1, s2 = Split<axis=0>(t) q = Squeeze(s0, zero) k = Squeeze(s1, zero) v = Squeeze(s2, zero)
  kt = Transpose<perm=[0,1,3,2]>(k) a0 = MatMul(q, kt) a1 = Mul(a0, scale) a = Softmax<axis=-1>(a1)
  o0 = MatMul(a, v) o1 = Transpose<perm=[0,2,1,3]>(o0) o = Reshape(o1, to_flat) y = MatMul(o, wo)
"""
APART = """
  q0 = MatMul(x, wq) q1 = Add(q0, bq) q2 = Reshape(q1, apart) q = Transpose<perm=[0,2,1,3]>(q2)
  k0 = MatMul(x, wk) k2 = Reshape(k0, apart) k = Transpose<perm=[0,2,3,1]>(k2)
  v0 = MatMul(x, wv) v2 = Reshape(v0, apart) v = Transpose<perm=[0,2,1,3]>(v2)
  a0 = MatMul(q, k) a1 = Div(a0, scale) a2 = Add(a1, mask) a = Softmax<axis=-1>(a2)
  o0 = MatMul(a, v) o1 = Transpose<perm=[0,2,1,3]>(o0) o = Reshape(o1, to_flat) y = MatMul(o, wo)
"""
ATTENTION = {
    "to_heads": np.array([0, 0, 3, 4, 5]),
    "apart": np.array([0, 0, 4, 5]),
    "to_flat": np.array([0, 0, 20]),
    "zero": np.array([0]),
    "scale": np.array(0.4, np.float32),
}


def attention(text: str) -> onnx.ModelProto:
    shapes = {"wqkv": (12, 60), "bqkv": (60,), "wo": (20, 12), "bq": (20,), "mask": (1, 4, 1, 1)}
    shapes |= dict.fromkeys(("wq", "wk", "wv"), (12, 20))
    known = {**ATTENTION, **weights(**shapes)}
    used = {name: value for name, value in known.items() if any(f"{p}{name}{q}" in text for p in " (" for q in ",)")}
    return model(f"g (float[N,T,12] x) => (float[N,T,?] y) {{ {text} }}", **used)


def test_heads_and_head_dim_of_fused_attention():
    proto = attention(FUSED)
    found = [(g.size, g.width) for g in channels_of(proto).groups if not g.frozen]
    assert found == [(4, 15), (5, 12)]  # heads: their q, k and v; places in a head: those of q, k and v of all heads
    check(proto)


def test_heads_and_head_dims_of_separate_attention():
    proto = attention(APART)
    found = [(g.size, g.width) for g in channels_of(proto).groups if not g.frozen]
    assert found == [(4, 5), (5, 4), (5, 4)]  # heads; places of q and k; places of v
    check(proto)


def test_computed_reshape_targets_get_the_new_sizes():
    text = """
      a = Conv(x, w1) s = Shape(a) n = Slice(s, zero, one) t = Concat<axis=0>(one, n, rest) b = Reshape(a, t)
      c = Squeeze(b, zero) d = Reshape(c, four) y = Conv(d, w2)
    """
    numbers = {"zero": np.array([0]), "one": np.array([1]), "rest": np.array([12, 36]), "four": np.array([0, 12, 6, 6])}
    proto = model(f"g ({X}) => ({Y}) {{ {text} }}", **numbers, **weights(w1=(12, 3, 1, 1), w2=(4, 12, 1, 1)))
    assert list(free(proto).values()) == [12]
    assert "Where" in check(proto)


def test_sizes_computed_from_channels_reach_only_shapes():
    text = "a = Conv(x, w1) s = Shape(a) b = Reshape(a, flat) r = Relu(b) c = Reshape(r, s) y = Conv(c, w2)"
    shapes = {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)}
    proto = model(f"g ({X}) => ({Y}) {{ {text} }}", flat=np.array([0, 8, 36]), **weights(**shapes))
    assert list(free(proto).values()) == [8]
    check(proto)


def test_embedding_columns():
    text = "e = Gather(table, ids) h = MatMul(e, w1) r = Relu(h) y = MatMul(r, w2)"
    proto = model(f"g (int64[N,T] ids) => (float[N,T,?] y) {{ {text} }}", **weights(table=(7, 6), w1=(6, 9), w2=(9, 3)))
    assert list(free(proto).values()) == [6, 9]
    check(proto)


def test_group_normalization_loses_whole_groups():
    text = "a = Conv(x, w1) n = GroupNormalization<num_groups=3>(a, s, b) y = Conv(n, w2)"
    shapes = {"w1": (12, 3, 1, 1), "s": (12,), "b": (12,), "w2": (4, 12, 1, 1)}
    proto = model(f"g ({X}) => ({Y}) {{ {text} }}", opset=21, ir_version=10, **weights(**shapes))
    assert [(g.size, g.width) for g in channels_of(proto).groups if not g.frozen] == [(3, 4)]
    check(proto)


def test_group_normalization_of_parts_loses_whole_groups():
    text = """
      a = Conv(x, w1) r = Reshape(a, groups) n = InstanceNormalization(r, gs, gb) u = Reshape(n, four)
      m = Mul(u, s) o = Add(m, b) y = Conv(o, w2)
    """
    shapes = {"w1": (12, 3, 1, 1), "gs": (3,), "gb": (3,), "s": (12, 1, 1), "b": (12, 1, 1), "w2": (4, 12, 1, 1)}
    numbers = {"groups": np.array([0, 3, -1]), "four": np.array([0, 12, 6, 6])}
    proto = model(f"g ({X}) => ({Y}) {{ {text} }}", **numbers, **weights(**shapes))
    assert [(g.size, g.width) for g in channels_of(proto).groups if not g.frozen] == [(3, 4)]
    check(proto)


def test_a_weight_that_two_nodes_read_loses_the_same_channels():
    text = "a = Conv(x, w1) b = Conv(x, w2) c = Conv(a, w3) d = Conv(b, w3) s = Mul(c, d) y = Conv(s, w4)"
    shapes = {"w1": (6, 3, 1, 1), "w2": (6, 3, 1, 1), "w3": (8, 6, 1, 1), "w4": (4, 8, 1, 1)}
    proto = chain(text, shapes)
    assert list(free(proto).values()) == [6, 8]  # a and b go together, for w3 has one shape
    check(proto)


# name: nodes, weights, sizes of the free groups, why their pruned graph is not the graph with zeros in what makes them
APPROXIMATE: dict[str, tuple[str, dict[str, tuple[int, ...]], list[int], str]] = {
    "not zero before a convolution": (
        f"a = Conv(x, w1) s = Sigmoid(a) y = {CONV}(s, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 3, 3)},
        [8],
        "Conv 'y': a channel with zeros would be 0.5 there, not 0",
    ),
    "exponent": (
        "a = Conv(x, w1) s = Exp(a) t = Mul(s, k) y = Conv(t, w2)",
        {"w1": (8, 3, 1, 1), "k": (8, 1, 1), "w2": (4, 8, 1, 1)},
        [8],
        "would be a number of its own there, not 0",
    ),
    "constant border that is not 0": (
        "a = Conv(x, w1) p = Pad(a, pads, six) y = Conv(p, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
        [8],
        "would be a number of its own there",
    ),
    "mean over channels": (
        "a = Conv(x, w1) s = ReduceMean<axes=[1]>(a) m = Mul(a, s) y = Conv(m, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
        [8],
        "ReduceMean 's': is taken over the channels that stay",
    ),
    "largest channel": (
        "a = Conv(x, w1) b = Abs(a) n = Neg(b) s = ReduceMax<axes=[1]>(n) y = Conv(s, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 1, 1, 1)},
        [8],
        "ReduceMax 's': is taken over the channels that stay",
    ),
    "sum of what is not zero": (
        "a = Conv(x, w1) e = Exp(a) s = ReduceSum(e, axes) y = Conv(s, w2)",
        {"w1": (6, 3, 1, 1), "w2": (4, 1, 1, 1)},
        [6],
        "would be 1 there, not 0",
    ),
    "layer norm": (
        "a = Conv(x, w1) t = Transpose<perm=[0,2,3,1]>(a) n = LayerNormalization<epsilon=0.1>(t, s, b)"
        " u = Transpose<perm=[0,3,1,2]>(n) y = Conv(u, w2)",
        {"w1": (8, 3, 1, 1), "s": (8,), "b": (8,), "w2": (4, 8, 1, 1)},
        [8],
        "takes mean and variance over the channels that stay",
    ),
    "layer norm of a residual stream": (
        "a = Conv(x, w1, b1) t = Transpose<perm=[0,2,3,1]>(a) n = LayerNormalization(t, s) h = MatMul(n, w2)"
        " g = Gelu(h) i = MatMul(g, w3) r = Add(t, i) m = LayerNormalization(r, s2, b2)"
        " u = Transpose<perm=[0,3,1,2]>(m) y = Conv(u, w4)",
        {
            "w1": (6, 3, 1, 1),
            "b1": (6,),
            "s": (6,),
            "w2": (6, 12),
            "w3": (12, 6),
            "s2": (6,),
            "b2": (6,),
            "w4": (4, 6, 1, 1),
        },
        [6, 12],
        "LayerNormalization 'n': takes mean and variance over the channels that stay",
    ),
    "layer norm of parts": (
        "a = Conv(x, w1) m = ReduceMean<axes=[1]>(a) d = Sub(a, m) q = Mul(d, d) v = ReduceMean<axes=[1]>(q)"
        " e = Add(v, three) r = Sqrt(e) z = Div(d, r) n = Mul(z, s) y = Conv(n, w2)",
        {"w1": (8, 3, 1, 1), "s": (8, 1, 1), "w2": (4, 8, 1, 1)},
        [8],
        "is taken over the channels that stay",
    ),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_means_are_of_the_channels_that_stay(name):
    text, shapes, sizes, why = APPROXIMATE[name]
    proto = chain(text, shapes, opset=20)
    groups = [group for group in channels_of(proto).groups if not group.frozen]
    assert [group.size for group in groups] == sizes and why in groups[0].approximate
    check(proto)
    removed = {groups[0].name: [0, 2]}
    pruned, zeroed = remove_and_zero(proto, removed, makers_alone=True)
    feeds = {"x": RNG.normal(size=(2, 3, 6, 6)).astype(np.float32)}
    assert relative_error(run(zeroed, feeds)[0], run(pruned, feeds)[0]) > 1e-5  # the approximation is one


def test_a_layer_norm_of_few_channels_is_one_of_many_that_hold_their_mean():
    text, shapes, _, _ = APPROXIMATE["layer norm"]
    numbers = weights(**shapes)
    proto = model(f"g ({X}) => ({Y}) {{ {text} }}", **numbers)
    pruned, _ = remove_and_zero(proto, {"a": [1, 5]})
    kept = [0, 2, 3, 4, 6, 7]
    x = RNG.normal(size=(2, 3, 6, 6)).astype(np.float32)
    stream = np.einsum("oi,nihw->nhwo", numbers["w1"][:, :, 0, 0], x).astype(np.float64)
    stream[..., [1, 5]] = stream[..., kept].mean(-1, keepdims=True)
    centred = stream - stream.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1) * numbers["s"] + numbers["b"]
    expected = np.einsum("oi,nhwi->nohw", numbers["w2"][:, kept, 0, 0], normal[..., kept])
    assert relative_error(expected.astype(np.float32), run(pruned, {"x": x})[0]) < 1e-6  # measured 2e-7


def test_a_root_mean_square_norm_is_that_with_zeros():
    text = """
      a = Conv(x, w1) t = Transpose<perm=[0,2,3,1]>(a) n = RMSNormalization<epsilon=0.1>(t, s)
      u = Transpose<perm=[0,3,1,2]>(n) y = Conv(u, w2)
    """
    numbers = weights(w1=(8, 3, 1, 1), s=(8,), w2=(4, 8, 1, 1))
    proto = model(f"g ({X}) => ({Y}) {{ {text} }}", opset=23, ir_version=11, **numbers)
    (group,) = [group for group in channels_of(proto).groups if not group.frozen]
    assert group.size == 8 and not group.approximate
    check(proto)


def test_a_class_token_loses_the_channels_of_the_patches():
    text = """
      p = MatMul(x, w1) s = Shape<start=0, end=1>(x) l = Concat<axis=0>(s, rest) c = Expand(token, l)
      u = Concat<axis=1>(c, p) v = Add(u, position) h = MatMul(v, w2) r = Relu(h) y = MatMul(r, w3)
    """
    numbers = weights(w1=(5, 8), token=(1, 1, 8), position=(1, 4, 8), w2=(8, 6), w3=(6, 2))
    rest = np.array([1, 8])
    proto = model(f"g (float[N,3,5] x) => (float[N,4,2] y) {{ {text} }}", rest=rest, **numbers)
    assert list(free(proto).values()) == [8, 6]
    check(proto)
    fixed = text.replace("s = Shape<start=0, end=1>(x) l = Concat<axis=0>(s, rest) c = Expand(token, l)", "")
    fixed = fixed.replace("Concat<axis=1>(c, p)", "Concat<axis=1>(token, p)")
    proto = model(f"g (float[1,3,5] x) => (float[1,4,2] y) {{ {fixed} }}", **numbers)
    assert list(free(proto).values()) == [8, 6]
    check(proto)


QUANTIZED = """
  qx = QuantizeLinear(x, sx, zx) dx = DequantizeLinear(qx, sx, zx)
  d1 = DequantizeLinear<axis=0>(w1, s1, z1) d2 = DequantizeLinear<axis=0>(b1, s2, z2) a = Conv(dx, d1, d2) r = Relu(a)
  qr = QuantizeLinear(r, sx, zx) dr = DequantizeLinear(qr, sx, zx) m = MaxPool<kernel_shape=[2,2]>(dr)
  d3 = DequantizeLinear(w2, s3, z3) c = Conv(m, d3) d4 = DequantizeLinear<axis=0>(o, s4, z4) p = Add(c, d4)
  d5 = DequantizeLinear(w3, s5, z5) y = Conv(p, d5)
"""


def test_weights_that_are_dequantized():
    def integers(*shape: int, dtype: type = np.uint8) -> np.ndarray:
        return RNG.integers(0, 120, shape).astype(dtype)

    numbers = {
        "w1": integers(8, 3, 1, 1),
        "s1": np.abs(weights(s=(8,))["s"]) / 50,
        "z1": integers(8),
        "b1": integers(8, dtype=np.int32),
        "s2": np.full(8, 0.01, np.float32),
        "z2": np.zeros(8, np.int32),
        "sx": np.float32(0.03),
        "zx": np.uint8(90),
        "w2": integers(6, 8, 1, 1),
        "s3": np.float32(0.02),
        "z3": np.uint8(55),
        "o": integers(6, 1, 1),
        "s4": np.full(6, 0.02, np.float32),
        "z4": integers(6),
        "w3": integers(4, 6, 1, 1),
        "s5": np.float32(0.02),
        "z5": np.uint8(60),
    }
    proto = model(f"g ({X}) => ({Y}) {{ {QUANTIZED} }}", **numbers)
    assert free(proto) == {"a": 8, "c": 6}
    check(proto)
    pruned, _ = remove_and_zero(proto, {"a": [0, 7], "c": [1]})
    shapes = {t.name: tuple(t.dims) for t in pruned.graph.initializer}
    assert (shapes["w1"], shapes["s1"], shapes["z1"], shapes["b1"]) == ((6, 3, 1, 1), (6,), (6,), (6,))
    assert (shapes["w2"], shapes["o"], shapes["s4"], shapes["w3"]) == ((5, 6, 1, 1), (5, 1, 1), (5,), (4, 5, 1, 1))


def test_scales_for_each_channel_of_what_is_quantized_go_along():
    text = """
      a = Conv(x, w1) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) y = Conv(d, w2)
    """
    numbers = weights(w1=(8, 3, 1, 1), w2=(4, 8, 1, 1))
    scales = {"s": np.linspace(0.01, 0.05, 8, dtype=np.float32), "z": np.arange(100, 108, dtype=np.uint8)}
    proto = model(f"g ({X}) => ({Y}) {{ {text} }}", **numbers, **scales)
    assert free(proto) == {"a": 8}
    check(proto)


# nodes, weights, a part of the reason
FROZEN: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "output": ("y = Conv(x, w1)", {"w1": (8, 3, 1, 1)}, "output 'y' of the model"),
    "not understood": (
        "a = Conv(x, w1) l = LRN<size=3>(a) y = Conv(l, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
        "LRN 'l': is not understood",
    ),
    "added to an input": (
        "a = Conv(x, w1) s = Add(a, x) y = Conv(s, w2)",
        {"w1": (3, 3, 1, 1), "w2": (4, 3, 1, 1)},
        "'x' keeps what it has on axis 1",
    ),
    "softmax": (
        "a = Conv(x, w1) s = Softmax<axis=1>(a) y = Conv(s, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
        "sums over all channels, and one that is 0 counts",
    ),
    "computed weight": (
        "a = Conv(x, w1) t = Relu(w2) y = Conv(a, t)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
        "its weight is not a constant",
    ),
    "depthwise of the input": (
        "a = Conv<group=3>(x, w1) y = Conv(a, w2)",
        {"w1": (3, 1, 3, 3), "w2": (4, 3, 1, 1)},
        "each of its groups reads channels that stay",
    ),
    "each third channel": (
        "a = Conv(x, w1) b = Slice(a, start, end, axes, step) y = Conv(b, w2)",
        {"w1": (12, 3, 1, 1), "w2": (4, 3, 1, 1)},
        "takes each 3th channel",
    ),
    "padded channels": (
        "a = Conv(x, w1) p = Pad(a, more) y = Conv(p, w2)",
        {"w1": (6, 3, 1, 1), "w2": (4, 8, 1, 1)},
        "adds channels",
    ),
    "number of channels": (
        "a = Conv(x, w1) s = Shape(a) t = Gather(s, one) c = Cast<to=1>(t) d = Div(a, c) y = Conv(d, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
        "computes with the number of channels",
    ),
    "weight read as a tensor": (
        "a = Conv(x, w1) b = Conv(a, w2) c = Mul(w2, w2) d = ReduceSum(c) y = Add(b, d)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
        "reads 'w2' too, where channels cannot be removed",
    ),
    "batch statistics": (
        "a = Conv(x, w1) n, o1, o2 = BatchNormalization<training_mode=1>(a, s, b, m, v) y = Conv(n, w2)",
        {"w1": (8, 3, 1, 1), "s": (8,), "b": (8,), "m": (8,), "v": (8,), "w2": (4, 8, 1, 1)},
        "is in training mode",
    ),
    "quantized weight that two read": (
        "d = DequantizeLinear(q, sq) e = Conv(x, w1) a = Conv(e, d) c = Conv(x, d) s = Add(a, c) y = Conv(s, w2)",
        {"sq": (), "w1": (3, 3, 1, 1), "w2": (4, 8, 1, 1)},
        "Conv 'a': its weight is not a constant",
    ),
    "logarithm": (
        "a = Conv(x, w1) s = Log(a) y = Conv(s, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
        "a removed channel might be no finite number there",
    ),
    "quotient of channels": (
        "a = Conv(x, w1) b = Conv(x, w2) s = Div(b, a) t = Relu(s) y = Conv(t, w3)",
        {"w1": (8, 3, 1, 1), "w2": (8, 3, 1, 1), "w3": (4, 8, 1, 1)},
        "a removed channel might be no finite number there",
    ),
    "layer norm over space too": (
        "a = Conv(x, w1) n = LayerNormalization<axis=1>(a, s, b) y = Conv(n, w2)",
        {"w1": (8, 3, 1, 1), "s": (8, 6, 6), "b": (8, 6, 6), "w2": (4, 8, 1, 1)},
        "averages over channels on one axis of several",
    ),
    "layer norm whose mean is read": (
        "a = Conv(x, w1) t = Transpose<perm=[0,2,3,1]>(a) n, m = LayerNormalization(t, s, b) p = Add(n, m)"
        " u = Transpose<perm=[0,3,1,2]>(p) y = Conv(u, w2)",
        {"w1": (8, 3, 1, 1), "s": (8,), "b": (8,), "w2": (4, 8, 1, 1)},
        "or its mean is read",
    ),
    "arg max": (
        "a = Conv(x, w1) m = ArgMax<axis=1>(a) c = Cast<to=1>(m) y = Conv(c, w2)",
        {"w1": (8, 3, 1, 1), "w2": (4, 1, 1, 1)},
        "its result is numbers of elements",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_near_misses_are_frozen_with_a_reason(name):
    text, shapes, reason = FROZEN[name]
    step, one = np.array([3]), np.array(1)
    more = {"step": step, "one": one, "q": np.ones((8, 3, 1, 1), np.int8), "more": np.array([0, 1, 0, 0, 0, 1, 0, 0])}
    proto = chain(
        text, shapes, **{k: v for k, v in more.items() if any(f"{p}{k}{q}" in text for p in " (" for q in ",)")}
    )
    assert reason in reasons(proto)
    first = next(iter(channels_of(proto).groups))
    with pytest.raises(ValueError, match="cannot be pruned"):
        channels_of(proto).removed_labels({first.name: [0]})


def test_a_tensor_that_a_nested_graph_reads_keeps_its_channels():
    text = """
      a = Conv(x, w1) c = Cast<to=9>(flag)
      b = If(c) <then_branch = t () => (float[N,8,6,6] p) { p = Relu(a) },
                 else_branch = e () => (float[N,8,6,6] q) { q = Neg(a) }>
      y = Conv(b, w2)
    """
    numbers = weights(w1=(8, 3, 1, 1), w2=(4, 8, 1, 1))
    proto = model(f"g ({X}, int64 flag) => ({Y}) {{ {text} }}", **numbers)
    assert "in a nested graph" in reasons(proto) and not free(proto)


def test_channels_that_cannot_be_removed_are_refused():
    text, shapes, _ = CHAINS["conv"]
    found = channels_of(chain(text, shapes))
    with pytest.raises(ValueError, match="no channel group"):
        found.removed_labels({"nothing": [0]})
    with pytest.raises(ValueError, match="has 8 channels"):
        found.removed_labels({"a": range(8)})
    with pytest.raises(ValueError, match="has 8 channels"):
        found.removed_labels({"a": [8]})
    remove_channels(found, {})
    assert found.graph.nodes[0].inputs[1].shape == (8, 3, 3, 3)
