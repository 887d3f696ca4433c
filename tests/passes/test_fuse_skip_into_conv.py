"""Skip connections around convolutions: every form of the sum and of the skip, and what must stay."""

import numpy as np
import pytest

from onnxcompress.linear import Exactness
from onnxcompress.passes.fuse_skip_into_conv import FuseSkipIntoConv
from onnxcompress.testing import apply, assert_equivalent, model, ops


def normal(*shape, seed=0):
    scale = 1 / np.sqrt(np.prod(shape[1:]))
    return (np.random.default_rng(seed + sum(shape)).normal(size=shape) * scale).astype(np.float32)


X, Y = "float[N,4,H,W] x", "float[N,4,h,w] y"
STATISTICS = {"s": normal(4), "B": normal(4, seed=1), "m": normal(4, seed=2), "v": np.abs(normal(4, seed=3)) + 0.1}
WEIGHTS = {"A": normal(4, 4, 3, 3), "a": normal(4, seed=4)}
CONV = "c = Conv<pads=[1,1,1,1]>(x, A, a)"


def fused(before, rel=4e-6, **kwargs):
    after, result = apply(FuseSkipIntoConv(), before)
    again, second = apply(FuseSkipIntoConv(), after)
    assert second.rewrites == 0 and ops(again) == ops(after)
    assert_equivalent(before, after, rel=rel, sizes={"H": 5, "W": 6}, **kwargs)  # measured 4.3e-7 at worst
    return after, result


@pytest.mark.parametrize(
    "form",
    [
        "y = Add(c, x)",
        "y = Add(x, c)",
        "y = Sum(c, x)",
        "y = Sub(x, c)",
        "y = Sub(c, x)",
        "d = BatchNormalization(x, s, B, m, v) y = Add(c, d)",
        "d = BatchNormalization(x, s, B, m, v) y = Sub(d, c)",
        "d = Mul(x, k) y = Add(d, c)",
        "d = Mul(k, x) e = Sub(d, k) y = Sub(c, e)",
        "d = Neg(x) y = Add(c, d)",
        "d = Add(c, x) y = Add(d, x)",
        "d = Add(x, x) y = Add(c, d)",
    ],
)
def test_forms(form):
    constants = {"k": normal(4, 1, 1)} if "k" in form else {}
    statistics = STATISTICS if "BatchN" in form else {}
    before = model(f"g ({X}) => ({Y}) {{ {CONV} {form} }}", **WEIGHTS, **constants, **statistics)
    after, result = fused(before)
    assert ops(after) == ["Conv"]
    assert {done.exactness for done in result.done} == {Exactness.EXACT}


@pytest.mark.parametrize(
    ("size", "conv", "shape"),
    [
        ("L", "pads=[1,1]", (4, 4, 3)),
        ("L", "pads=[4,0], dilations=[2], group=4", (4, 1, 3)),
        ("H,W", "pads=[0,1,1,0], group=2", (4, 2, 2, 2)),
        ("H,W", 'auto_pad="SAME_LOWER"', (4, 4, 2, 3)),
        ("D,H,W", "pads=[1,0,0,1,0,2]", (4, 4, 3, 1, 3)),
        ("1,W", "pads=[0,1,0,1], strides=[1,1]", (4, 4, 1, 3)),
    ],
)
def test_geometries(size, conv, shape):
    letters = "efg"[: size.count(",") + 1]
    text = f"g (float[N,4,{size}] x) => (float[N,4,{','.join(letters)}] y) {{ c = Conv<{conv}>(x, A) y = Add(c, x) }}"
    before = model(text, A=normal(*shape))
    after, _ = fused(before)
    assert ops(after) == ["Conv"]
    assert [tuple(t.dims) for t in after.graph.initializer] == [shape]


def test_a_skip_around_two_convs():
    text = f"g ({X}) => ({Y}) {{ a = Conv<pads=[1,1,1,1]>(x, P) c = Conv(a, Q, b) y = Add(c, x) }}"
    after, result = fused(model(text, P=normal(16, 4, 3, 3), Q=normal(4, 16, 1, 1), b=normal(4)))
    assert ops(after) == ["Conv"] and "Conv 3x3, Conv 1x1 + skip -> Conv 3x3" in result.done[0].detail


@pytest.mark.parametrize("other", ["Sub(t, {})", "Sub({}, t)", "Add({}, t)"])
@pytest.mark.parametrize("form", ["d = Sub(c, x) y = {}", "d = {} y = Sub(x, d)"])
def test_other_terms_stay(form, other):
    nodes = form.format(other.format("d" if form.startswith("d = Sub") else "c"))
    after, _ = fused(model(f"g ({X}, float[1,4,1,1] t) => ({Y}) {{ {CONV} {nodes} }}", **WEIGHTS))
    assert len(ops(after)) == 2 and "Conv" in ops(after)


@pytest.mark.parametrize("form", ["d = Add(c, k) y = Sub(x, d)", "d = Sub(k, c) y = Add(d, x)"])
def test_a_constant_on_the_way_goes_into_the_bias(form):
    after, _ = fused(model(f"g ({X}) => ({Y}) {{ {CONV} {form} }}", **WEIGHTS, k=normal(4, 1, 1)))
    assert ops(after) == ["Conv"]


def test_a_constant_in_a_sum_is_a_term():
    after, _ = fused(model(f"g ({X}) => ({Y}) {{ {CONV} d = Sum(c, k) y = Add(d, x) }}", **WEIGHTS, k=normal(4, 1, 1)))
    assert ops(after) == ["Conv", "Add"]


def test_a_constant_map_stays():
    text = f"g (float[N,4,5,6] x) => ({Y}) {{ {CONV} d = Sub(k, c) y = Add(d, x) }}"
    after, _ = fused(model(text, **WEIGHTS, k=normal(4, 5, 6)))
    assert ops(after) == ["Conv", "Add"]


def test_both_are_model_outputs_of_their_own():
    text = f"g ({X}) => ({Y}, float[N,4,h,w] z) {{ {CONV} y = Add(c, x) z = Add(y, x) }}"
    after, _ = fused(model(text, **WEIGHTS))
    assert ops(after) == ["Conv", "Add"]  # y is a model output, so that z keeps its own skip


def test_shared_initializer_is_not_changed_for_the_other_reader():
    text = f"g ({X}) => ({Y}, float[N,4,h,w] z) {{ c = Conv(x, A, a) y = Add(c, x) z = Conv(y, A) }}"
    after, result = fused(model(text, A=normal(4, 4, 1, 1), a=WEIGHTS["a"]))
    assert result.rewrites == 1 and ops(after) == ["Conv", "Conv"]


def test_inside_a_branch():
    text = """g (float[1,4,5,6] x, bool c) => (float[1,4,h,w] y) {
        y = If(c) <
            then_branch = t () => (float[1,4,h,w] u) { d = Conv<pads=[1,1,1,1]>(x, A, a) u = Add(d, x) },
            else_branch = e () => (float[1,4,h,w] v) { v = Relu(x) }
        >
    }"""
    _, result = fused(model(text, **WEIGHTS))
    assert result.rewrites == 1


READ_ELSEWHERE = f"g ({X}) => ({Y}, float[N,4,h,w] z) {{ {CONV} y = Add(c, x) z = Relu(c) }}"
MODEL_OUTPUT = f"g ({X}) => ({Y}, float[N,4,h,w] c) {{ {CONV} y = Add(c, x) }}"
OTHER_INPUT = f"g ({X}, float[N,4,H,W] t) => ({Y}) {{ {CONV} y = Add(c, t) }}"
TWICE = f"g ({X}) => ({Y}) {{ {CONV} y = Add(c, c) }}"


@pytest.mark.parametrize("text", [READ_ELSEWHERE, MODEL_OUTPUT, OTHER_INPUT, TWICE])
def test_what_is_no_skip_is_left_alone(text):
    before = model(text, **WEIGHTS)
    after, result = apply(FuseSkipIntoConv(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)


NARROWER = "g (float[N,4,3,W] x) => (float[N,4,h,w] y) { c = Conv<pads=[0,1,0,1]>(x, A, a) y = Add(c, x) }"
STRIDED = (
    "g (float[N,4,2,2] x) => (float[N,4,h,w] y) { c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, A, a) y = Add(c, x) }"
)
ONE_CHANNEL = f"g ({X}) => ({Y}) {{ c = Conv<pads=[1,1,1,1]>(x, A) y = Add(c, x) }}"
ALONG_WIDTH = f"g ({X}) => ({Y}) {{ {CONV} d = Mul(x, k) y = Add(c, d) }}"
TRAINING = f"g ({X}) => ({Y}) {{ {CONV} d, e, f = BatchNormalization<training_mode=1>(x, s, B, m, v) y = Add(c, d) }}"


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        (NARROWER, WEIGHTS, "outputs of 1 and 3 from an input of 3"),
        (STRIDED, WEIGHTS, "strides differ"),
        (ONE_CHANNEL, {"A": normal(1, 4, 3, 3)}, "output channels differ: 1, 4"),
        (ALONG_WIDTH, {**WEIGHTS, "k": normal(1, 1, 1, 6)}, "not one value per channel"),
        (TRAINING, {**WEIGHTS, **STATISTICS}, "training mode"),
    ],
)
def test_near_miss_is_left_alone(text, weights, reason):
    before = model(text, **weights)
    after, result = apply(FuseSkipIntoConv(), before)
    assert ops(after) == ops(before) and len(result.misses) == 1
    assert reason in result.misses[0].reason
    assert_equivalent(before, after, sizes={"H": 5, "W": 6})
