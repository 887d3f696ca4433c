"""A 1x1 Conv behind the pool that it stood before."""

import numpy as np
import pytest

from onnxcompress.passes.replace_conv_before_pool import ReplaceConvBeforePool
from onnxcompress.testing import apply, assert_equivalent, model, ops


def normal(*shape, seed=0):
    scale = 1 / np.sqrt(np.prod(shape[1:]))
    return (np.random.default_rng(seed + sum(shape)).normal(size=shape) * scale).astype(np.float32)


X, Y = "float[N,4,H,W] x", "float[N,6,h,w] y"
WEIGHTS = {"A": normal(6, 4, 1, 1), "a": normal(6)}


def swapped(before, rel=4e-6, **kwargs):
    after, result = apply(ReplaceConvBeforePool(), before)
    again, second = apply(ReplaceConvBeforePool(), after)
    assert second.rewrites == 0 and ops(again) == ops(after)
    assert_equivalent(before, after, rel=rel, sizes={"H": 7, "W": 8}, **kwargs)  # measured 4.5e-7 at worst
    return after, result


@pytest.mark.parametrize(
    "pool",
    [
        "GlobalAveragePool(c)",
        "ReduceMean<axes=[3,-2]>(c)",
        "AveragePool<kernel_shape=[2,2], strides=[2,2]>(c)",
        "AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(c)",
        "AveragePool<kernel_shape=[3,2], strides=[2,2], ceil_mode=1>(c)",
        'AveragePool<kernel_shape=[3,2], strides=[2,3], auto_pad="SAME_UPPER">(c)',
        "AveragePool<kernel_shape=[2,2], strides=[2,2], count_include_pad=1>(c)",
    ],
)
def test_pools(pool):
    after, result = swapped(model(f"g ({X}) => ({Y}) {{ c = Conv(x, A, a) y = {pool} }}", **WEIGHTS))
    assert ops(after) == [pool[: pool.index("(")].split("<")[0], "Conv"]
    assert "Conv 1x1" in result.done[0].detail


def test_a_counted_padding_is_no_hindrance_without_a_bias():
    text = f"""g ({X}) => ({Y}) {{
        c = Conv<group=2>(x, A)
        y = AveragePool<kernel_shape=[2,2], strides=[2,2], pads=[1,1,1,1], count_include_pad=1>(c)
    }}"""
    after, _ = swapped(model(text, A=normal(6, 2, 1, 1)))
    assert ops(after) == ["AveragePool", "Conv"]


@pytest.mark.parametrize("group", [1, 2])
def test_a_mean_without_axes_makes_a_gemm(group):
    text = f"g ({X}) => (float[N,6] y) {{ c = Conv<group={group}>(x, A, a) y = ReduceMean<axes=[2,3], keepdims=0>(c) }}"
    after, _ = swapped(model(text, A=normal(6, 4 // group, 1, 1), a=normal(6)))
    assert ops(after) == ["ReduceMean", "Gemm"]


@pytest.mark.parametrize(("size", "axes"), [("L", 1), ("D,H,W", 3)])
def test_other_ranks(size, axes):
    twos = [2] * axes
    text = f"""g (float[N,32,{size}] x) => (float[N,48,{",".join("efg"[:axes])}] y) {{
        c = Conv(x, A, a) y = AveragePool<kernel_shape={twos}, strides={twos}>(c)
    }}"""
    after, _ = swapped(model(text, A=normal(48, 32, *[1] * axes), a=normal(48)), feeds=feeds(axes))
    assert ops(after) == ["AveragePool", "Conv"]


def feeds(axes):
    return [{"x": np.random.default_rng(0).normal(size=(2, 32, *[6, 7, 5][:axes])).astype(np.float32)}]


def test_the_weights_are_kept_as_they_are():
    before = model(f"g ({X}) => ({Y}) {{ c = Conv(x, A, a) y = GlobalAveragePool(c) }}", **WEIGHTS)
    after, _ = apply(ReplaceConvBeforePool(), before)
    assert list(after.graph.initializer) == list(before.graph.initializer)


def test_few_channels_after_a_conv_of_many_stay():
    # The pool would run over 512 channels instead of 2, at every position.
    text = """g (float[N,512,16,16] x) => (float[N,2,h,w] y) {
        c = Conv(x, A) y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)
    }"""
    before = model(text, A=normal(2, 512, 1, 1))
    after, result = apply(ReplaceConvBeforePool(), before)
    assert ops(after) == ops(before) and "it would not be faster" in result.misses[0].reason


COUNTED = "c = Conv(x, A, a) y = AveragePool<kernel_shape=[2,2], strides=[2,2], pads=[1,0,0,0], count_include_pad=1>(c)"
STRIDED = "c = Conv<strides=[2,2]>(x, A, a) y = GlobalAveragePool(c)"
LARGER = "c = Conv(x, K, a) y = GlobalAveragePool(c)"


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [(COUNTED, "the bias shrinks"), (STRIDED, "does not have the positions"), (LARGER, "1 along every axis")],
)
def test_near_miss_is_left_alone(nodes, reason):
    constants = {**WEIGHTS, "K": normal(6, 4, 3, 3)}
    before = model(f"g ({X}) => ({Y}) {{ {nodes} }}", **{k: v for k, v in constants.items() if f" {k}" in nodes})
    after, result = apply(ReplaceConvBeforePool(), before)
    assert ops(after) == ops(before) and reason in result.misses[0].reason
    assert_equivalent(before, after, sizes={"H": 7, "W": 8})


@pytest.mark.parametrize(
    "nodes", ["y = GlobalAveragePool(c) z = Relu(c)", "y = MaxPool<kernel_shape=[2,2]>(c) z = Relu(y)"]
)
def test_another_thing_is_left_alone(nodes):
    before = model(f"g ({X}) => ({Y}, float[N,6,d,e] z) {{ c = Conv(x, A, a) {nodes} }}", **WEIGHTS)
    after, result = apply(ReplaceConvBeforePool(), before)
    assert ops(after) == ops(before) and not result.misses
