"""Constants per channel and BatchNormalizations around a BatchNormalization: structure, numbers, near misses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.passes.fuse_channel_affine_into_batchnorm import FuseChannelAffineIntoBatchNorm
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
REL = 1e-5  # measured 2.0e-6 over 2000 random runs
X = "float[N,3,4,5] x"
Y = "float[N,3,4,5] y"
BN = "BatchNormalization({}, s, B, m, v)"


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        **{name: rng.normal(size=3).astype(F) for name in ("s", "B", "m", "s2", "B2", "m2")},
        **{name: rng.uniform(0.1, 2, 3).astype(F) for name in ("v", "v2")},
        "k": (rng.uniform(0.5, 2, (1, 3, 1, 1)) * rng.choice([-1, 1], 3).reshape(1, 3, 1, 1)).astype(F),
        "t": rng.normal(size=(3, 1, 1)).astype(F),
        "six": np.array([6], F),
    }


def fused(calls, *, opset=17, x=X, y=Y, **sizes):
    before = model(f"g ({x}) => ({y}) {{ {calls} }}", opset=opset, **weights())
    after, result = apply(FuseChannelAffineIntoBatchNorm(), before)
    assert result.rewrites == 1 and ops(after) == ["BatchNormalization"]
    assert_equivalent(before, after, rel=REL, **sizes)
    _, again = apply(FuseChannelAffineIntoBatchNorm(), after)
    assert again.rewrites == 0
    return after


@pytest.mark.parametrize(
    "call", ["Mul({}, k)", "Div({}, k)", "Add(t, {})", "Sub({}, t)", "Sub(t, {})", "Neg({})", "Mul(six, {})"]
)
def test_before_and_behind(call):
    after = fused(f"a = {BN.format('x')} y = {call.format('a')}")
    assert list(after.graph.node[0].input[3:]) == ["m", "v"]
    fused(f"a = {call.format('x')} y = {BN.format('a')}")


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_batchnorms_in_a_row(opset):
    second = "BatchNormalization<epsilon=0.1>({}, s2, B2, m2, v2)"
    fused(f"a = {BN.format('x')} b = {second.format('a')} y = {BN.format('b')}", opset=opset)


def test_long_run():
    fused(f"a = Div(x, six) b = Sub(t, a) d = {BN.format('b')} e = Mul(d, k) f = Neg(e) y = Add(f, six)")


def test_scalar_needs_no_rank():
    text = f"g (float[n] x, int64[r] i) => (float[a,b] y) {{ u = Reshape(x, i) a = {BN.format('u')} y = Div(a, six) }}"
    before = model(text, **weights())
    after, result = apply(FuseChannelAffineIntoBatchNorm(), before)
    assert result.rewrites == 1 and ops(after) == ["Reshape", "BatchNormalization"]
    feeds = [{"x": np.arange(6, dtype=F), "i": np.array([2, 3])}]
    assert_equivalent(before, after, rel=REL, feeds=feeds)


def test_statistics_of_another_type_keep_it():
    text = f"g (float16[N,3,4] x) => (float16[N,3,4] y) {{ a = {BN.format('x')} y = Mul(a, h) }}"
    before = model(text, opset=15, h=np.array([[2], [0.5], [-1]], np.float16), **weights())
    after, result = apply(FuseChannelAffineIntoBatchNorm(), before)
    assert result.rewrites == 1 and ops(after) == ["BatchNormalization"]
    assert {t.data_type for t in after.graph.initializer if t.name in after.graph.node[0].input} == {1}


NEAR_MISSES = {
    "model output": (f"a = {BN.format('x')} y = Mul(a, k)", "float[N,3,4,5] a"),
    "another reader": (f"a = {BN.format('x')} y = Mul(a, k) z = Relu(a)", "float[N,3,4,5] z"),
    "before, another reader": (f"a = Mul(x, k) y = {BN.format('a')} z = Relu(a)", "float[N,3,4,5] z"),
    "along width": (f"a = {BN.format('x')} y = Mul(a, wide)", None),
    "rounding": (f"a = {BN.format('x')} y = Add(a, magic)", None),
    "overflow": (f"a = {BN.format('x')} y = Mul(a, huge)", None),
    "underflow": (f"a = {BN.format('x')} y = Mul(a, tiny)", None),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name):
    calls, second = NEAR_MISSES[name]
    extra = {"wide": np.ones((1, 1, 1, 5), F), "magic": np.array(2.0**23, F)}
    extra |= {"huge": np.array(3e38, F), "tiny": np.array(1e-40, F)}
    constants = weights() | {"B": np.array([100, 1, 1], F)}
    before = model(f"g ({X}) => ({Y}{', ' + second if second else ''}) {{ {calls} }}", **constants, **extra)
    after, result = apply(FuseChannelAffineIntoBatchNorm(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after)


def test_constant_that_may_broadcast_is_left_alone():
    before = model(f"g (float[N,q,4,5] x) => ({Y}) {{ a = Mul(x, k) y = {BN.format('a')} }}", **weights())
    after, result = apply(FuseChannelAffineIntoBatchNorm(), before)
    assert result.rewrites == 0 and len(result.misses) == 1
    assert_equivalent(before, after, sizes={"q": 1})


@pytest.mark.parametrize(
    "calls",
    [
        f"a = {BN.format('x')} r = Relu(a) y = Mul(r, k)",
        f"a = {BN.format('x')} y = Div(k, a)",
        f"a = {BN.format('x')} y = Mul(a, x)",
        f"y = {BN.format('x')}",
    ],
)
def test_other_forms_are_not_the_pattern(calls):
    before = model(f"g ({X}) => ({Y}) {{ {calls} }}", **weights())
    _, result = apply(FuseChannelAffineIntoBatchNorm(), before)
    assert result.rewrites == 0 and not result.misses


def test_training_mode_is_left_alone():
    calls = "a, rm, rv = BatchNormalization<training_mode=1>(x, s, B, m, v) y = Mul(a, k)"
    _, result = apply(FuseChannelAffineIntoBatchNorm(), model(f"g ({X}) => ({Y}) {{ {calls} }}", **weights()))
    assert result.rewrites == 0


def test_reader_in_a_branch_is_left_alone():
    branch = "g{0} () => (float[N,3,4,5] y{0}) {{ y{0} = Mul(a, k) }}"
    text = (
        f"g ({X}, bool p) => ({Y}) {{ a = {BN.format('x')} "
        f"y = If (p) <then_branch={branch.format(1)}, else_branch={branch.format(2)}> }}"
    )
    before = model(text, **weights())
    after, result = apply(FuseChannelAffineIntoBatchNorm(), before)
    assert result.rewrites == 0 and not result.misses and ops(after) == ops(before)


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g ({X}) => ({Y}) {{ a = {BN.format("x")} y = ours.Mul(a, k) }}"""
    result = FuseChannelAffineIntoBatchNorm().apply(graph_of(model(text, **weights())))
    assert result.rewrites == 0 and not result.misses


FORMS = ["Mul({}, k)", "Div({}, six)", "Add({}, t)", "Sub(t, {})", "BatchNormalization({}, s2, B2, m2, v2)"]
RUNS = (
    st.lists(st.sampled_from(FORMS), max_size=2),
    st.lists(st.sampled_from(FORMS), min_size=1, max_size=2),
    st.integers(0, 2**32 - 1),
)


def check_run(before_it, behind_it, seed):
    forms = [*before_it, BN, *behind_it]
    names = ["x", *(f"t{i}" for i in range(len(forms) - 1)), "y"]
    calls = " ".join(f"{names[i + 1]} = {form.format(names[i])}" for i, form in enumerate(forms))
    before = model(f"g ({X}) => ({Y}) {{ {calls} }}", **weights(seed))
    after, result = apply(FuseChannelAffineIntoBatchNorm(), before)
    assert result.rewrites == 1 and ops(after) == ["BatchNormalization"]
    assert_equivalent(before, after, rel=REL)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(*RUNS)
def test_random_runs(before_it, behind_it, seed):
    check_run(before_it, behind_it, seed)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(*RUNS)
def test_many_random_runs(before_it, behind_it, seed):
    check_run(before_it, behind_it, seed)
