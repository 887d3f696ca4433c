"""Pad before AveragePool and MaxPool: structure, numbers bit by bit, near misses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.fuse_pad_into_pool import FusePadIntoPool
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
X = "float[N,2,6,7] x"
Y = "float[N,2,h,w] y"
PADS = np.array([0, 0, 1, 0, 0, 0, 2, 1])
VALUES = {
    "inf": np.array(-np.inf, F),
    "lowest": np.array(np.finfo(F).min, F),
    "minus": np.array(-1, F),
    "one": np.array(1, F),
    "a": PADS,
}


def fused(text, expected=None, *, opset=17, sizes=None, **constants):
    before = model(text, opset=opset, **constants)
    after, result = apply(FusePadIntoPool(), before)
    kept = [op for op in ops(before) if op != "Pad"]
    assert result.rewrites == 1 and ops(after) == kept
    attrs = {attr.name: list(attr.ints) or attr.i for attr in after.graph.node[-1].attribute}
    assert "auto_pad" not in attrs and attrs["pads"] == (expected or [1, 0, 2, 1])
    assert_equivalent(before, after, sizes=sizes)
    _, again = apply(FusePadIntoPool(), after)
    assert again.rewrites == 0
    return attrs


@pytest.mark.parametrize("opset", [7, 10, 11, 18])
@pytest.mark.parametrize("own", ["", ", count_include_pad=1", ", strides=[2,2]", ', auto_pad="VALID"'])
def test_average(own, opset):
    pad = "Pad<pads=[0,0,1,0,0,0,2,1]>(x)" if opset < 11 else "Pad(x, a)"
    text = f"g ({X}) => ({Y}) {{ p = {pad} y = AveragePool<kernel_shape=[3,3]{own}>(p) }}"
    assert fused(text, opset=opset, **({} if opset < 11 else {"a": PADS}))["count_include_pad"] == 1


def test_average_that_counts_its_own_padding():
    call = "AveragePool<kernel_shape=[4,4], pads=[1,1,1,1], count_include_pad=1>(p)"
    fused(f"g ({X}) => ({Y}) {{ p = Pad(x, a) y = {call} }}", [2, 1, 3, 2], a=PADS)


@pytest.mark.parametrize("value", ["inf", "lowest"])
@pytest.mark.parametrize(
    ("own", "pads"), [("", [1, 0, 2, 1]), ("strides=[2,2],", [1, 0, 2, 1]), ('auto_pad="SAME_UPPER",', [3, 2, 4, 3])]
)
def test_maximum_over_what_never_wins(value, own, pads):
    text = f"g ({X}) => ({Y}) {{ p = Pad(x, a, {value}) y = MaxPool<{own} kernel_shape=[5,5]>(p) }}"
    fused(text, pads, **VALUES)


def test_maximum_with_pads_of_its_own():
    text = f"g ({X}) => ({Y}) {{ p = Pad(x, a, inf) y = MaxPool<kernel_shape=[4,4], pads=[1,1,1,1]>(p) }}"
    fused(text, [2, 1, 3, 2], **VALUES)


@pytest.mark.parametrize(
    "head",
    [
        "r = Relu(x)",
        "r = Clip(x, one, inf)",
        "r = Sigmoid(x)",
        "q = Relu(x) r = MaxPool<kernel_shape=[1,1]>(q)",
    ],
)
@pytest.mark.parametrize("value", ["", ", , ", ", minus"])
def test_zeros_before_a_maximum_of_nothing_negative(head, value):
    call = f"Pad(r, a{value})" if value != ", , " else "Pad(r, a)"
    constants = {**VALUES, "inf": np.array(np.inf, F)}
    fused(f"g ({X}) => ({Y}) {{ {head} p = {call} y = MaxPool<kernel_shape=[3,3], strides=[2,2]>(p) }}", **constants)


def test_clip_with_attributes():
    calls = "r = Clip<min=0.0, max=6.0>(x) p = Pad<pads=[0,0,1,0,0,0,2,1]>(r) y = MaxPool<kernel_shape=[3,3]>(p)"
    fused(f"g ({X}) => ({Y}) {{ {calls} }}", opset=9)


@pytest.mark.parametrize("axes", [1, 3])
def test_any_rank_and_unknown_sizes(axes):
    x, y, free = ",".join("pqr"[:axes]), ",".join("hwd"[:axes]), dict.fromkeys("pqr", 6)
    amounts = np.array([0, 0, *[1] * axes, 0, 0, *[2] * axes])
    head = f"g (float[N,2,{x}] x) => (float[N,2,{y}] y) {{ p = Pad(x, a) "
    fused(head + f"y = AveragePool<kernel_shape={[3] * axes}>(p) }}", [1] * axes + [2] * axes, sizes=free, a=amounts)


AVERAGE, MAXIMUM = "AveragePool<kernel_shape=[3,3]", "MaxPool<kernel_shape=[3,3]"
NEAR_MISSES = {
    "zeros win over negatives": f"g ({X}) => ({Y}) {{ p = Pad(x, a) y = {MAXIMUM}>(p) }}",
    "one wins over less": f"g ({X}) => ({Y}) {{ r = Relu(x) p = Pad(r, a, one) y = {MAXIMUM}>(p) }}",
    "clipped below zero": f"g ({X}) => ({Y}) {{ r = Clip(x, minus) p = Pad(r, a) y = {MAXIMUM}>(p) }}",
    "no longer positive": f"g ({X}) => ({Y}) {{ q = Relu(x) r = Neg(q) p = Pad(r, a) y = {MAXIMUM}>(p) }}",
    "average of something else": f"g ({X}) => ({Y}) {{ p = Pad(x, a, one) y = {AVERAGE}>(p) }}",
    "own pads are not counted": f"g ({X}) => ({Y}) {{ p = Pad(x, small) y = {AVERAGE}, pads=[1,1,1,1]>(p) }}",
    "average rounds up": f"g ({X}) => ({Y}) {{ p = Pad(x, a) y = {AVERAGE}, strides=[2,2], ceil_mode=1>(p) }}",
    "maximum rounds up": f"g ({X}) => ({Y}) {{ p = Pad(x, a, inf) y = {MAXIMUM}, strides=[2,2], ceil_mode=1>(p) }}",
    "as wide as the kernel": f"g ({X}) => ({Y}) {{ p = Pad(x, a) y = AveragePool<kernel_shape=[2,2]>(p) }}",
    "dilated": f"g ({X}) => ({Y}) {{ p = Pad(x, a, inf) y = {MAXIMUM}, dilations=[2,2]>(p) }}",
    "indices": f"g ({X}) => ({Y}, int64[N,2,h,w] i) {{ p = Pad(x, a, inf) y, i = {MAXIMUM}>(p) }}",
    "another reader": f"g ({X}) => ({Y}, float[N,2,9,8] z) {{ p = Pad(x, a) y = {AVERAGE}>(p) z = Relu(p) }}",
    "model output": f"g ({X}) => ({Y}, float[N,2,9,8] p) {{ p = Pad(x, a) y = {AVERAGE}>(p) }}",
    "reflect": f'g ({X}) => ({Y}) {{ p = Pad<mode="reflect">(x, a) y = {AVERAGE}>(p) }}',
    "channels": f"g (float[N,1,6,7] x) => ({Y}) {{ p = Pad(x, channels) y = {AVERAGE}>(p) }}",
    "SAME of an unknown size": (
        f"g (float[N,2,q,r] x) => ({Y}) {{ p = Pad(x, a, inf) "
        f'y = {MAXIMUM}, auto_pad="SAME_UPPER", strides=[2,2]>(p) }}'
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name):
    small, channels = np.array([0, 0, 1, 0, 0, 0, 1, 0]), np.array([0, 1, 0, 0, 0, 0, 0, 0])
    before = model(NEAR_MISSES[name], small=small, channels=channels, **VALUES)
    after, result = apply(FusePadIntoPool(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"q": 5, "r": 6})


def test_integers_are_left_alone():
    before = model(
        "g (uint8[N,2,6,7] x) => (uint8[N,2,h,w] y) { p = Pad(x, a) y = MaxPool<kernel_shape=[3,3]>(p) }", a=PADS
    )
    _, result = apply(FusePadIntoPool(), before)
    assert result.rewrites == 0 and len(result.misses) == 1


def test_negative_pads_of_the_pool_are_left_alone():
    text = f"g ({X}) => ({Y}) {{ p = Pad(x, a, inf) y = MaxPool<kernel_shape=[3,3], pads=[-1,0,0,0]>(p) }}"
    result = FusePadIntoPool().apply(graph_of(model(text, **VALUES)))
    assert result.rewrites == 0 and len(result.misses) == 1


def test_other_forms_are_not_the_pattern():
    before = model(f"g ({X}) => ({Y}) {{ p = Pad(x, a) r = Relu(p) y = {MAXIMUM}>(r) }}", a=PADS)
    _, result = apply(FusePadIntoPool(), before)
    assert result.rewrites == 0 and not result.misses


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g ({X}) => ({Y}) {{ p = Pad(x, a) y = ours.AveragePool<kernel_shape=[3,3]>(p) }}"""
    result = FusePadIntoPool().apply(graph_of(model(text, a=PADS)))
    assert result.rewrites == 0 and not result.misses


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 1), min_size=8, max_size=8),
    st.tuples(st.integers(3, 4), st.integers(3, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.booleans(),
)
def test_random_layers(pads, kernel, strides, average):
    amounts = np.array([0, 0, *pads[:2], 0, 0, *pads[2:4]])
    attrs = f"kernel_shape={list(kernel)}, strides={list(strides)}, pads={pads[4:]}"
    call = f"AveragePool<{attrs}, count_include_pad=1>(p)" if average else f"MaxPool<{attrs}>(p)"
    text = f"g ({X}) => ({Y}) {{ p = Pad(x, a{'' if average else ', inf'}) y = {call} }}"
    fused(text, [p + q for p, q in zip(pads[:4], pads[4:], strict=True)], **{**VALUES, "a": amounts})
