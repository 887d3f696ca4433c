"""A Conv that reads the Concat of convolutions of one input."""

import numpy as np
import pytest

from onnxcompress.cost import Price
from onnxcompress.linear import Exactness
from onnxcompress.passes.fuse_concat_into_conv import FuseConcatIntoConv
from onnxcompress.rewrite import Settings
from onnxcompress.testing import apply, assert_equivalent, model, ops


class AlwaysPays:
    """A Conv costs ten, anything else one, weights nothing: every merge has fewer."""

    def price(self, specs):
        return Price(float(sum(10 if spec.op == "Conv" else 1 for spec in specs)), 0)


PAYS = Settings(cost=AlwaysPays())


def normal(*shape, seed=0):
    scale = 1 / np.sqrt(np.prod(shape[1:]))
    return (np.random.default_rng(seed + sum(shape)).normal(size=shape) * scale).astype(np.float32)


def fused(before, settings=PAYS, rel=4e-6, **kwargs):
    after, result = apply(FuseConcatIntoConv(settings), before)
    again, second = apply(FuseConcatIntoConv(settings), after)
    assert second.rewrites == 0 and ops(again) == ops(after)
    assert_equivalent(before, after, rel=rel, sizes={"H": 6, "W": 7}, **kwargs)  # measured 4.0e-7 at worst
    return after, result


X, Y = "float[N,4,H,W] x", "float[N,5,h,w] y"
WEIGHTS = {"A": normal(6, 4, 3, 3), "a": normal(6), "B": normal(3, 4, 1, 1), "V": normal(5, 9, 1, 1), "v": normal(5)}
PAIR = "c = Conv<pads=[1,1,1,1]>(x, A, a) d = Conv(x, B)"


@pytest.mark.parametrize("axis", [1, -3])
def test_two_branches(axis):
    text = f"g ({X}) => ({Y}) {{ {PAIR} t = Concat<axis={axis}>(c, d) y = Conv(t, V, v) }}"
    after, result = fused(model(text, **WEIGHTS), settings=None)
    assert ops(after) == ["Conv"]
    assert result.done[0].exactness is Exactness.EXACT
    # 216 + 12 + 45 multiplications per position before, 180 after, at the nominal 32 x 32 positions
    assert result.done[0].detail == "3 Conv and a Concat -> 1 Conv 3x3, 279,552 -> 184,320 MACs"


@pytest.mark.parametrize("order", ["x, c, d", "c, x, d", "d, c, x, x"])
def test_the_input_itself_is_a_branch(order):
    text = f"g ({X}) => ({Y}) {{ {PAIR} t = Concat<axis=1>({order}) y = Conv(t, V, v) }}"
    weights = {**WEIGHTS, "V": normal(5, 9 + 4 * order.count("x"), 1, 1)}
    after, _ = fused(model(text, **weights))
    assert ops(after) == ["Conv"]


@pytest.mark.parametrize(("size", "axes"), [("L", 1), ("D,H,W", 3)])
def test_other_ranks_and_groups(size, axes):
    ones, threes, pads = [1] * axes, [3] * axes, [1] * (2 * axes)
    text = f"""g (float[N,4,{size}] x) => (float[N,6,{",".join("efg"[:axes])}] y) {{
        c = Conv<pads={pads}, group=2>(x, A) d = Conv(x, B) t = Concat<axis=1>(c, d) y = Conv<group=3>(t, V)
    }}"""
    after, _ = fused(model(text, A=normal(6, 2, *threes), B=normal(3, 4, *ones), V=normal(6, 3, *ones)))
    assert ops(after) == ["Conv"]


def test_a_bias_before_padding_makes_a_map():
    text = """g (float[N,4,8,6] x) => (float[N,5,h,w] y) {
        c = Conv(x, A, a) d = Conv(x, B) t = Concat<axis=1>(c, x, d) y = Conv<pads=[1,1,1,1], strides=[2,1]>(t, V, v)
    }"""
    weights = {**WEIGHTS, "A": normal(6, 4, 1, 1), "V": normal(5, 13, 3, 3)}
    after, result = fused(model(text, **weights))
    assert ops(after) == ["Conv", "Add"]
    assert result.done[0].exactness is Exactness.EXACT_WITH_BIAS_MAP


def test_wide_input_and_narrow_branches_do_not_pay():
    text = """g (float[N,64,H,W] x) => (float[N,64,h,w] y) {
        c = Conv(x, A) d = Conv(x, B) t = Concat<axis=1>(c, d) y = Conv(t, V)
    }"""
    before = model(text, A=normal(4, 64, 1, 1), B=normal(4, 64, 1, 1), V=normal(64, 8, 1, 1))
    after, result = apply(FuseConcatIntoConv(), before)
    assert ops(after) == ops(before) and "would" in result.misses[0].reason


TWO_READERS = f"g ({X}) => ({Y}, float[N,9,h,w] z) {{ {PAIR} t = Concat<axis=1>(c, d) y = Conv(t, V, v) z = Relu(t) }}"
MODEL_OUTPUT = f"g ({X}) => ({Y}, float[N,9,h,w] t) {{ {PAIR} t = Concat<axis=1>(c, d) y = Conv(t, V, v) }}"
LEAK = f"g ({X}) => (float[N,5,h,w] y) {{ {PAIR} t = Concat<axis=1>(c, d) y = Conv<pads=[1,1,1,1]>(t, V, v) }}"


@pytest.mark.parametrize(
    ("text", "reason"), [(TWO_READERS, "read elsewhere"), (MODEL_OUTPUT, "read elsewhere"), (LEAK, "class 4")]
)
def test_near_miss_is_left_alone(text, reason):
    before = model(text, **WEIGHTS)
    after, result = apply(FuseConcatIntoConv(PAYS), before)
    assert ops(after) == ops(before) and reason in result.misses[0].reason
    assert_equivalent(before, after, sizes={"H": 6, "W": 7})


OTHER_INPUT = f"""g ({X}) => ({Y}) {{
    c = Conv<pads=[1,1,1,1]>(x, A, a) r = Relu(x) d = Conv(r, B) t = Concat<axis=1>(c, d) y = Conv(t, V, v)
}}"""
ACTIVATION = f"g ({X}) => ({Y}) {{ {PAIR} r = Relu(d) t = Concat<axis=1>(c, r) y = Conv(t, V, v) }}"
BRANCH_OUTPUT = f"g ({X}) => ({Y}, float[N,3,h,w] d) {{ {PAIR} t = Concat<axis=1>(c, d) y = Conv(t, V, v) }}"


SHAPELESS_WEIGHT = f"""g ({X}, int64[k] s) => ({Y}) {{
    {PAIR} t = Concat<axis=1>(c, d) U = Relu(V) W = Reshape(U, s) y = Conv(t, W, v)
}}"""


@pytest.mark.parametrize("text", [OTHER_INPUT, ACTIVATION, BRANCH_OUTPUT, SHAPELESS_WEIGHT])
def test_another_thing_is_left_alone(text):
    before = model(text, **WEIGHTS)
    after, result = apply(FuseConcatIntoConv(PAYS), before)
    assert ops(after) == ops(before) and result.rewrites == 0


def test_concat_along_another_axis_is_left_alone():
    text = """g (float[N,4,6,7] x) => (float[N,6,h,w] y) {
        c = Conv(x, A) d = Conv(x, B) t = Concat<axis=2>(c, d) y = Conv(t, V)
    }"""
    before = model(text, A=normal(6, 4, 1, 1), B=normal(6, 4, 1, 1), V=normal(6, 6, 1, 1))
    after, result = apply(FuseConcatIntoConv(PAYS), before)
    assert ops(after) == ops(before) and result.rewrites == 0
