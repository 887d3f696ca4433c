"""Convolutions of one input that are added: which merge, in every form of the sum, and which stay."""

import numpy as np
import pytest

from onnxcompress.cost import Price
from onnxcompress.linear import Exactness
from onnxcompress.passes.fuse_parallel_convs import FuseParallelConvs
from onnxcompress.passes.fuse_skip_into_conv import FuseSkipIntoConv
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
    after, result = apply(FuseParallelConvs(settings), before)
    again, second = apply(FuseParallelConvs(settings), after)
    assert second.rewrites == 0 and ops(again) == ops(after)
    assert_equivalent(before, after, rel=rel, sizes={"H": 6, "W": 7}, **kwargs)  # measured 4.2e-7 at worst
    return after, result


def shapes(proto):
    return sorted(tuple(t.dims) for t in proto.graph.initializer if len(t.dims) > 1)


X, Y = "float[N,4,H,W] x", "float[N,6,h,w] y"
A3, A1 = normal(6, 4, 3, 3), normal(6, 4, 1, 1)


@pytest.mark.parametrize(
    ("first", "a", "second", "b", "kernel"),
    [
        ("pads=[1,1,1,1]", (3, 3), "", (1, 1), (3, 3)),
        ("pads=[1,1,1,1], strides=[2,2]", (3, 3), "strides=[2,2]", (1, 1), (3, 3)),
        ("pads=[0,1,0,1]", (1, 3), "pads=[1,0,1,0]", (3, 1), (3, 3)),
        ("pads=[2,2,2,2]", (5, 5), "pads=[1,1,1,1]", (3, 3), (5, 5)),
        ("pads=[2,2,2,2]", (5, 5), "pads=[2,2,2,2], dilations=[2,2]", (3, 3), (5, 5)),
        ("pads=[0,1,1,0]", (2, 2), "pads=[1,0,0,1]", (2, 2), (3, 3)),
        ('auto_pad="SAME_UPPER"', (3, 3), "", (1, 1), (3, 3)),
    ],
)
def test_pairs(first, a, second, b, kernel):
    nodes = f"c = Conv<{first}>(x, A, a) d = Conv<{second}>(x, B) y = Add(c, d)".replace("<>", "")
    text = f"g ({X}) => ({Y}) {{ {nodes} }}"
    after, result = fused(model(text, A=normal(6, 4, *a), a=normal(6), B=normal(6, 4, *b)))
    assert ops(after) == ["Conv"] and shapes(after) == [(6, 4, *kernel)]
    assert result.done[0].exactness is Exactness.EXACT


@pytest.mark.parametrize(("size", "axes"), [("L", 1), ("D,H,W", 3)])
def test_other_ranks_and_groups(size, axes):
    pads = [1] * (2 * axes)
    text = f"""g (float[N,4,{size}] x) => (float[N,6,{",".join("efg"[:axes])}] y) {{
        c = Conv<pads={pads}, group=2>(x, A) d = Conv(x, B, b) y = Sub(d, c)
    }}"""
    after, _ = fused(model(text, A=normal(6, 2, *[3] * axes), B=normal(6, 4, *[1] * axes), b=normal(6)))
    assert ops(after) == ["Conv"] and shapes(after) == [(6, 4, *[3] * axes)]


def repvgg(order="Add(c, d)", second="Add(e, f)", rest=""):
    text = f"""g (float[N,4,H,W] x) => (float[N,4,h,w] y) {{
        c = Conv<pads=[1,1,1,1]>(x, A, a) d = Conv(x, B, b) f = BatchNormalization(x, s, t, m, v)
        e = {order} y = {second} {rest}
    }}"""
    weights = {"A": normal(4, 4, 3, 3), "a": normal(4), "B": normal(4, 4, 1, 1), "b": normal(4, seed=1)}
    statistics = {name: normal(4, seed=i) for i, name in enumerate("stm")}
    return model(text, **weights, **statistics, v=np.abs(normal(4, seed=9)) + 0.1)


@pytest.mark.parametrize(
    ("order", "second"), [("Add(c, d)", "Sum(e, f)"), ("Sum(f, d)", "Add(e, c)"), ("Sum(c, d, f)", "Sum(e)")]
)
def test_repvgg_block_becomes_one_conv(order, second):
    before = repvgg(order, second)
    middle, first = apply(FuseSkipIntoConv(), before)
    after, then = apply(FuseParallelConvs(), middle)
    final, last = apply(FuseSkipIntoConv(), after)
    assert [op for op in ops(final) if op != "Sum"] == ["Conv"]
    assert first.rewrites + then.rewrites + last.rewrites == 2
    assert_equivalent(before, final, rel=4e-6, sizes={"H": 6, "W": 7})  # measured 3.2e-7


def test_repvgg_block_in_one_step():
    after, result = fused(repvgg("Sum(c, d, f)", "Relu(e)"), settings=None)
    assert ops(after) == ["Conv", "Relu"]
    assert "Conv 3x3 + Conv 1x1 + BatchNormalization -> Conv 3x3" in result.done[0].detail


@pytest.mark.parametrize("sum_of", ["Sum(c, d, e)", "Sum(t, c, d, e)"])
def test_any_number_of_terms(sum_of):
    text = f"""g ({X}, float[1,6,1,1] t) => ({Y}) {{
        c = Conv<pads=[1,1,1,1]>(x, A) d = Conv(x, B) e = Conv<pads=[1,0,1,0]>(x, C, a) y = {sum_of}
    }}"""
    after, _ = fused(model(text, A=A3, B=A1, C=normal(6, 4, 3, 1), a=normal(6)))
    assert ops(after) == (["Conv", "Add"] if "t" in sum_of else ["Conv"])


def test_resnet_d_shortcut():
    text = f"""g (float[N,4,8,6] x) => ({Y}) {{
        c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, A, a)
        p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x) d = Conv(p, B) y = Add(c, d)
    }}"""
    after, result = fused(model(text, A=A3, a=normal(6), B=A1), settings=None)
    assert ops(after) == ["Conv"] and shapes(after) == [(6, 4, 3, 3)]
    assert "Conv 3x3 + AveragePool, Conv 1x1 -> Conv 3x3" in result.done[0].detail


def test_low_rank_branch_goes_into_the_full_one():
    # The chain 1x1 -> 1x1 does not pay on its own, as it is narrow in the middle.
    text = "g (float[N,64,H,W] x) => (float[N,64,h,w] y) { c = Conv(x, A) e = Conv(x, B) d = Conv(e, C) y = Add(c, d) }"
    before = model(text, A=normal(64, 64, 1, 1), B=normal(4, 64, 1, 1), C=normal(64, 4, 1, 1))
    after, _ = fused(before, settings=None)
    assert ops(after) == ["Conv"]


def test_a_bias_before_padding_makes_a_map():
    text = f"""g (float[N,4,8,6] x) => ({Y}) {{
        e = Conv(x, E, e0) c = Conv<pads=[1,1,1,1]>(e, A) d = Conv(x, B, a) y = Sub(d, c)
    }}"""
    after, result = fused(model(text, E=normal(4, 4, 1, 1), e0=normal(4), A=A3, B=A1, a=normal(6)))
    assert ops(after) == ["Conv", "Add"]
    assert result.done[0].exactness is Exactness.EXACT_WITH_BIAS_MAP


def test_the_pair_that_pays_is_found():
    # A depthwise 7x7 in a dense 1x1 or 3x3 would be a dense 7x7.
    text = """g (float[N,64,16,16] x) => (float[N,64,h,w] y) {
        c = Conv<pads=[1,1,1,1]>(x, A) d = Conv(x, B) e = Conv<pads=[3,3,3,3], group=64>(x, C) y = Sum(c, e, d)
    }"""
    before = model(text, A=normal(64, 64, 3, 3), B=normal(64, 64, 1, 1), C=normal(64, 1, 7, 7))
    after, result = fused(before, settings=None)
    assert sorted(ops(after)) == ["Add", "Conv", "Conv"] and result.rewrites == 1
    assert shapes(after) == [(64, 1, 7, 7), (64, 64, 3, 3)]
    assert "would" in result.misses[0].reason


def test_nested_sums_merge_from_the_inside():
    text = f"""g ({X}, float[N,6,H,W] t) => ({Y}) {{
        c = Conv<pads=[1,1,1,1]>(x, A) d = Conv(x, B) u = Sub(t, c) v = Add(u, t) y = Sub(v, d)
    }}"""
    after, result = fused(model(text, A=A3, B=A1))
    assert sorted(ops(after)) == ["Add", "Add", "Conv"] and result.rewrites == 1


def test_a_sum_within_a_sum_is_refused_once():
    text = """g (float[N,64,16,16] x, float[1,64,1,1] t) => (float[N,64,h,w] y) {
        c = Conv(x, A) d = Conv<pads=[3,3,3,3], group=64>(x, B) e = Add(c, d) y = Add(e, t)
    }"""
    before = model(text, A=normal(64, 64, 1, 1), B=normal(64, 1, 7, 7))
    _, result = apply(FuseParallelConvs(), before)
    assert result.rewrites == 0 and len(result.misses) == 1


def test_a_constant_that_broadcasts_the_input_is_no_step_of_a_branch():
    text = """g (float[N,1,H,W] x) => (float[N,6,h,w] y) {
        a = Mul(x, k) c = Conv(a, A) b = Mul(x, l) d = Conv(b, B) y = Add(c, d)
    }"""
    constants = {
        "k": normal(4, 1, 1),
        "l": normal(4, 1, 1, seed=1),
        "A": normal(6, 4, 1, 1),
        "B": normal(6, 4, 1, 1, seed=1),
    }
    before = model(text, **constants)
    after, result = apply(FuseParallelConvs(PAYS), before)
    assert ops(after) == ops(before) and "broadcast the channel axis" in result.misses[0].reason


PAIR = "c = Conv<pads=[1,1,1,1]>(x, A) d = Conv(x, B)"
READ_ELSEWHERE = f"g ({X}) => ({Y}, float[N,6,h,w] z) {{ {PAIR} y = Add(c, d) z = Relu(c) }}"
MODEL_OUTPUT = f"g ({X}) => ({Y}, float[N,6,h,w] c) {{ {PAIR} y = Add(c, d) }}"
OTHER_INPUT = f"g ({X}) => ({Y}) {{ c = Conv<pads=[1,1,1,1]>(x, A) r = Relu(x) d = Conv(r, B) y = Add(c, d) }}"
PRODUCT = f"g ({X}) => ({Y}) {{ {PAIR} y = Mul(c, d) }}"


@pytest.mark.parametrize("text", [READ_ELSEWHERE, MODEL_OUTPUT, OTHER_INPUT, PRODUCT])
def test_what_is_no_pair_is_left_alone(text):
    before = model(text, A=A3, B=A1)
    after, result = apply(FuseParallelConvs(PAYS), before)
    assert result.rewrites == 0 and ops(after) == ops(before)


STRIDES = "c = Conv<pads=[1,1,1,1], strides=[6,7]>(x, A) d = Conv(x, B) y = Add(c, d)"
CHANNELS = "c = Conv<pads=[1,1,1,1]>(x, A) d = Conv(x, C) y = Add(c, d)"
POOL = (
    "c = Conv<pads=[1,1,1,1]>(x, A) p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) d = Conv(p, B) y = Add(c, d)"
)
SIZES = "c = Conv<strides=[2,2]>(x, A) d = Conv<strides=[2,2]>(x, B) y = Add(c, d)"
WEIGHT_IS_INPUT = "c = Conv<pads=[1,1,1,1]>(x, A) d = Conv(x, U) y = Add(c, d)"
APPROXIMATE = "c = Conv(x, B) e = Conv<pads=[1,1,1,1]>(x, A) d = Conv<pads=[1,1,1,1]>(e, D) y = Add(c, d)"


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (STRIDES, "strides differ"),
        (CHANNELS, "output channels differ: 1, 6"),
        (SIZES, "outputs of 1 and 2 from an input of 3"),
        (APPROXIMATE, "class 4"),
        (WEIGHT_IS_INPUT, None),
        (POOL, None),
    ],
)
def test_near_miss_is_left_alone(nodes, reason):
    # In the first three Add broadcasts one of them, which a convolution cannot.
    height = "3,W" if nodes is SIZES else "H,W"
    text = f"g (float[N,4,{height}] x, float[6,4,1,1] U) => ({Y}) {{ {nodes} }}"
    constants = {"A": A3, "B": A1, "C": normal(1, 4, 1, 1), "D": normal(6, 6, 3, 3)}
    before = model(text, **{k: v for k, v in constants.items() if f" {k}" in nodes})
    after, result = apply(FuseParallelConvs(PAYS), before)
    assert ops(after) == ops(before)
    assert [reason in miss.reason for miss in result.misses] == ([True] if reason else [])
    assert_equivalent(before, after, sizes={"H": 6, "W": 3 if nodes is SIZES else 7})
