"""A Conv and the Gemm that reads it flattened."""

import numpy as np
import pytest

from onnxcompress.linear import Affine, ConvOp, compose_affine, conv_as_matrix
from onnxcompress.passes.fuse_conv_into_flatten_gemm import FuseConvIntoFlattenGemm, through
from onnxcompress.testing import apply, assert_equivalent, model, ops


def normal(*shape, seed=0):
    scale = 1 / np.sqrt(np.prod(shape[1:]))
    return (np.random.default_rng(seed + sum(shape)).normal(size=shape) * scale).astype(np.float32)


def fused(before, rel=8e-6):
    after, result = apply(FuseConvIntoFlattenGemm(), before)
    assert_equivalent(before, after, rel=rel)  # measured 8.1e-7 at worst
    return after, result


@pytest.mark.parametrize("flatten", ["Flatten(c)", "Flatten<axis=-3>(c)", "Reshape(c, s)", "Reshape(c, z)"])
@pytest.mark.parametrize("gemm", ["Gemm(f, G, g)", "Gemm<transB=1, alpha=0.5>(f, K)", "MatMul(f, G)"])
def test_forms(flatten, gemm):
    text = f"""g (float[N,2,6,5] x) => (float[N,3] y) {{
        c = Conv<pads=[1,0,1,2], strides=[2,1]>(x, A, a) f = {flatten} y = {gemm}
    }}"""
    constants = {"A": normal(8, 2, 3, 2), "a": normal(8), "G": normal(144, 3), "g": normal(3), "K": normal(3, 144)}
    constants |= {"s": np.array([-1, 144]), "z": np.array([0, -1])}
    used = {name: v for name, v in constants.items() if f" {name}" in f"(x, A, a) {flatten} {gemm}"}
    after, result = fused(model(text, **used))
    assert ops(after) == ["Flatten", "Gemm"]
    assert "Conv 3x2, Gemm -> Gemm" in result.done[0].detail


@pytest.mark.parametrize(
    ("size", "kernel", "attrs"), [("9", [3], "dilations=[2]"), ("3,4,5", [2, 1, 3], "pads=[0,0,1,1,0,0]")]
)
def test_other_ranks_and_groups(size, kernel, attrs):
    nodes = f"c = Conv<{attrs}, group=2>(x, A, a) f = Flatten(c) y = Gemm(f, G, g)"
    text = f"g (float[N,2,{size}] x) => (float[N,3] y) {{ {nodes} }}"
    conv = ConvOp(np.zeros((8, 1, *kernel), np.float32), None, *geometry(attrs, len(kernel)), 2)
    rows = 8 * int(np.prod(conv.output_size([int(n) for n in size.split(",")])))
    after, _ = fused(model(text, A=normal(8, 1, *kernel), a=normal(8), G=normal(rows, 3), g=normal(3)))
    assert ops(after) == ["Flatten", "Gemm"]


def geometry(attrs, axes):
    found = dict(item.split("=") for item in attrs.split(", "))
    ones, pads = (1,) * axes, eval(found.get("pads", str([0] * 2 * axes)))
    return ones, tuple(eval(found.get("dilations", str(list(ones))))), tuple(pads[:axes]), tuple(pads[axes:])


@pytest.mark.parametrize("seed", range(8))
def test_through_is_the_product_with_the_matrix_of_the_conv(seed):
    rng = np.random.default_rng(seed)
    axes = 1 + seed % 3
    group = 1 + seed % 2
    kernel = rng.integers(1, 4, axes)
    weight = rng.normal(size=(4, 2 // group, *kernel))
    strides, dilations, begin, end = (tuple(map(int, rng.integers(low, 3, axes))) for low in (1, 1, 0, 0))
    conv = ConvOp(weight, rng.normal(size=4), strides, dilations, begin, end, group)
    sizes = [int(n) for n in rng.integers(5, 8, axes)]
    affine = Affine(rng.normal(size=(4 * int(np.prod(conv.output_size(sizes))), 3)), rng.normal(size=3))
    expected, actual = compose_affine(Affine(*conv_as_matrix(conv, sizes)), affine), through(conv, sizes, affine)
    np.testing.assert_allclose(actual.matrix, expected.matrix, rtol=0, atol=1e-13)  # measured 1.8e-15
    np.testing.assert_allclose(actual.bias, expected.bias, rtol=0, atol=1e-13)  # measured 1.4e-14


def test_a_conv_that_shrinks_its_input_stays():
    text = "g (float[N,16,8,8] x) => (float[N,64] y) { c = Conv<strides=[2,2]>(x, A) f = Flatten(c) y = MatMul(f, G) }"
    before = model(text, A=normal(8, 16, 2, 2), G=normal(128, 64))
    after, result = apply(FuseConvIntoFlattenGemm(), before)
    assert ops(after) == ops(before) and "would" in result.misses[0].reason


CONV = "c = Conv(x, A)"
DYNAMIC = f"g (float[N,2,H,5] x) => (float[N,3] y) {{ {CONV} f = Flatten(c) y = MatMul(f, G) }}"
LIVE = f"g (float[N,2,6,5] x, float[240,3] U) => (float[N,3] y) {{ {CONV} f = Flatten(c) y = MatMul(f, U) }}"


@pytest.mark.parametrize(("text", "reason"), [(DYNAMIC, "dynamic"), (LIVE, "not a constant")])
def test_near_miss_is_left_alone(text, reason):
    constants = {"A": normal(8, 2, 1, 1), "G": normal(240, 3)}
    before = model(text, **{name: v for name, v in constants.items() if f" {name})" in text})
    after, result = apply(FuseConvIntoFlattenGemm(), before)
    assert ops(after) == ops(before) and reason in result.misses[0].reason
    assert_equivalent(before, after, sizes={"H": 6})


@pytest.mark.parametrize(
    ("outputs", "nodes"),
    [
        ("float[N,3] y, float[N,8,6,5] c", "f = Flatten(c) y = MatMul(f, G)"),
        ("float[N,3] y, float[N,240] f", "f = Flatten(c) y = MatMul(f, G)"),
        ("float[N,3] y", "r = Relu(c) f = Flatten(r) y = MatMul(f, G)"),
        ("float[a,3] y", "f = Flatten<axis=2>(c) y = MatMul(f, K)"),
        ("float[a,3] y", "f = Reshape(c, s) y = MatMul(f, K)"),
    ],
)
def test_another_thing_is_left_alone(outputs, nodes):
    constants = {"A": normal(8, 2, 1, 1), "G": normal(240, 3), "K": normal(30, 3), "s": np.array([-1, 30])}
    used = {name: v for name, v in constants.items() if f" {name})" in CONV + nodes}
    before = model(f"g (float[N,2,6,5] x) => ({outputs}) {{ {CONV} {nodes} }}", **used)
    after, result = apply(FuseConvIntoFlattenGemm(), before)
    assert ops(after) == ops(before) and result.rewrites == 0
