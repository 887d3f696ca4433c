"""1x1 convolutions before and after a ConvTranspose."""

import numpy as np
import pytest

from onnxcompress.passes.fuse_conv_into_conv_transpose import FuseConvIntoConvTranspose
from onnxcompress.testing import apply, assert_equivalent, model, ops


def normal(*shape, seed=0):
    scale = 1 / np.sqrt(np.prod(shape[1:]))
    return (np.random.default_rng(seed + sum(shape)).normal(size=shape) * scale).astype(np.float32)


def fused(before, rel=4e-6, **kwargs):
    after, result = apply(FuseConvIntoConvTranspose(), before)
    again, second = apply(FuseConvIntoConvTranspose(), after)
    assert second.rewrites == 0 and ops(again) == ops(after)
    assert_equivalent(before, after, rel=rel, sizes={"H": 5, "W": 6}, **kwargs)  # measured 3.4e-7 at worst
    return after, result


GEOMETRIES = [
    "strides=[2,2]",
    "strides=[2,3], pads=[1,0,2,1], dilations=[1,2], output_padding=[1,0]",
    'strides=[2,2], auto_pad="SAME_UPPER"',
]


@pytest.mark.parametrize("attrs", GEOMETRIES)
@pytest.mark.parametrize(("group", "conv_group"), [(1, 1), (2, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("bias", ["", ", a"])
def test_after(attrs, group, conv_group, bias):
    text = f"""g (float[N,6,H,W] x) => (float[N,4,h,w] y) {{
        c = ConvTranspose<{attrs}, group={group}>(x, A{bias}) y = Conv<group={conv_group}>(c, B, b)
    }}"""
    weights = {"A": normal(6, 12 // group, 3, 3), "B": normal(4, 12 // conv_group, 1, 1), "b": normal(4)}
    after, result = fused(model(text, **weights, **({"a": normal(12)} if bias else {})))
    assert ops(after) == ["ConvTranspose"]
    assert "ConvTranspose, Conv -> ConvTranspose" in result.done[0].detail


@pytest.mark.parametrize("attrs", GEOMETRIES)
@pytest.mark.parametrize(("group", "conv_group"), [(1, 1), (2, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("bias", ["", ", a"])
def test_before(attrs, group, conv_group, bias):
    text = f"""g (float[N,4,H,W] x) => (float[N,6,h,w] y) {{
        c = Conv<group={conv_group}>(x, B) y = ConvTranspose<{attrs}, group={group}>(c, A{bias})
    }}"""
    weights = {"A": normal(12, 6 // group, 3, 3), "B": normal(12, 4 // conv_group, 1, 1)}
    after, _ = fused(model(text, **weights, **({"a": normal(6)} if bias else {})))
    assert ops(after) == ["ConvTranspose"]


@pytest.mark.parametrize(("size", "axes"), [("H", 1), ("H,W,H", 3)])
def test_other_ranks(size, axes):
    twos, ones = [2] * axes, [1] * axes
    text = f"""g (float[N,4,{size}] x) => (float[N,3,{",".join("efg"[:axes])}] y) {{
        c = Conv(x, B) d = ConvTranspose<strides={twos}>(c, A, a) y = Conv(d, C)
    }}"""
    weights = {"B": normal(8, 4, *ones), "A": normal(8, 6, *twos), "a": normal(6), "C": normal(3, 6, *ones)}
    after, result = fused(model(text, **weights))
    assert ops(after) == ["ConvTranspose"] and result.rewrites == 2


def test_a_widening_conv_stays():
    text = "g (float[N,4,16,16] x) => (float[N,64,h,w] y) { c = ConvTranspose<strides=[2,2]>(x, A) y = Conv(c, B) }"
    before = model(text, A=normal(4, 2, 4, 4), B=normal(64, 2, 1, 1))
    after, result = apply(FuseConvIntoConvTranspose(), before)
    assert ops(after) == ops(before) and "would" in result.misses[0].reason


X = "float[N,4,H,W] x"
WEIGHTS = {
    "A": normal(4, 6, 2, 2),
    "B": normal(6, 6, 1, 1),
    "C": normal(4, 4, 1, 1),
    "c0": normal(4),
    "K": normal(6, 6, 2, 2),
}
BIAS_BEFORE = "c = Conv(x, C, c0) y = ConvTranspose(c, A)"
READ_ELSEWHERE = "c = ConvTranspose(x, A) y = Conv(c, B) z = Relu(c)"
CONV_READ_ELSEWHERE = "c = Conv(x, C) y = ConvTranspose(c, A) z = Relu(c)"
LARGER = "c = ConvTranspose(x, A) y = Conv(c, K)"
STRIDED = "c = ConvTranspose(x, A) y = Conv<strides=[2,2]>(c, B)"
LIVE = "c = ConvTranspose(x, A) y = Conv(c, U)"


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (BIAS_BEFORE, "the bias of the Conv"),
        (LARGER, "1 along every axis"),
        (STRIDED, "does not have the positions"),
        (LIVE, "not a constant"),
        (READ_ELSEWHERE, None),
        (CONV_READ_ELSEWHERE, "read elsewhere"),
    ],
)
def test_near_miss_is_left_alone(nodes, reason):
    outputs = "float[N,6,h,w] y" + (", float[N,e,f,g] z" if " z" in nodes else "")
    used = {name: v for name, v in WEIGHTS.items() if f" {name}" in nodes}
    before = model(f"g ({X}, float[6,6,1,1] U) => ({outputs}) {{ {nodes} }}", **used)
    after, result = apply(FuseConvIntoConvTranspose(), before)
    assert ops(after) == ops(before)
    assert [reason in miss.reason for miss in result.misses] == ([True] if reason else [])
    assert_equivalent(before, after, sizes={"H": 5, "W": 6})
