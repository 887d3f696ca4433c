"""Constants per channel after Conv and ConvTranspose: structure, numbers, near misses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.fuse_channel_affine_into_conv import FuseChannelAffineIntoConv
from onnxcompress.rewrite import Settings
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
REL = 3e-6  # measured 4.3e-7 over 2000 random layers
X = "float[N,4,6,6] x"
Y = "float[N,6,h,w] y"
W = np.random.default_rng(0).normal(size=(6, 4, 3, 3)).astype(F)
PER_CHANNEL = np.random.default_rng(1).normal(size=(1, 6, 1, 1)).astype(F)


def fused(text, *, rel, opset=17, **weights):
    before = model(text, opset=opset, **weights)
    after, result = apply(FuseChannelAffineIntoConv(), before)
    assert result.rewrites == 1 and ops(after) in (["Conv"], ["ConvTranspose"])
    assert_equivalent(before, after, rel=rel)
    _, again = apply(FuseChannelAffineIntoConv(), after)
    assert again.rewrites == 0
    return after


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (6, 1, 1), (), (1,), (1, 1, 1, 1)])
@pytest.mark.parametrize(
    "call", ["Mul(c, k)", "Mul(k, c)", "Div(c, k)", "Add(c, k)", "Sub(c, k)", "Sub(k, c)", "Neg(c)"]
)
def test_folds_each_form(call, shape):
    k = np.random.default_rng(2).normal(size=shape).astype(F)
    weights = {} if "k" not in call else {"k": k}
    after = fused(f"g ({X}) => ({Y}) {{ c = Conv<pads=[1,1,0,1]>(x, W) y = {call} }}", rel=REL, W=W, **weights)
    assert len(after.graph.node[0].input) == (3 if call[:3] in ("Add", "Sub") else 2)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("axes", [1, 3])
def test_folds_runs_of_any_rank_and_group(op, group, axes):
    rng = np.random.default_rng(3)
    shape = (6, 4 // group) if op == "Conv" else (4, 6 // group)
    channel = (6,) + (1,) * axes
    weights = {
        "W": rng.normal(size=(*shape, *[3] * axes)).astype(F),
        "b": rng.normal(size=6).astype(F),
        "k": rng.normal(size=channel).astype(F),
        "t": rng.normal(size=channel).astype(F),
        "six": np.array([6], F),
    }
    x, y = ",".join(["5"] * axes), ",".join("hwd"[:axes])
    chain = "a = Div(c, six) d = Mul(k, a) e = Sub(t, d) y = Neg(e)"
    text = f"g (float[N,4,{x}] x) => (float[N,6,{y}] y) {{ c = {op}<group={group}>(x, W, b) {chain} }}"
    fused(text, rel=REL, **weights)


def test_run_takes_a_batchnorm_along():
    rng = np.random.default_rng(4)
    row = {name: rng.uniform(0.5, 2, 6).astype(F) for name in "sBmv"}
    text = f"g ({X}) => ({Y}) {{ c = Conv(x, W) a = Mul(c, k) y = BatchNormalization(a, s, B, m, v) }}"
    fused(text, rel=REL, W=W, k=PER_CHANNEL, **row)


def test_pp_ocr_scale_and_shift():
    weights = {"W": W, "b": np.ones(6, F), "k": np.array([0.9431], F), "t": np.array([0.5043], F)}
    text = f"g ({X}) => ({Y}) {{ c = Conv<group=1>(x, W, b) a = Mul(k, c) y = Add(a, t) }}"
    after = fused(text, rel=REL, opset=12, **weights)
    assert after.graph.output[0].name == "y"


def test_add_alone_keeps_the_weight():
    text = f"g ({X}) => ({Y}) {{ c = Conv(x, W) y = Add(c, k) }}"
    after = fused(text, rel=REL, W=W, k=PER_CHANNEL)
    assert after.graph.node[0].input[1] == "W"


def test_folds_in_both_branches_of_an_if():
    branch = "g{0} () => (float[N,6,h,w] y{0}) {{ c{0} = Conv(x, W) y{0} = Mul(c{0}, k) }}"
    text = f"g ({X}, bool p) => ({Y}) {{ y = If (p) <then_branch={branch.format(1)}, else_branch={branch.format(2)}> }}"
    before = model(text, W=W, k=PER_CHANNEL)
    after, result = apply(FuseChannelAffineIntoConv(), before)
    assert result.rewrites == 2
    assert_equivalent(before, after, rel=REL)


def test_conv_outside_the_branch_is_left_alone():
    branch = "g{0} () => (float[N,6,h,w] y{0}) {{ y{0} = Mul(c, k) }}"
    text = (
        f"g ({X}, bool p) => ({Y}) {{ c = Conv(x, W) "
        f"y = If (p) <then_branch={branch.format(1)}, else_branch={branch.format(2)}> }}"
    )
    before = model(text, W=W, k=PER_CHANNEL)
    _, result = apply(FuseChannelAffineIntoConv(), before)
    assert result.rewrites == 0


MUL = "c = Conv(x, W) y = Mul(c, k)"
WIDER = f"g ({X}) => (float[1,N,6,h,w] y) {{ {MUL} }}"
NEAR_MISSES = {
    "model output": (f"g ({X}) => ({Y}, float[N,6,h,w] c) {{ {MUL} }}", PER_CHANNEL),
    "two readers": (f"g ({X}) => ({Y}, float[N,6,h,w] z) {{ {MUL} z = Relu(c) }}", PER_CHANNEL),
    "along width": (f"g ({X}) => ({Y}) {{ {MUL} }}", np.ones((1, 1, 1, 4), F)),
    "per position": (f"g ({X}) => ({Y}) {{ c = Conv(x, W) y = Add(c, k) }}", np.ones((6, 4, 4), F)),
    "per sample": (f"g (float[6,4,6,6] x) => (float[6,6,h,w] y) {{ {MUL} }}", np.ones((6, 1, 1, 1), F)),
    "one more axis": (WIDER, PER_CHANNEL[None]),
    "one more axis, scalar": (WIDER, np.ones((1, 1, 1, 1, 1), F)),
    "weight is an input": (f"g ({X}, float[6,4,3,3] U) => ({Y}) {{ c = Conv(x, U) y = Mul(c, k) }}", PER_CHANNEL),
    "bias is an input": (f"g ({X}, float[6] b) => ({Y}) {{ c = Conv(x, W, b) y = Mul(c, k) }}", PER_CHANNEL),
    "division by zero": (f"g ({X}) => ({Y}) {{ c = Conv(x, W) y = Div(c, k) }}", np.array(0, F)),
    "infinite": (f"g ({X}) => ({Y}) {{ {MUL} }}", np.array(np.inf, F)),
    "overflow": (f"g ({X}) => ({Y}) {{ {MUL} }}", np.array(3e38, F)),
    "underflow": (f"g ({X}) => ({Y}) {{ {MUL} }}", np.array(1e-40, F)),
    "rounding": (f"g ({X}) => ({Y}) {{ c = Conv(x, W) a = Add(c, k) y = Sub(a, k) }}", np.array(2.0**23, F)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name):
    text, k = NEAR_MISSES[name]
    before = model(text, W=W, k=k)
    after, result = apply(FuseChannelAffineIntoConv(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after)


@pytest.mark.parametrize("call", ["Div(k, c)", "Mul(c, c)", "Mul(c, x1)", "Max(c, k)", "Pow(c, k)"])
def test_other_operators_are_not_the_pattern(call):
    text = f"g (float[N,4,6,6] x, float[1] x1) => ({Y}) {{ c = Conv(x, W) y = {call} }}"
    before = model(text, W=W, k=PER_CHANNEL)
    _, result = apply(FuseChannelAffineIntoConv(), before)
    assert result.rewrites == 0 and not result.misses


def test_large_shared_weight_is_not_copied():
    text = f"g ({X}) => ({Y}, float[N,6,h,w] z) {{ c = Conv(x, W) y = Mul(c, k) z = Conv(x, W) }}"
    before = model(text, W=W, k=PER_CHANNEL)
    _, result = apply(FuseChannelAffineIntoConv(Settings(max_constant_bytes=W.nbytes - 1)), before)
    assert result.rewrites == 0 and "shared" in result.misses[0].reason
    after, result = apply(FuseChannelAffineIntoConv(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after, rel=REL)


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g ({X}) => ({Y}) {{ c = ours.Conv(x, W) y = Mul(c, k) }}"""
    graph = graph_of(model(text, W=W, k=PER_CHANNEL))
    result = FuseChannelAffineIntoConv().apply(graph)
    assert result.rewrites == 0 and not result.misses


FORMS = {
    "mul": "Mul({0}, {1})",
    "div": "Div({0}, {1})",
    "add": "Add({1}, {0})",
    "subtract": "Sub({0}, {1})",
    "subtract from": "Sub({1}, {0})",
    "negate": "Neg({0})",
}


@st.composite
def layers(draw):
    """Spatial axes, group, operator, steps after it (form, scalar), bias, seed."""
    step = st.tuples(st.sampled_from(list(FORMS)), st.booleans())
    return (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from(["Conv", "ConvTranspose"])),
        draw(st.lists(step, min_size=1, max_size=4)),
        draw(st.booleans()),
        draw(st.integers(0, 2**32 - 1)),
    )


def layer_model(axes, group, op, steps, bias, seed):
    rng = np.random.default_rng(seed)
    shape = (6, 4 // group) if op == "Conv" else (4, 6 // group)
    weights = {"W": rng.normal(size=(*shape, *[2] * axes)).astype(F)}
    if bias:
        weights["b"] = rng.normal(size=6).astype(F)
    calls, last = [f"c = {op}<group={group}>(x, W{', b' if bias else ''})"], "c"
    for i, (form, scalar) in enumerate(steps):
        if form != "negate":
            size = () if scalar else (6,) + (1,) * axes
            weights[f"k{i}"] = (rng.uniform(0.3, 2, size) * rng.choice([-1, 1])).astype(F)
        made = "y" if i == len(steps) - 1 else f"t{i}"
        calls.append(f"{made} = {FORMS[form].format(last, f'k{i}')}")
        last = made
    x, y = ",".join(["4"] * axes), ",".join("hwd"[:axes])
    return model(f"g (float[N,4,{x}] x) => (float[N,6,{y}] y) {{ {' '.join(calls)} }}", **weights)


def check_layer(layer):
    before = layer_model(*layer)
    after, result = apply(FuseChannelAffineIntoConv(), before)
    assert result.rewrites == 1 and ops(after) == [layer[2]]
    return assert_equivalent(before, after, rel=REL)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(layers())
def test_random_layers(layer):
    check_layer(layer)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(layers())
def test_many_random_layers(layer):
    check_layer(layer)
