"""Matrix products of one input in a sum, and skips around one: structure, numbers, near misses."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.fuse_parallel_gemms import FuseParallelGemms
from onnxcompress.testing import apply, assert_equivalent, model, ops

REL = 2.5e-6  # measured 2.6e-7


def normal(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


WEIGHTS = {"A": normal(8, 8), "B": normal(8, 8, seed=1), "b": normal(8), "c": normal(8, seed=1), "W": normal(8, 5)}
X, Y = "float[N,T,8] x", "float[N,T,8] y"
X2, Y2 = "float[N,8] x", "float[N,8] y"


def build(text):
    return model(text, **{k: v for k, v in WEIGHTS.items() if re.search(rf"\b{k}\b", text)})


@pytest.mark.parametrize(
    ("text", "after_ops"),
    [
        (f"g ({X}) => ({Y}) {{ s = MatMul(x, A) t = MatMul(x, B) y = Add(s, t) }}", ["MatMul"]),
        (f"g ({X}) => ({Y}) {{ m = MatMul(x, A) s = Add(m, b) t = MatMul(x, B) y = Sub(t, s) }}", ["MatMul", "Add"]),
        (f"g ({X2}) => ({Y2}) {{ s = Gemm(x, A, b) t = Gemm<transB=1>(x, B, c) y = Add(s, t) }}", ["Gemm"]),
        (f"g ({X2}) => ({Y2}) {{ s = Gemm(x, A, b) t = Gemm(x, B) y = Sum(s, t, x) }}", ["Gemm"]),
        (f"g ({X}) => ({Y}) {{ s = MatMul(x, A) y = Add(x, s) }}", ["MatMul"]),
        (f"g ({X}) => ({Y}) {{ m = MatMul(x, A) s = Add(m, b) y = Sub(x, s) }}", ["MatMul", "Add"]),
        (f"g ({X2}) => ({Y2}) {{ s = Gemm(x, A, b) y = Sub(s, x) }}", ["Gemm"]),
        ("g (float[8] x) => (float[8] y) { s = MatMul(x, A) y = Add(s, x) }", ["MatMul"]),
    ],
)
def test_merges(text, after_ops):
    before = build(text)
    after, result = apply(FuseParallelGemms(), before)
    assert result.rewrites == 1 and ops(after) == after_ops
    assert_equivalent(before, after, rel=REL)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f"""g ({X}) => (float[N,T,5] y) {{
              s = MatMul(x, W) t = MatMul(x, A) u = Slice(t, z, five, two) y = Add(s, u) }}""",
            None,
        ),
        (f"g ({X}, {X.replace(' x', ' v')}) => ({Y}) {{ s = MatMul(x, A) t = MatMul(v, B) y = Add(s, t) }}", None),
        (f"g ({X}) => ({Y}, {Y.replace(' y', ' s')}) {{ s = MatMul(x, A) t = MatMul(x, B) y = Add(s, t) }}", None),
        (f"g ({X}) => ({Y}) {{ s = MatMul(x, A) r = Relu(x) y = Add(s, r) }}", None),
        (f"g ({X}) => ({Y}) {{ s = MatMul(x, A) y = Mul(s, x) }}", None),
        ("g (float[N,1] x) => (float[N,8] y) { s = MatMul(x, R) y = Add(s, x) }", "square"),
        ("g (float[N,8] x) => (float[N,8] y) { s = MatMul(x, A) t = MatMul(x, V) y = Add(s, t) }", "different shapes"),
    ],
)
def test_near_miss_is_left_alone(text, reason):
    more = {"R": normal(1, 8), "V": normal(8, 1), "z": np.array([0]), "five": np.array([5]), "two": np.array([2])}
    before = model(text, **{k: v for k, v in {**WEIGHTS, **more}.items() if re.search(rf"\b{k}\b", text)})
    after, result = apply(FuseParallelGemms(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert [reason in miss.reason for miss in result.misses] == ([True] if reason else [])
    assert_equivalent(before, after)


def test_the_constant_row_of_a_matmul_is_no_skip():
    before = build(f"g ({X}) => ({Y}) {{ s = MatMul(x, A) y = Add(s, b) }}")
    after, result = apply(FuseParallelGemms(), before)
    assert result.rewrites == 0 and ops(after) == ["MatMul", "Add"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2), st.booleans())
def test_random_sums(seed, axes, width, products, subtract):
    rng = np.random.default_rng(seed)
    lines, weights, terms = [], {}, ["x"] if rng.random() < 0.5 or not products else []
    for i in range(products + 1):
        weights[f"W{i}"] = rng.normal(size=(width, width)).astype(np.float32)
        lines.append(f"m{i} = MatMul(x, W{i})")
        if rng.random() < 0.5:
            weights[f"b{i}"] = rng.normal(size=width).astype(np.float32)
            lines.append(f"t{i} = Add(m{i}, b{i})")
        terms.append(f"t{i}" if f"b{i}" in weights else f"m{i}")
    terms = [terms[i] for i in rng.permutation(len(terms))]
    op = "Sub" if subtract and len(terms) == 2 else "Sum"
    shape = [*rng.integers(1, 4, axes - 1), width]
    kind = f"float[{','.join(map(str, shape))}]"
    before = model(f"g ({kind} x) => ({kind} y) {{ {' '.join(lines)} y = {op}({', '.join(terms)}) }}", **weights)
    after, result = apply(FuseParallelGemms(), before)
    if len(terms) > 1:
        assert (
            result.rewrites == 1 and "MatMul" in {*ops(after), "MatMul" if axes == 2 else ""} and len(ops(after)) <= 2
        )
    assert_equivalent(before, after, rel=1e-5)  # cancellation between few terms: measured 1.4e-6 at worst of 1500
