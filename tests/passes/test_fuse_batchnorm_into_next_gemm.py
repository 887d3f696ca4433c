"""BatchNormalization and constants per channel before Gemm and MatMul: structure, numbers, near misses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.fuse_batchnorm_into_next_gemm import FuseBatchNormIntoNextGemm
from onnxcompress.rewrite import Settings
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
REL = 3e-6  # measured 5.0e-7 over 2000 random layers
X = "float[N,5] x"
Y = "float[N,6] y"
BN = "a = BatchNormalization(x, s, B, m, v)"
IMAGE = "float[N,3,4,2] x"


def weights(channels=5, rows=5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "W": rng.normal(size=(rows, 6)).astype(F),
        "c": rng.normal(size=6).astype(F),
        **{name: rng.normal(size=channels).astype(F) for name in "sBm"},
        "v": rng.uniform(0.1, 2, channels).astype(F),
        "k": rng.uniform(0.5, 2, channels).astype(F),
        "t": rng.normal(size=channels).astype(F),
        "six": np.array([6], F),
    }


def fused(text, expected, *, opset=17, sizes=None, feeds=None, **constants):
    before = model(text, opset=opset, **constants)
    after, result = apply(FuseBatchNormIntoNextGemm(), before)
    assert result.rewrites == 1 and ops(after) == expected
    assert_equivalent(before, after, rel=REL, sizes=sizes, feeds=feeds)
    _, again = apply(FuseBatchNormIntoNextGemm(), after)
    assert again.rewrites == 0
    return after


@pytest.mark.parametrize("opset", [7, 11, 13])
@pytest.mark.parametrize("attrs", ["", "<transB=1>", "<alpha=0.5, beta=-2.0>"])
@pytest.mark.parametrize("c", [(6,), (1, 6), (1,), (1, 1), ()])
def test_batchnorm_into_gemm(attrs, c, opset):
    constants = weights()
    constants["c"] = np.random.default_rng(5).normal(size=c).astype(F)
    if "transB" in attrs:
        constants["W"] = np.ascontiguousarray(constants["W"].T)
    fused(f"g ({X}) => ({Y}) {{ {BN} y = Gemm{attrs}(a, W, c) }}", ["Gemm"], opset=opset, **constants)


@pytest.mark.parametrize("call", ["Gemm(a, W)", "MatMul(a, W)"])
def test_makes_a_bias_where_there_was_none(call):
    fused(f"g ({X}) => ({Y}) {{ {BN} y = {call} }}", ["Gemm"], **weights())


@pytest.mark.parametrize("call", ["Mul(x, k)", "Div(x, six)", "Add(t, x)", "Sub(t, x)", "Neg(x)"])
def test_constants_into_gemm(call):
    fused(f"g ({X}) => ({Y}) {{ a = {call} y = Gemm(a, W, c) }}", ["Gemm"], **weights())


@pytest.mark.parametrize("x", ["N,5", "A,B,5", "5"])
@pytest.mark.parametrize("call", ["Mul(x, k)", "Div(x, six)", "Neg(x)"])
def test_scale_into_matmul_of_any_rank(x, call):
    text = f"g (float[{x}] x) => (float[{x.replace('5', '6')}] y) {{ a = {call} y = MatMul(a, W) }}"
    fused(text, ["MatMul"], **weights())


def test_scale_into_a_batch_of_matrices():
    constants = {**weights(), "W": np.random.default_rng(1).normal(size=(3, 5, 6)).astype(F)}
    fused("g (float[3,N,5] x) => (float[3,N,6] y) { a = Mul(x, k) y = MatMul(a, W) }", ["MatMul"], **constants)


@pytest.mark.parametrize("call", ["Add(p, c)", "Add(c, p)", "Sub(p, c)", "Sub(c, p)"])
@pytest.mark.parametrize("shape", [(6,), (1, 1, 6), (1,), ()])
def test_shift_joins_the_bias_behind_a_matmul(call, shape):
    """The affine part of a decomposed LayerNormalization before a linear layer."""
    constants = {**weights(), "c": np.random.default_rng(5).normal(size=shape).astype(F)}
    calls = f"b = Mul(x, k) a = Add(b, t) p = MatMul(a, W) y = {call}"
    fused(f"g (float[A,B,5] x) => (float[A,B,6] y) {{ {calls} }}", ["MatMul", call[:3]], **constants)


def test_three_projections_take_it_in():
    calls = "b = Mul(x, k) a = Add(b, t) "
    calls += " ".join(f"p{i} = MatMul(a, W) y{i} = Add(p{i}, c)" for i in range(3))
    outputs = ", ".join(f"float[A,B,6] y{i}" for i in range(3))
    fused(f"g (float[A,B,5] x) => ({outputs}) {{ {calls} }}", ["MatMul", "Add"] * 3, **weights())


def test_new_add_where_nodes_are_saved_all_the_same():
    calls = "b = Mul(x, k) a = Add(b, t) y = MatMul(a, W)"
    fused(f"g (float[A,B,5] x) => (float[A,B,6] y) {{ {calls} }}", ["MatMul", "Add"], **weights())


def test_shape_reads_the_source():
    text = f"g ({X}) => ({Y}, int64[2] z) {{ a = Mul(x, k) y = MatMul(a, W) z = Shape(a) }}"
    after = fused(text, ["MatMul", "Shape"], **weights())
    assert after.graph.node[1].input[0] == "x"


@pytest.mark.parametrize(
    "flat",
    [
        "Flatten(a)",
        "Flatten<axis=-3>(a)",
        "Reshape(a, keep)",
        "Reshape(a, full)",
        "Reshape(a, rows)",
        "Reshape(a, batch)",
    ],
)
@pytest.mark.parametrize("linear", ["Gemm(f, W, c)", "MatMul(f, W)"])
def test_channels_are_repeated_over_positions(flat, linear):
    shapes = {"keep": [0, -1], "full": [0, 24], "rows": [-1, 24], "batch": [2, 24]}
    constants = weights(3, 24) | {name: np.array(shape) for name, shape in shapes.items()}
    fused(f"g ({IMAGE}) => ({Y}) {{ {BN} f = {flat} y = {linear} }}", [flat[:7].rstrip("("), "Gemm"], **constants)


@pytest.mark.parametrize("flat", ["Flatten(a)", "Reshape(a, keep)"])
def test_sizes_need_not_be_known(flat):
    constants = weights(3, 24) | {"keep": np.array([0, -1])}
    text = f"g (float[N,3,p,q] x) => ({Y}) {{ {BN} f = {flat} y = Gemm(f, W, c) }}"
    fused(text, [flat[:7].rstrip("("), "Gemm"], sizes={"p": 4, "q": 2}, **constants)


def test_batchnorm_knows_its_channels():
    text = f"g (float[N,d,4,2] x) => ({Y}) {{ {BN} f = Flatten(a) y = Gemm(f, W, c) }}"
    fused(text, ["Flatten", "Gemm"], sizes={"d": 3}, **weights(3, 24))


@pytest.mark.parametrize("x", ["N,3,p,q", "N,3,p"])
def test_mean_of_an_affine_map(x):
    constants = weights(3, 3)
    text = f"g (float[{x}] x) => ({Y}) {{ {BN} g = GlobalAveragePool(a) f = Flatten(g) y = Gemm(f, W, c) }}"
    fused(text, ["GlobalAveragePool", "Flatten", "Gemm"], sizes={"p": 4, "q": 5}, **constants)


def test_run_of_nodes_is_folded_at_once():
    constants = weights(3, 24)
    constants["k"], constants["t"] = constants["k"].reshape(3, 1, 1), constants["t"].reshape(1, 3, 1, 1)
    calls = "b = Mul(x, k) d = Sub(t, b) e = Div(d, six) a = BatchNormalization(e, s, B, m, v)"
    fused(f"g ({IMAGE}) => ({Y}) {{ {calls} f = Flatten(a) y = Gemm(f, W, c) }}", ["Flatten", "Gemm"], **constants)


def test_scalar_needs_no_rank():
    text = f"""g ({X}, int64[r] shape) => (float[N,6] y)
    {{ u = Reshape(x, shape) a = Div(u, six) p = MatMul(a, W) y = Flatten<axis=-1>(p) }}"""
    feeds = [{"x": np.random.default_rng(3).normal(size=(4, 5)).astype(F), "shape": np.array([2, 2, 5])}]
    fused(text, ["Reshape", "MatMul", "Flatten"], feeds=feeds, **weights())


ROWS = "g (float[A,5,B] x) => (float[A,5,6] y)"
NEAR_MISSES = {
    "model output": f"g ({X}) => ({Y}, float[N,5] a) {{ {BN} y = Gemm(a, W) }}",
    "another reader": f"g ({X}) => ({Y}, float[N,5] z) {{ {BN} y = Gemm(a, W) z = Relu(a) }}",
    "transA": f"g (float[5,5] x) => (float[5,6] y) {{ {BN} y = Gemm<transA=1>(a, W) }}",
    "C is an input": f"g ({X}, float[6] u) => ({Y}) {{ {BN} y = Gemm(a, W, u) }}",
    "C per row": f"g (float[3,5] x) => (float[3,6] y) {{ {BN} y = Gemm(a, W, r) }}",
    "scale is an input": f"g ({X}, float[5] u) => ({Y}) {{ a = BatchNormalization(x, u, B, m, v) y = Gemm(a, W) }}",
    "matrices of two heights": (
        f"g ({IMAGE}) => ({Y}, float[A,6] z) {{ {BN} f = Flatten(a) y = Gemm(f, W24) z = MatMul(f, W1) }}"
    ),
    "per row": "g (float[5,5] x) => (float[5,6] y) { a = Mul(x, column) y = MatMul(a, W) }",
    "columns may broadcast": f"g (float[N,q] x) => ({Y}) {{ a = Mul(x, k) y = MatMul(a, W) }}",
    "one new Add for one": "g (float[A,B,5] x) => (float[A,B,6] y) { a = Add(x, t) y = MatMul(a, W) }",
    "constant behind it per position": (
        "g (float[A,2,5] x) => (float[A,2,6] y) { a = Add(x, t) p = MatMul(a, W) y = Add(p, positions) }"
    ),
    "rank unknown": (
        f"g ({X}, int64[r] i) => ({Y}) {{ u = Reshape(x, i) a = Mul(u, k) p = MatMul(a, W) y = Flatten<axis=-1>(p) }}"
    ),
    "vector": "g (float[N,5] x) => (float[N] y) { a = Mul(x, k) y = MatMul(a, t) }",
    "underflow": f"g ({X}) => ({Y}) {{ a = Mul(x, tiny) y = Gemm(a, W) }}",
    "MatMul underflow": f"g ({X}) => ({Y}) {{ a = Mul(x, tiny) y = MatMul(a, W) }}",
    "shift of a batch": "g (float[3,N,5] x) => (float[3,N,6] y) { b = Mul(x, k) a = Add(b, t) y = MatMul(a, W3) }",
}
SQUARE = "float[N,4,6,2] x"
FLAT_NEAR_MISSES = {
    "flattened elsewhere": "f = Flatten<axis=2>(a) y = Gemm(f, W12)",
    "reshaped elsewhere": "f = Reshape(a, halves) y = Gemm(f, W24)",
    "three axes": "f = Reshape(a, three) y = MatMul(f, W12)",
    "read twice": "f = Flatten(a) y = Gemm(f, W48) z = Relu(f)",
    "pooled after": "u = Reshape(a, twice) q = GlobalAveragePool(u) f = Flatten(q) y = Gemm(f, W4)",
}
FLAT_WEIGHTS = {f"W{rows}": np.random.default_rng(rows).normal(size=(rows, 6)).astype(F) for rows in (4, 12, 24, 48)}
FLAT_WEIGHTS |= {"halves": np.array([-1, 24]), "three": np.array([0, 4, 12]), "twice": np.array([-1, 4, 6])}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name):
    rng = np.random.default_rng(9)
    extra = {f"W{rows}": rng.normal(size=(rows, 6)).astype(F) for rows in (1, 24)}
    extra |= {"r": np.ones((3, 1), F), "column": np.ones((5, 1), F), "tiny": np.array(1e-40, F)}
    extra |= {"positions": np.ones((2, 1), F), "W3": rng.normal(size=(3, 5, 6)).astype(F)}
    channels = 3 if "3,4,2" in NEAR_MISSES[name] else 5
    before = model(NEAR_MISSES[name], **{**weights(channels), **extra})
    after, result = apply(FuseBatchNormIntoNextGemm(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    if name == "rank unknown":
        assert_equivalent(before, after, feeds=[{"x": np.ones((4, 5), F), "i": np.array([2, 2, 5])}])
    elif name != "matrices of two heights":
        assert_equivalent(before, after, sizes={"q": 5})


@pytest.mark.parametrize("name", FLAT_NEAR_MISSES)
def test_other_rows_are_left_alone(name):
    outputs = {"read twice": "float[M,6] y, float[N,48] z", "three axes": "float[N,4,6] y"}.get(name, "float[M,6] y")
    before = model(f"g ({SQUARE}) => ({outputs}) {{ {BN} {FLAT_NEAR_MISSES[name]} }}", **weights(4), **FLAT_WEIGHTS)
    after, result = apply(FuseBatchNormIntoNextGemm(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after)


@pytest.mark.parametrize("reshape", ["Reshape(a, i)", "Reshape<allowzero=1>(a, zero)"])
def test_shapes_that_may_move_samples_are_left_alone(reshape):
    text = f"g (float[N,4,p,q] x, int64[2] i) => ({Y}) {{ {BN} f = {reshape} y = Gemm(f, W48) }}"
    graph = graph_of(model(text, zero=np.array([0, 48]), **weights(4), **FLAT_WEIGHTS))
    result = FuseBatchNormIntoNextGemm().apply(graph)
    assert result.rewrites == 0 and len(result.misses) == 1


def test_scalar_that_a_constant_makes_a_row_is_left_alone():
    text = "g (float[N] x, int64[r] i) => (float[n,6] y) { u = Reshape(x, i) a = Mul(u, six) y = MatMul(a, W1) }"
    before = model(text, W1=np.ones((1, 6), F), **weights())
    after, result = apply(FuseBatchNormIntoNextGemm(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)


@pytest.mark.parametrize(
    "calls",
    [
        f"{BN} r = Relu(a) y = Gemm(r, W)",
        "a = Mul(x, x) y = Gemm(a, W)",
        "a = Div(six, x) y = Gemm(a, W)",
        f"{BN} y = MatMul(a, u)",
        "a = Mul(u, six) y = MatMul(x, a)",
        "a = Neg(row) y = Gemm(a, W)",
        f"{BN} f = Flatten(a) y = Relu(f)",
    ],
)
def test_other_forms_are_not_the_pattern(calls):
    before = model(f"g ({X}, float[5,6] u) => (float[N,n] y) {{ {calls} }}", row=np.ones((1, 5), F), **weights())
    _, result = apply(FuseBatchNormIntoNextGemm(), before)
    assert result.rewrites == 0 and not result.misses


def test_reader_in_a_branch_keeps_the_node():
    branch = "g{0} () => (float[N,6] y{0}) {{ y{0} = MatMul(a, W) }}"
    text = (
        f"g ({X}, bool p) => ({Y}, float[N,6] z) {{ {BN} z = MatMul(a, W) "
        f"y = If (p) <then_branch={branch.format(1)}, else_branch={branch.format(2)}> }}"
    )
    before = model(text, **weights())
    after, result = apply(FuseBatchNormIntoNextGemm(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after)


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_large_shared_matrix_is_not_copied(op):
    before = model(f"g ({X}) => ({Y}, float[N,6] z) {{ {BN} y = {op}(a, W) z = MatMul(x, W) }}", **weights())
    _, result = apply(FuseBatchNormIntoNextGemm(Settings(max_constant_bytes=119)), before)
    assert result.rewrites == 0 and "shared" in result.misses[0].reason
    after, result = apply(FuseBatchNormIntoNextGemm(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after, rel=REL)


def test_overflow_of_the_bias_in_half_precision():
    constants = {name: values.astype(np.float16) for name, values in weights().items()}
    constants["t"][:], constants["W"][:] = 30, 1e4
    text = "g (float16[A,B,5] x) => (float16[A,B,6] y) { b = Mul(x, k) a = Add(b, t) p = MatMul(a, W) y = Add(p, c) }"
    _, result = apply(FuseBatchNormIntoNextGemm(), model(text, **constants))
    assert result.rewrites == 0 and "does not fit float16" in result.misses[0].reason


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g ({X}) => ({Y}) {{ {BN} y = ours.Gemm(a, W) }}"""
    result = FuseBatchNormIntoNextGemm().apply(graph_of(model(text, **weights())))
    assert result.rewrites == 0 and not result.misses


def check_layer(form, flat, linear, seed):
    constants = weights(3, 24 if flat else 3, seed)
    if flat:
        constants["k"], constants["t"] = constants["k"].reshape(3, 1, 1), constants["t"].reshape(3, 1, 1)
    head = {"batchnorm": BN, "run": "b = Mul(x, k) d = Sub(b, t) a = Div(d, six)"}[form]
    calls = f"{head} f = Flatten(a) y = {linear.format('f')}" if flat else f"{head} y = {linear.format('a')}"
    before = model(f"g ({IMAGE if flat else 'float[N,3] x'}) => ({Y}) {{ {calls} }}", **constants)
    after, result = apply(FuseBatchNormIntoNextGemm(), before)
    assert result.rewrites == 1 and ops(after)[-1] == "Gemm"
    assert_equivalent(before, after, rel=REL)


LAYERS = (
    st.sampled_from(["batchnorm", "run"]),
    st.booleans(),
    st.sampled_from(["Gemm({}, W)", "Gemm({}, W, c)", "MatMul({}, W)"]),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(*LAYERS)
def test_random_layers(form, flat, linear, seed):
    check_layer(form, flat, linear, seed)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(*LAYERS)
def test_many_random_layers(form, flat, linear, seed):
    check_layer(form, flat, linear, seed)
