"""BatchNormalization and constants per channel before Conv: structure, numbers, borders, near misses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.cost import Price
from onnxcompress.linear import Exactness
from onnxcompress.passes.fuse_batchnorm_into_next_conv import FuseBatchNormIntoNextConv
from onnxcompress.rewrite import Settings
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
REL = 3e-6  # measured 4.0e-7 over 2000 random layers
X = "float[N,4,6,6] x"
Y = "float[N,5,h,w] y"
BN = "a = BatchNormalization(x, s, B, m, v)"


def weights(shape=(5, 4, 3, 3), seed=0):
    rng = np.random.default_rng(seed)
    return {
        "W": rng.normal(size=shape).astype(F),
        "b": rng.normal(size=shape[0]).astype(F),
        **{name: rng.normal(size=4).astype(F) for name in "sBm"},
        "v": rng.uniform(0.1, 2, 4).astype(F),
        "k": rng.uniform(0.5, 2, (1, 4, *[1] * (len(shape) - 2))).astype(F),
        "t": rng.normal(size=(4, *[1] * (len(shape) - 2))).astype(F),
        "six": np.array([6], F),
        "zero": np.zeros((), F),
    }


class ByNodes:
    """Prices a list by its length alone: a bias map instead of a BatchNormalization and anything else pays."""

    def price(self, specs):
        return Price(sum(1.0 if spec.op == "Mul" else 0.5 for spec in specs), 0)


def fused(text, expected, *, exactness=Exactness.EXACT, opset=17, cost=None, sizes=None, **constants):
    before = model(text, opset=opset, **constants)
    rewrite_pass = FuseBatchNormIntoNextConv(Settings(cost=cost) if cost else None)
    after, result = apply(rewrite_pass, before)
    assert [done.exactness for done in result.done] == [exactness] and ops(after) == expected
    assert_equivalent(before, after, rel=REL, sizes=sizes)
    _, again = apply(rewrite_pass, after)
    assert again.rewrites == 0
    return after


@pytest.mark.parametrize("opset", [7, 9, 13, 17])
@pytest.mark.parametrize("conv", ["Conv(a, W)", "Conv(a, W, b)", "Conv<strides=[2,1], dilations=[1,2]>(a, W, b)"])
def test_batchnorm_into_unpadded_conv(conv, opset):
    fused(f"g ({X}) => ({Y}) {{ {BN} y = {conv} }}", ["Conv"], opset=opset, **weights())


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("group", [1, 2])
def test_any_rank_and_group(axes, group):
    constants = weights((6, 4 // group, *[2] * axes))
    x, y = ",".join(["5"] * axes), ",".join("hwd"[:axes])
    text = f"g (float[N,4,{x}] x) => (float[N,6,{y}] y) {{ {BN} y = Conv<group={group}>(a, W, b) }}"
    fused(text, ["Conv"], **constants)


def test_padding_that_no_window_reaches():
    text = f"g ({X}) => ({Y}) {{ {BN} y = Conv<strides=[5,5], pads=[0,0,1,1]>(a, W, b) }}"
    fused(text, ["Conv"], **weights())


@pytest.mark.parametrize("call", ["Mul(x, k)", "Mul(k, x)", "Div(x, k)", "Neg(x)", "Mul(six, x)", "Div(x, six)"])
@pytest.mark.parametrize("geometry", ["pads=[1,1,1,1]", 'auto_pad="SAME_UPPER"', "pads=[2,0,1,1], strides=[2,2]"])
def test_scale_is_exact_with_any_pads(call, geometry):
    after = fused(f"g (float[N,4,p,q] x) => ({Y}) {{ a = {call} y = Conv<{geometry}>(a, W) }}", ["Conv"], **weights())
    assert len(after.graph.node[0].input) == 2


def test_scalar_of_four_axes_before_unknown_channels():
    text = f"g (float[N,d,6,6] x) => ({Y}) {{ a = Mul(x, k) y = Conv(a, W) }}"
    fused(text, ["Conv"], sizes={"d": 4}, **{**weights(), "k": np.full((1, 1, 1, 1), 0.3, F)})


@pytest.mark.parametrize("call", ["Add(x, t)", "Sub(x, t)", "Sub(t, x)", "Add(six, x)"])
def test_shift_into_unpadded_conv(call):
    fused(f"g ({X}) => ({Y}) {{ a = {call} y = Conv(a, W) }}", ["Conv"], **weights())


def test_run_of_nodes_is_folded_at_once():
    calls = "p = Div(x, six) q = Mul(p, k) r = Sub(t, q) a = BatchNormalization(r, s, B, m, v) y = Conv(a, W)"
    fused(f"g ({X}) => ({Y}) {{ {calls} }}", ["Conv"], **weights())


def test_all_readers_take_it_in():
    text = f"g ({X}) => ({Y}, float[N,3,h2,w2] z) {{ {BN} y = Conv(a, W, b) z = Conv<dilations=[2,2]>(a, U) }}"
    after = fused(text, ["Conv", "Conv"], U=np.ones((3, 4, 1, 1), F), **weights())
    assert [node.input[0] for node in after.graph.node] == ["x", "x"]


def test_map_where_the_shift_meets_the_padding():
    text = f"g (float[N,4,5,7] x) => ({Y}) {{ {BN} y = Conv<pads=[1,0,2,1], strides=[2,1]>(a, W, b) }}"
    after = fused(text, ["Conv", "Add"], exactness=Exactness.EXACT_WITH_BIAS_MAP, cost=ByNodes(), **weights())
    assert len(after.graph.node[0].input) == 2 and after.graph.node[1].output[0] == "y"


def test_map_of_a_small_tensor_pays_by_the_estimate():
    calls = "c = Mul(x, zero) a = Add(c, t) y = Conv<pads=[1,1,1,1]>(a, W, b)"  # a scale of zero cannot go alone
    constants = {**weights(), "zero": np.array([[[0.5]], [[0]], [[1]], [[2]]], F)}
    text = f"g ({X}) => ({Y}) {{ {calls} }}"
    fused(text, ["Conv", "Add"], exactness=Exactness.EXACT_WITH_BIAS_MAP, **constants)


def test_map_for_one_of_two_readers():
    text = f"g ({X}) => ({Y}, float[N,5,h2,w2] z) {{ {BN} y = Conv<pads=[1,1,1,1]>(a, W, b) z = Conv(a, W) }}"
    after = fused(text, ["Conv", "Add", "Conv"], exactness=Exactness.EXACT_WITH_BIAS_MAP, cost=ByNodes(), **weights())
    assert {value.name for value in after.graph.output} == {"y", "z"}


@pytest.mark.parametrize("x", ["N,4,6,6", "N,4,p,q"])
def test_scale_alone_where_a_map_is_not_to_be_had(x):
    calls = "p = Div(x, six) q = Mul(k, p) a = Add(q, t) y = Conv<group=4, pads=[1,1,1,1]>(a, W)"
    constants = weights((4, 1, 3, 3))
    text = f"g (float[{x}] x) => (float[N,4,h,w] y) {{ {calls} }}"
    after = fused(text, ["Add", "Conv"], **constants)
    assert after.graph.node[0].input[0] == "x"
    _, result = apply(FuseBatchNormIntoNextConv(), model(text, **constants))
    assert "scale alone" in result.done[0].detail


def test_scale_alone_keeps_a_scalar_shift_scalar():
    calls = "q = Mul(six, x) a = Add(q, six) y = Conv<pads=[1,1,1,1]>(a, W)"
    after = fused(f"g (float[N,4,p,q] x) => ({Y}) {{ {calls} }}", ["Add", "Conv"], **weights())
    (shift,) = [t for t in after.graph.initializer if t.name == after.graph.node[0].input[1]]
    assert list(shift.dims) == []


PADDED = "Conv<pads=[1,1,1,1]>(a, W, b)"
NEAR_MISSES = {
    "model output": f"g ({X}) => ({Y}, float[N,4,6,6] a) {{ {BN} y = Conv(a, W) }}",
    "another reader": f"g ({X}) => ({Y}, float[N,4,6,6] z) {{ {BN} y = Conv(a, W) z = Relu(a) }}",
    "size unknown": f"g (float[N,4,p,q] x) => ({Y}) {{ {BN} y = {PADDED} }}",
    "map too large": f"g (float[N,4,40,40] x) => ({Y}) {{ {BN} y = {PADDED} }}",
    "scale of zero": f"g (float[N,4,p,q] x) => ({Y}) {{ c = Mul(x, zero) a = Add(c, t) y = {PADDED} }}",
    "two shifts": f"g (float[N,4,p,q] x) => ({Y}) {{ c = Add(x, six) a = Add(c, t) y = {PADDED} }}",
    "weight is an input": f"g ({X}, float[5,4,3,3] U) => ({Y}) {{ {BN} y = Conv(a, U) }}",
    "bias is an input": f"g ({X}, float[5] c) => ({Y}) {{ {BN} y = Conv(a, W, c) }}",
    "scale is an input": f"g ({X}, float[4] u) => ({Y}) {{ a = BatchNormalization(x, u, B, m, v) y = Conv(a, W) }}",
    "channels may broadcast": f"g (float[N,c,6,6] x) => ({Y}) {{ a = Mul(x, k) y = Conv(a, W) }}",
    "rank may grow": "g (float[4,4,6] x) => (float[1,5,h,w] y) { a = Mul(x, k) y = Conv(a, W) }",
    "rank may grow by a scalar": "g (float[4,6,6] x) => (float[1,5,h,w] y) { a = Mul(x, ones) y = Conv(a, W) }",
    "along width": f"g ({X}) => ({Y}) {{ a = Mul(x, wide) y = Conv(a, W) }}",
    "both inputs of one Conv": "g (float[5,5,3,3] x) => (float[5,5,h,w] y) { a = Mul(x, six) y = Conv(a, a) }",
    "one reader cannot": f"g ({X}, float[5] c) => ({Y}, float[N,5,h,w] z) {{ {BN} y = Conv(a, W) z = Conv(a, W, c) }}",
    "underflow": f"g ({X}) => ({Y}) {{ a = Mul(x, tiny) y = Conv(a, W) }}",
    "overflow": f"g ({X}) => ({Y}) {{ a = Mul(x, huge) y = Conv(a, W) }}",
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name):
    extra = {"wide": np.ones((1, 1, 1, 6), F), "tiny": np.array(1e-40, F), "huge": np.array(3e38, F)}
    extra["ones"] = np.ones((1, 1, 1, 1), F)
    before = model(NEAR_MISSES[name], **weights(), **extra)
    after, result = apply(FuseBatchNormIntoNextConv(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"c": 4, "p": 5, "q": 6})


@pytest.mark.parametrize(
    "calls",
    [
        f"{BN} r = Relu(a) y = Conv(r, W)",
        "a = Div(k, x) y = Conv(a, W)",
        "a = Mul(x, x) y = Conv(a, W)",
        f"{BN} y = Identity(a)",
        "a = Neg(W) y = Conv(x, a)",
    ],
)
def test_other_forms_are_not_the_pattern(calls):
    y = "float[N,4,6,6] y" if "Identity" in calls else Y
    before = model(f"g ({X}) => ({y}) {{ {calls} }}", **weights())
    _, result = apply(FuseBatchNormIntoNextConv(), before)
    assert result.rewrites == 0 and not result.misses


def test_reader_in_a_branch_keeps_the_node():
    branch = "g{0} () => (float[N,5,h,w] y{0}) {{ y{0} = Conv(a, W) }}"
    text = (
        f"g ({X}, bool p) => ({Y}, float[N,5,h,w] z) {{ {BN} z = Conv(a, W) "
        f"y = If (p) <then_branch={branch.format(1)}, else_branch={branch.format(2)}> }}"
    )
    before = model(text, **weights())
    after, result = apply(FuseBatchNormIntoNextConv(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after)


def test_large_shared_weight_is_not_copied():
    constants = weights()
    before = model(f"g ({X}) => ({Y}, float[N,5,h,w] z) {{ {BN} y = Conv(a, W) z = Conv(x, W) }}", **constants)
    limit = constants["W"].nbytes - 1
    _, result = apply(FuseBatchNormIntoNextConv(Settings(max_constant_bytes=limit)), before)
    assert result.rewrites == 0 and "shared" in result.misses[0].reason
    after, result = apply(FuseBatchNormIntoNextConv(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after, rel=REL)


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g ({X}) => ({Y}) {{ {BN} y = ours.Conv(a, W) }}"""
    result = FuseBatchNormIntoNextConv().apply(graph_of(model(text, **weights())))
    assert result.rewrites == 0 and not result.misses


@st.composite
def layers(draw):
    """Sizes, geometry per axis (kernel, stride, dilation, pads), group, form, seed."""
    axes = draw(st.integers(1, 2))
    geometry = [
        (
            draw(st.integers(1, 3)),
            draw(st.integers(1, 2)),
            draw(st.integers(1, 2)),
            draw(st.integers(0, 2)),
            draw(st.integers(0, 2)),
        )
        for _ in range(axes)
    ]
    form = draw(st.sampled_from(["batchnorm", "scale", "run"]))
    return draw(st.integers(5, 7)), geometry, draw(st.sampled_from([1, 2, 4])), form, draw(st.integers(0, 2**32 - 1))


def check_layer(layer):
    size, geometry, group, form, seed = layer
    kernel, strides, dilations, begin, end = (list(values) for values in zip(*geometry, strict=True))
    constants = weights((4, 4 // group, *kernel), seed)
    head = {"batchnorm": BN, "scale": "a = Mul(x, k)", "run": "p = Mul(x, k) q = Sub(p, t) a = Div(q, six)"}[form]
    attrs = f"group={group}, strides={strides}, dilations={dilations}, pads={begin + end}"
    x, y = ",".join([str(size)] * len(kernel)), ",".join("hw"[: len(kernel)])
    text = f"g (float[N,4,{x}] x) => (float[N,4,{y}] y) {{ {head} y = Conv<{attrs}>(a, W, b) }}"
    before = model(text, **constants)
    after, result = apply(FuseBatchNormIntoNextConv(Settings(cost=ByNodes())), before)
    assert result.rewrites == 1 and ops(after) in (["Conv"], ["Conv", "Add"])
    assert_equivalent(before, after, rel=REL)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layers())
def test_random_layers(layer):
    check_layer(layer)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(layers())
def test_many_random_layers(layer):
    check_layer(layer)
