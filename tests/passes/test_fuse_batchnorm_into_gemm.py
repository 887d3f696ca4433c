"""BatchNormalization after Gemm and MatMul: structure, numbers, near misses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.fuse_batchnorm_into_gemm import FuseBatchNormIntoGemm
from onnxcompress.rewrite import Settings
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
REL = 3e-6  # measured 6.8e-7 over 2000 random layers
X = "float[N,5] x"
Y = "float[N,6] y"
BN = "BatchNormalization(p, s, B, m, v)"


def weights(shape=(5, 6), seed=0, dtype=F):
    rng = np.random.default_rng(seed)
    return {
        "W": rng.normal(size=shape).astype(dtype),
        **{name: rng.normal(size=6).astype(dtype) for name in "sBm"},
        "v": rng.uniform(0.01, 2, 6).astype(dtype),
    }


@pytest.mark.parametrize("opset", [7, 11, 13])
@pytest.mark.parametrize("attrs", ["", "<transB=1>", "<alpha=0.5, beta=-2.0>", "<transA=1, transB=1, beta=3.0>"])
@pytest.mark.parametrize("c", [(6,), (1, 6), (1,), (1, 1), ()])
def test_folds_into_gemm(attrs, c, opset):
    constants = weights((6, 5) if "transB" in attrs else (5, 6))
    constants["c"] = np.random.default_rng(5).normal(size=c).astype(F)
    x = "float[5,N] x" if "transA" in attrs else X
    before = model(f"g ({x}) => ({Y}) {{ p = Gemm{attrs}(x, W, c) y = {BN} }}", opset=opset, **constants)
    after, result = apply(FuseBatchNormIntoGemm(), before)
    assert result.rewrites == 1 and ops(after) == ["Gemm"]
    assert_equivalent(before, after, rel=REL)
    _, again = apply(FuseBatchNormIntoGemm(), after)
    assert again.rewrites == 0


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_makes_a_bias_where_there_was_none(op):
    before = model(f"g ({X}) => ({Y}) {{ p = {op}(x, W) y = {BN} }}", **weights())
    after, result = apply(FuseBatchNormIntoGemm(), before)
    assert result.rewrites == 1 and ops(after) == ["Gemm"]
    assert_equivalent(before, after, rel=REL)


def test_full_c_is_scaled_per_column():
    constants = {**weights(), "c": np.random.default_rng(6).normal(size=(3, 6)).astype(F)}
    before = model(f"g (float[3,5] x) => (float[3,6] y) {{ p = Gemm(x, W, c) y = {BN} }}", **constants)
    after, result = apply(FuseBatchNormIntoGemm(), before)
    assert result.rewrites == 1 and ops(after) == ["Gemm"]
    assert_equivalent(before, after, rel=REL)


def test_shared_matrix_stays_for_the_other_reader():
    text = f"g ({X}) => ({Y}, float[N,6] z) {{ p = MatMul(x, W) y = {BN} z = MatMul(x, W) }}"
    before = model(text, **weights())
    after, result = apply(FuseBatchNormIntoGemm(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after, rel=REL)
    _, result = apply(FuseBatchNormIntoGemm(Settings(max_constant_bytes=119)), before)
    assert result.rewrites == 0 and "shared" in result.misses[0].reason


NEAR_MISSES = {
    "model output": f"g ({X}) => ({Y}, float[N,6] p) {{ p = Gemm(x, W) y = {BN} }}",
    "two readers": f"g ({X}) => ({Y}, float[N,6] z) {{ p = Gemm(x, W) y = {BN} z = Relu(p) }}",
    "scale is an input": f"g ({X}, float[6] t) => ({Y}) {{ p = Gemm(x, W) y = BatchNormalization(p, t, B, m, v) }}",
    "matrix is an input": f"g ({X}, float[5,6] U) => ({Y}) {{ p = Gemm(x, U) y = {BN} }}",
    "C is an input": f"g ({X}, float[6] c) => ({Y}) {{ p = Gemm(x, W, c) y = {BN} }}",
    "C per row": f"g (float[3,5] x) => (float[3,6] y) {{ p = Gemm(x, W, r) y = {BN} }}",
    "rank 3": f"g (float[N,6,5] x) => (float[N,6,6] y) {{ p = MatMul(x, W) y = {BN} }}",
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name):
    before = model(NEAR_MISSES[name], **weights(), r=np.ones((3, 1), F))
    after, result = apply(FuseBatchNormIntoGemm(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after)


def test_overflow_in_half_precision_is_left_alone():
    constants = weights(dtype=np.float16)
    constants["W"][2, 3], constants["s"][3], constants["v"][3] = 6e4, 2, 1
    before = model(f"g (float16[N,5] x) => (float16[N,6] y) {{ p = Gemm(x, W) y = {BN} }}", **constants)
    _, result = apply(FuseBatchNormIntoGemm(), before)
    assert result.rewrites == 0 and "does not fit float16" in result.misses[0].reason


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g ({X}) => ({Y}) {{ p = ours.Gemm(x, W) y = {BN} }}"""
    result = FuseBatchNormIntoGemm().apply(graph_of(model(text, **weights())))
    assert result.rewrites == 0 and not result.misses


def check_layer(op, seed):
    before = model(f"g ({X}) => ({Y}) {{ p = {op}(x, W) y = {BN} }}", **weights(seed=seed))
    after, result = apply(FuseBatchNormIntoGemm(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after, rel=REL)


LAYERS = (st.sampled_from(["Gemm", "MatMul"]), st.integers(0, 2**32 - 1))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(*LAYERS)
def test_random_layers(op, seed):
    check_layer(op, seed)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(*LAYERS)
def test_many_random_layers(op, seed):
    check_layer(op, seed)
