"""Matrix products in a row: structure, numbers, near misses, random chains."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.cost import Price
from onnxcompress.passes.fuse_gemm_chain import FuseGemmChain
from onnxcompress.rewrite import Settings
from onnxcompress.testing import apply, assert_equivalent, model, ops


class AlwaysPays:
    """A matrix product costs ten, anything else one, weights nothing: every merge has fewer."""

    def price(self, specs):
        return Price(float(sum(10 if spec.op in ("Gemm", "MatMul") else 1 for spec in specs)), 0)


PAYS = Settings(cost=AlwaysPays())
REL = 3e-6  # measured 5.1e-7 over 500 random pairs


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed + sum(shape))
    return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)


A, B, b, c = normal(8, 32), normal(32, 6), normal(32, seed=1), normal(6, seed=2)
X2, Y2 = "float[N,8] x", "float[N,6] y"
X3, Y3 = "float[N,T,8] x", "float[N,T,6] y"


@pytest.mark.parametrize(
    ("text", "after_ops"),
    [
        (f"g ({X2}) => ({Y2}) {{ t = Gemm(x, A, b) y = Gemm(t, B, c) }}", ["Gemm"]),
        (f"g ({X2}) => ({Y2}) {{ t = Gemm<alpha=0.5, beta=2.0>(x, A, b) y = Gemm<alpha=3.0>(t, B) }}", ["Gemm"]),
        (f"g ({X2}) => ({Y2}) {{ t = MatMul(x, A) y = MatMul(t, B) }}", ["MatMul"]),
        (f"g ({X3}) => ({Y3}) {{ t = MatMul(x, A) u = Add(b, t) v = MatMul(u, B) y = Add(v, c) }}", ["MatMul", "Add"]),
        (f"g ({X3}) => ({Y3}) {{ t = MatMul(x, A) y = MatMul(t, B) }}", ["MatMul"]),
        ("g (float[8] x) => (float[6] y) { t = MatMul(x, A) y = MatMul(t, B) }", ["MatMul"]),
    ],
)
def test_merges(text, after_ops):
    before = model(text, A=A, B=B, b=b, c=c)
    after, result = apply(FuseGemmChain(), before)  # pays by the estimate: 8x32x6 against 8x6
    assert result.rewrites == 1 and ops(after) == after_ops
    assert result.done[0].detail.startswith("matrices 8x32 + 32x6 -> 8x6, ")
    assert_equivalent(before, after, rel=REL)


def test_transposed_operand_and_shared_matrix():
    text = f"""g ({X2}) => ({Y2}, float[N,32] z) {{
      t = Gemm<transB=1>(x, At, b) y = Gemm(t, B, c) z = Gemm<transB=1>(x, At) }}"""
    before = model(text, At=np.ascontiguousarray(A.T), B=B, b=b, c=c)
    after, result = apply(FuseGemmChain(PAYS), before)
    assert result.rewrites == 1
    assert_equivalent(before, after, rel=REL)


def test_the_best_cut_of_a_chain_is_found():
    """8 -> 64 -> 8 -> 64 -> 8 pays as a whole; 64 -> 4 -> 64 in the middle stays two."""
    wide = {"A": normal(64, 4), "B": normal(4, 64)}
    before = model("g (float[N,64] x) => (float[N,64] y) { t = MatMul(x, A) y = MatMul(t, B) }", **wide)
    after, result = apply(FuseGemmChain(), before)
    assert result.rewrites == 0 and "would" in result.misses[0].reason and ops(after) == ["MatMul", "MatMul"]
    sizes = [32, 256, 4, 256, 32]
    matrices = {f"W{i}": normal(a, z) for i, (a, z) in enumerate(pairwise(sizes))}
    text = """g (float[512,32] x) => (float[512,32] y) {
      a = MatMul(x, W0) b = MatMul(a, W1) c = MatMul(b, W2) y = MatMul(c, W3) }"""
    before = model(text, **matrices)
    after, result = apply(FuseGemmChain(), before)
    shapes = [tuple(tensor.dims) for tensor in after.graph.initializer]
    assert shapes == [(32, 4), (4, 32)] and ops(after) == ["MatMul", "MatMul"]
    assert_equivalent(before, after, rel=REL)


NEAR_MISSES = [
    f"g ({X2}) => ({Y2}, float[N,32] t) {{ t = Gemm(x, A, b) y = Gemm(t, B, c) }}",  # a model output
    f"g ({X2}) => ({Y2}, float[N,32] z) {{ t = Gemm(x, A, b) y = Gemm(t, B, c) z = Relu(t) }}",  # two readers
    f"g ({X2}) => ({Y2}) {{ t = Gemm(x, A, b) r = Relu(t) y = Gemm(r, B, c) }}",  # an activation
    f"g ({X2}, float[32,6] U) => ({Y2}) {{ t = Gemm(x, A, b) y = Gemm(t, U, c) }}",  # not constant
    "g (float[8,N] x) => (float[N,6] y) { t = Gemm<transA=1>(x, A, b) y = Gemm(t, B, c) }",  # transA
    f"g ({X2}) => ({Y2}) {{ t = Gemm(x, A, C) y = Gemm(t, B, c) }}",  # C is not one row
    "g (float[N,8] x) => (float[6,N] y) { t = MatMul(x, A) u = Transpose<perm=[1,0]>(t) y = MatMul(Bt, u) }",
]


@pytest.mark.parametrize("text", NEAR_MISSES)
def test_near_miss_is_left_alone(text):
    weights = {"A": A, "B": B, "b": b, "c": c, "C": normal(2, 32), "Bt": np.ascontiguousarray(B.T)}
    before = model(text, **{k: v for k, v in weights.items() if re.search(rf"\b{k}\b", text)})
    after, result = apply(FuseGemmChain(PAYS), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert_equivalent(before, after)


def test_in_a_branch_of_if_and_never_across_its_border():
    text = f"""g ({X2}, bool k) => ({Y2}) {{
      s = MatMul(x, A)
      y = If (k) <then_branch = p () => (float[N,6] p1) {{ p1 = MatMul(s, B) }},
                  else_branch = q () => (float[N,6] q2) {{ q1 = MatMul(x, A) q2 = MatMul(q1, B) }}>
    }}"""
    before = model(text, A=A, B=B)
    after, result = apply(FuseGemmChain(PAYS), before)
    assert result.rewrites == 1 and ops(after) == ["MatMul", "If"]
    assert_equivalent(before, after, rel=REL)


@st.composite
def chains(draw):
    axes = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 7), min_size=3, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    lead = [draw(st.integers(1, 3)) for _ in range(axes - 1)]
    lines, weights, name = [], {}, "x"
    for i, (rows, columns) in enumerate(pairwise(sizes)):
        matrix = rng.normal(size=(rows, columns)).astype(np.float32)
        row = rng.normal(size=columns).astype(np.float32)
        kind = draw(st.sampled_from(["matmul", "add", "gemm"] if axes == 2 else ["matmul", "add"]))
        out = f"t{i}"
        if kind == "gemm":
            transposed = draw(st.booleans())
            flags = [f"transB={int(transposed)}", f"alpha={draw(st.sampled_from([1.0, -0.5, 2.0]))}"]
            bias = draw(st.sampled_from(["", "row", "scalar", "one row"]))
            if bias:
                flags.append(f"beta={draw(st.sampled_from([1.0, 0.5]))}")
                weights[f"b{i}"] = {"row": row, "scalar": row[:1].reshape(()), "one row": row[None]}[bias]
            weights[f"W{i}"] = np.ascontiguousarray(matrix.T) if transposed else matrix
            lines.append(f"{out} = Gemm<{', '.join(flags)}>({name}, W{i}{f', b{i}' if bias else ''})")
        else:
            weights[f"W{i}"] = matrix
            lines.append(f"{'m' if kind == 'add' else ''}{out} = MatMul({name}, W{i})")
            if kind == "add":
                weights[f"b{i}"] = row
                lines.append(f"{out} = Add(m{out}, b{i})")
        name = out
    text = f"g (float{[*lead, sizes[0]]} x) => (float{[*lead, sizes[-1]]} {name}) {{ {' '.join(lines)} }}"
    return model(text, **weights)


def check_random(before):
    after, result = apply(FuseGemmChain(PAYS), before)
    assert result.rewrites >= 1 and len([op for op in ops(after) if op != "Add"]) == 1
    assert_equivalent(
        before, after, rel=9e-5
    )  # cancellation in few terms: measured 1.2e-5 at worst of 1000, 1.1e-6 in 99 of 100


@settings(max_examples=40, deadline=None)
@given(chains())
def test_random_chains(before):
    check_random(before)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(chains())
def test_many_random_chains(before):
    check_random(before)
