"""Transpose after Transpose."""

import itertools

import pytest

from onnxcompress.passes.fuse_transpose_chain import FuseTransposeChain
from onnxcompress.testing import apply, assert_equivalent, model, ops

X = "float[N,3,M] x"
Y = "float[a,b,c] y"
SIZES = {"N": 2, "M": 4}
PERMS = [list(p) for p in itertools.permutations(range(3))]


@pytest.mark.parametrize("second", PERMS)
@pytest.mark.parametrize("first", PERMS)
def test_every_pair(first, second):
    body = f"a = Relu(x) b = Transpose<perm = {first}>(a) c = Transpose<perm = {second}>(b) y = Neg(c)"
    before = model(f"g ({X}) => ({Y}) {{ {body} }}")
    after, result = apply(FuseTransposeChain(), before)
    undone = [first[i] for i in second] == [0, 1, 2]
    assert result.rewrites == 1 and ops(after) == (["Relu", "Neg"] if undone else ["Relu", "Transpose", "Neg"])
    assert_equivalent(before, after, sizes=SIZES)


def test_default_permutation():
    before = model(f"g ({X}) => ({Y}) {{ a = Transpose(x) b = Transpose(a) y = Neg(b) }}")
    after, result = apply(FuseTransposeChain(), before)
    assert result.rewrites == 1 and ops(after) == ["Neg"]
    assert_equivalent(before, after, sizes=SIZES)


def test_first_that_is_read_elsewhere_stays():
    before = model(
        f"g ({X}) => ({Y}, float[c,b,a] z) {{ a = Transpose(x) y = Transpose<perm = [1, 0, 2]>(a) z = Neg(a) }}"
    )
    after, result = apply(FuseTransposeChain(), before)
    assert result.rewrites == 1 and sorted(ops(after)) == ["Neg", "Transpose", "Transpose"]
    assert all(node.input[0] == "x" for node in after.graph.node if node.op_type == "Transpose")
    assert_equivalent(before, after, sizes=SIZES)


def test_output_that_would_be_an_input_keeps_one():
    before = model(f"g ({X}) => (float[N,3,M] y) {{ a = Transpose(x) y = Transpose(a) }}")
    after, result = apply(FuseTransposeChain(), before)
    assert result.rewrites == 1 and ops(after) == ["Transpose"]
    assert_equivalent(before, after, sizes=SIZES)


def test_chain_of_three():
    call = "Transpose<perm = [1, 2, 0]>"
    before = model(f"g ({X}) => ({Y}) {{ a = {call}(x) b = {call}(a) c = {call}(b) y = Neg(c) }}")
    after, result = apply(FuseTransposeChain(), before)
    assert result.rewrites == 2 and ops(after) == ["Neg"]
    assert_equivalent(before, after, sizes=SIZES)


def test_unknown_rank_is_left_alone():
    before = model(
        "g (float[N] x, int64[k] s) => (float[a] y) { r = Reshape(x, s) a = Transpose(r) b = Transpose(a) y = Neg(b) }"
    )
    after, result = apply(FuseTransposeChain(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)


def test_across_a_branch_is_left_alone():
    before = model("""g (bool c, float[N,M] x) => (float[a,b] y) {
        t = Transpose(x)
        y = If (c) <then_branch = p () => (float[a,b] u) { u = Transpose(t) },
                    else_branch = q () => (float[a,b] v) { v = Neg(x) }>
    }""")
    after, result = apply(FuseTransposeChain(), before)
    assert result.rewrites == 0
    assert_equivalent(before, after, sizes=SIZES)
