"""Constants per column (or row) after Gemm and MatMul: structure, numbers, near misses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.fuse_channel_affine_into_gemm import FuseChannelAffineIntoGemm
from onnxcompress.rewrite import Settings
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
REL = 3e-6  # measured 4.9e-7 over 2000 random layers
rng = np.random.default_rng(0)
W = rng.normal(size=(5, 6)).astype(F)
ROW = rng.normal(size=6).astype(F)
COLUMN = rng.normal(size=(6, 1)).astype(F)
SCALAR = np.array(0.3, F)
BIAS = rng.normal(size=6).astype(F)


def fused(text, expected, *, rel, opset=17, **weights):
    before = model(text, opset=opset, **weights)
    after, result = apply(FuseChannelAffineIntoGemm(), before)
    assert result.rewrites == 1 and ops(after) == expected
    assert_equivalent(before, after, rel=rel)
    _, again = apply(FuseChannelAffineIntoGemm(), after)
    assert again.rewrites == 0
    return after


@pytest.mark.parametrize("call", ["Mul(p, k)", "Div(p, k)", "Add(k, p)", "Sub(p, k)", "Sub(k, p)", "Neg(p)"])
@pytest.mark.parametrize("attrs", ["", "<transB=1>", "<alpha=0.5, beta=-2.0>"])
@pytest.mark.parametrize("k", [ROW, ROW[None], SCALAR, SCALAR.reshape(1, 1)])
@pytest.mark.parametrize("c", [None, (6,), (1, 1), (3, 6)])
def test_folds_into_gemm(call, attrs, k, c):
    weights = {"W": W.T if "transB" in attrs else W} | ({} if call == "Neg(p)" else {"k": k})
    if c is not None:
        weights["c"] = np.random.default_rng(7).normal(size=c).astype(F)
    text = f"g (float[3,5] x) => (float[3,6] y) {{ p = Gemm{attrs}(x, W{'' if c is None else ', c'}) y = {call} }}"
    fused(text, ["Gemm"], rel=REL, **weights)


def test_run_into_gemm_is_one_change():
    row = {name: np.random.default_rng(8).uniform(0.5, 2, 6).astype(F) for name in "sBmv"}
    calls = "a = Mul(p, k) d = Sub(r, a) e = Neg(d) y = BatchNormalization(e, s, B, m, v)"
    text = f"g (float[N,5] x) => (float[N,6] y) {{ p = Gemm(x, W, c) {calls} }}"
    fused(text, ["Gemm"], rel=REL, W=W, c=BIAS, k=SCALAR, r=ROW, **row)


def test_scalar_enters_a_gemm_of_unknown_matrices():
    text = "g (float[N,5] x, float[5,n] w, float[n] c) => (float[N,n] y) { p = Gemm<beta=2.0>(x, w, c) y = Div(p, k) }"
    after = fused(text, ["Gemm"], rel=REL, k=SCALAR)
    attrs = {a.name: a.f for a in after.graph.node[0].attribute}
    assert attrs == pytest.approx({"alpha": 1 / 0.3, "beta": 2 / 0.3})


@pytest.mark.parametrize("x", ["N,5", "A,B,5", "5"])
@pytest.mark.parametrize("k", [ROW, SCALAR, SCALAR.reshape(1)])
@pytest.mark.parametrize("call", ["Mul(k, p)", "Div(p, k)", "Neg(p)"])
def test_scales_the_right_matrix(x, k, call):
    weights = {"W": W} | ({} if call == "Neg(p)" else {"k": k})
    y = x.replace("5", "6")
    text = f"g (float[{x}] x) => (float[{y}] y) {{ p = MatMul(x, W) y = {call} }}"
    fused(text, ["MatMul"], rel=REL, **weights)


def test_scales_a_batch_of_right_matrices():
    batch = rng.normal(size=(3, 5, 6)).astype(F)
    fused(
        "g (float[N,5] x) => (float[3,N,6] y) { p = MatMul(x, W) y = Mul(p, k) }", ["MatMul"], rel=REL, W=batch, k=ROW
    )


@pytest.mark.parametrize("k", [COLUMN, COLUMN[None], SCALAR])
@pytest.mark.parametrize("call", ["Mul(k, p)", "Div(p, k)", "Neg(p)"])
def test_scales_the_left_matrix(k, call):
    weights = {"W": W.T} | ({} if call == "Neg(p)" else {"k": k})
    text = f"g (float[A,5,B] x) => (float[A,6,B] y) {{ p = MatMul(W, x) y = {call} }}"
    fused(text, ["MatMul"], rel=REL, **weights)


def test_bias_of_a_matmul_is_scaled_and_stays_an_add():
    text = "g (float[A,B,5] x) => (float[A,B,6] y) { p = MatMul(x, W) a = Add(p, b) y = Mul(a, k) }"
    after = fused(text, ["MatMul", "Add"], rel=REL, W=W, b=BIAS, k=SCALAR)
    assert after.graph.output[0].name == "y"
    text = "g (float[A,5,B] x) => (float[A,6,B] y) { p = MatMul(W, x) a = Mul(p, k) d = Sub(b, a) y = Neg(d) }"
    fused(text, ["MatMul", "Add"], rel=REL, W=W.T, b=COLUMN, k=SCALAR)


def test_rank_need_not_be_known_for_the_right_matrix():
    text = """g (float[N,5] x, int64[r] shape) => (float[N,6] y)
    { u = Reshape(x, shape) p = MatMul(u, W) a = Mul(p, k) f = Flatten<axis=-1>(a) y = Identity(f) }"""
    before = model(text, W=W, k=ROW)
    after, result = apply(FuseChannelAffineIntoGemm(), before)
    assert result.rewrites == 1 and "Mul" not in ops(after)
    feeds = [{"x": rng.normal(size=(4, 5)).astype(F), "shape": np.array([2, 2, 5])}]
    assert_equivalent(before, after, rel=REL, feeds=feeds)


def test_scalar_needs_no_rank_for_the_left_matrix():
    text = """g (float[N,4] x, int64[r] shape) => (float[n,m] y)
    { u = Reshape(x, shape) p = MatMul(U, u) a = Div(p, k) y = Flatten(a) }"""
    before = model(text, U=np.ascontiguousarray(W.T), k=SCALAR)
    after, result = apply(FuseChannelAffineIntoGemm(), before)
    assert result.rewrites == 1 and ops(after) == ["Reshape", "MatMul", "Flatten"]
    feeds = [{"x": rng.normal(size=(5, 4)).astype(F), "shape": np.array([2, 5, 2])}]
    assert_equivalent(before, after, rel=REL, feeds=feeds)


GEMM = "p = Gemm(x, W) y = Mul(p, k)"
LIVE_C = "g (float[N,5] x, float[6] c) => (float[N,6] y) { p = Gemm(x, W, c) y = Mul(p, k) }"
NEAR_MISSES = {
    "model output": (f"g (float[N,5] x) => (float[N,6] y, float[N,6] p) {{ {GEMM} }}", ROW),
    "two readers": (f"g (float[N,5] x) => (float[N,6] y, float[N,6] z) {{ {GEMM} z = Relu(p) }}", ROW),
    "per row": (f"g (float[6,5] x) => (float[6,6] y) {{ {GEMM} }}", COLUMN),
    "one more axis": (f"g (float[N,5] x) => (float[1,N,6] y) {{ {GEMM} }}", ROW[None, None]),
    "C is an input": (LIVE_C, ROW),
    "matrix is an input": ("g (float[N,5] x, float[5,6] w) => (float[N,6] y) { p = Gemm(x, w) y = Mul(p, k) }", ROW),
    "C per row": ("g (float[3,5] x) => (float[3,6] y) { p = Gemm(x, W, r) y = Mul(p, k) }", ROW),
    "shift of an unknown C": (LIVE_C.replace("Mul", "Add"), ROW),
    "MatMul is an output": (
        f"g (float[N,5] x) => (float[N,6] y, float[N,6] p) {{ {GEMM.replace('Gemm', 'MatMul')} }}",
        ROW,
    ),
    "MatMul per row": (f"g (float[6,5] x) => (float[6,6] y) {{ {GEMM.replace('Gemm', 'MatMul')} }}", COLUMN),
    "left matrix, per column": ("g (float[5,6] x) => (float[6,6] y) { p = MatMul(U, x) y = Mul(p, k) }", ROW),
    "left matrix, a vector": ("g (float[5] x) => (float[6,6] y) { p = MatMul(U, x) y = Mul(p, k) }", COLUMN),
    "left matrices, a vector": ("g (float[5] x) => (float[6,6] y) { p = MatMul(U6, x) y = Mul(p, k) }", COLUMN),
    "underflow": (f"g (float[N,5] x) => (float[N,6] y) {{ {GEMM} }}", np.array(1e-40, F)),
    "MatMul underflow": (
        f"g (float[N,5] x) => (float[N,6] y) {{ {GEMM.replace('Gemm', 'MatMul')} }}",
        np.array(1e-40, F),
    ),
    "rounding": (
        "g (float[N,5] x) => (float[N,6] y) { p = Gemm(x, W) a = Add(p, k) y = Sub(a, k) }",
        np.array(2.0**23, F),
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name):
    text, k = NEAR_MISSES[name]
    before = model(text, W=W, U=np.ascontiguousarray(W.T), U6=np.stack([W.T] * 6), k=k, r=np.ones((3, 1), F))
    after, result = apply(FuseChannelAffineIntoGemm(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after)


@pytest.mark.parametrize(
    "calls",
    [
        "p = MatMul(x, W) y = Add(p, k)",
        "p = MatMul(x, W) y = Sub(k, p)",
        "p = MatMul(x, w) y = Mul(p, k)",
        "p = Gemm(x, W) y = Div(k, p)",
        "p = Gemm(x, W) y = Mul(p, p)",
    ],
)
def test_other_forms_are_not_the_pattern(calls):
    before = model(f"g (float[N,5] x, float[5,6] w) => (float[N,6] y) {{ {calls} }}", W=W, k=ROW)
    _, result = apply(FuseChannelAffineIntoGemm(), before)
    assert result.rewrites == 0 and not result.misses


def test_double_precision_does_not_go_through_a_float_attribute():
    text = "g (double[N,5] x, double[5,6] w) => (double[N,6] y) { p = Gemm(x, w) y = Mul(p, k) }"
    before = model(text, k=np.array(0.3))
    _, result = apply(FuseChannelAffineIntoGemm(), before)
    assert result.rewrites == 0 and "float32" in result.misses[0].reason
    after, result = apply(FuseChannelAffineIntoGemm(), model(text, k=np.array(0.25)))
    assert result.rewrites == 1 and ops(after) == ["Gemm"]
    text = "g (double[N,5] x, double[6] c) => (double[N,6] y) { p = Gemm(x, W, c) y = Mul(p, k) }"
    _, result = apply(FuseChannelAffineIntoGemm(), model(text, W=W.astype(np.float64), k=np.array(0.3)))
    assert result.rewrites == 0 and "float32" in result.misses[0].reason


def test_large_shared_matrix_is_not_copied():
    text = "g (float[N,5] x) => (float[N,6] y, float[N,6] z) { p = MatMul(x, W) y = Mul(p, k) z = MatMul(x, W) }"
    before = model(text, W=W, k=ROW)
    _, result = apply(FuseChannelAffineIntoGemm(Settings(max_constant_bytes=W.nbytes - 1)), before)
    assert result.rewrites == 0 and "shared" in result.misses[0].reason
    after, result = apply(FuseChannelAffineIntoGemm(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after, rel=REL)


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g (float[N,5] x) => (float[N,6] y) {{ {GEMM.replace("Gemm", "ours.Gemm")} }}"""
    result = FuseChannelAffineIntoGemm().apply(graph_of(model(text, W=W, k=ROW)))
    assert result.rewrites == 0 and not result.misses


FORMS = ["Mul({0}, {1})", "Div({0}, {1})", "Add({0}, {1})", "Sub({0}, {1})", "Sub({1}, {0})"]


LAYERS = (
    st.sampled_from(["Gemm", "MatMul"]),
    st.lists(st.tuples(st.sampled_from(FORMS), st.booleans()), min_size=2, max_size=5),
    st.integers(0, 2**32 - 1),
)


def check_layer(op, steps, seed):
    random = np.random.default_rng(seed)
    weights, calls, last = {"W": random.normal(size=(5, 6)).astype(F)}, [f"p = {op}(x, W)"], "p"
    for i, (form, scalar) in enumerate(steps):
        sign = random.choice([-1, 1])
        weights[f"k{i}"] = (random.uniform(0.3, 2, () if scalar else 6) * sign).astype(F)
        made = "y" if i == len(steps) - 1 else f"t{i}"
        calls.append(f"{made} = {form.format(last, f'k{i}')}")
        last = made
    before = model(f"g (float[N,5] x) => (float[N,6] y) {{ {' '.join(calls)} }}", **weights)
    after, result = apply(FuseChannelAffineIntoGemm(), before)
    assert result.rewrites == 1 and ops(after) in (["Gemm"], ["MatMul"], ["MatMul", "Add"])
    assert_equivalent(before, after, rel=REL)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(*LAYERS)
def test_random_layers(op, steps, seed):
    check_layer(op, steps, seed)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(*LAYERS)
def test_many_random_layers(op, steps, seed):
    check_layer(op, steps, seed)
