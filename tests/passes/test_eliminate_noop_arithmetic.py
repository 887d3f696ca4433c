"""Arithmetic with neutral elements: signs of zero, infinities, NaN, and constants that broadcast."""

import numpy as np
import pytest

from onnxcompress.passes.eliminate_noop_arithmetic import EliminateNoopArithmetic
from onnxcompress.testing import apply, assert_equivalent, model, ops, run

SPECIAL = np.array([[0.0, -0.0, np.inf, -np.inf], [np.nan, -1.5, 7.0, 1e-45]], np.float32)


def chain(kind, call, constants, out=None):
    out = out or f"{kind}[a,b] y"
    return f"g ({kind}[N,4] x, {kind}[N,4] z) => ({out}) {constants} {{ a = Identity(x) b = {call} y = Identity(b) }}"


FLOATS = """<float one = {1}, float[1] one1 = {1}, float[1,1] one11 = {1}, float[4] ones = {1, 1, 1, 1},
    float zero = {0}, float minus = {-0.0}, bool yes = {1}, bool[1,4] noes = {0, 0, 0, 0}, bool no = {0},
    float two = {2}, double one64 = {1}, float[1,1,1] one111 = {1},
    float[2,4] grid = {1, 1, 1, 1, 1, 1, 1, 1}, bool[4] mixed = {1, 0, 1, 0}>"""
INTS = "<int64 one = {1}, int64 zero = {0}, int64[4] zeros = {0, 0, 0, 0}, bool yes = {1}>"
BOOLS = "<bool yes = {1}, bool no = {0}>"


def same_bits(before, after, x, z):
    for a, b in zip(run(before, {"x": x, "z": z}), run(after, {"x": x, "z": z}), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        nan = np.isnan(a) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
        assert np.array_equal(nan, np.isnan(b) if b.dtype.kind == "f" else nan)
        assert a[~nan].tobytes() == b[~nan].tobytes()


@pytest.mark.parametrize(
    "call",
    [
        "Mul(a, one)",
        "Mul(one1, a)",
        "Mul(a, one11)",
        "Mul(a, ones)",
        "Div(a, one)",
        "Pow(a, one)",
        "Pow(a, one64)",
        "Sub(a, zero)",
        "Add(a, minus)",
        "Add(minus, a)",
        "Max(a)",
        "Min(a)",
        "Sum(a)",
        "Mean(a)",
        "Where(no, z, a)",
        "Where(noes, z, a)",
        "Where(no, two, a)",
    ],
)
def test_drops_floats(call):
    before = model(chain("float", call, FLOATS))
    after, result = apply(EliminateNoopArithmetic(), before)
    assert result.rewrites == 1 and ops(after) == ["Identity", "Identity"]
    same_bits(before, after, SPECIAL, -SPECIAL)


@pytest.mark.parametrize(
    "call", ["Add(a, zero)", "Sub(a, zeros)", "Mul(one, a)", "Div(a, one)", "Pow(a, one)", "Where(yes, a, z)"]
)
def test_drops_integers(call):
    before = model(chain("int64", call, INTS))
    after, result = apply(EliminateNoopArithmetic(), before)
    assert result.rewrites == 1 and ops(after) == ["Identity", "Identity"]
    x = np.array([[0, -1, 2**62, -(2**63)]])
    same_bits(before, after, x, x)


@pytest.mark.parametrize("call", ["And(a, yes)", "Or(no, a)", "Xor(a, no)"])
def test_drops_logic(call):
    before = model(chain("bool", call, BOOLS))
    after, result = apply(EliminateNoopArithmetic(), before)
    assert result.rewrites == 1 and ops(after) == ["Identity", "Identity"]
    assert_equivalent(before, after)


@pytest.mark.parametrize(("kind", "op"), [("float", "Neg"), ("int8", "Neg"), ("bool", "Not")])
def test_drops_what_undoes_itself(kind, op):
    before = model(f"g ({kind}[N] x) => ({kind}[N] y) {{ a = Identity(x) b = {op}(a) c = {op}(b) y = Identity(c) }}")
    after, result = apply(EliminateNoopArithmetic(), before)
    assert result.rewrites == 1 and ops(after) == ["Identity", op, "Identity"]  # the first is dead now
    assert_equivalent(before, after)


@pytest.mark.parametrize(
    "call",
    [
        "Add(a, zero)",  # -0.0 + 0.0 is 0.0
        "Sub(a, minus)",
        "Mul(a, one111)",  # adds an axis
        "Mul(a, grid)",  # N may be 1
        "Where(no, grid, a)",
        "Where(yes, a, z)",
    ],
)
def test_miss(call):
    out = "float[a,b,c] y" if "one111" in call else None
    before = model(chain("float", call, FLOATS, out))
    after, result = apply(EliminateNoopArithmetic(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    for rows in (1, 2) if "grid" in call else (2,):
        same_bits(before, after, SPECIAL[:rows], SPECIAL[:rows])


@pytest.mark.parametrize(
    "call",
    ["Mul(a, two)", "Div(one, a)", "Pow(one, a)", "Sub(zero, a)", "Where(mixed, a, z)", "Max(a, z)", "Mul(a, zero)"],
)
def test_other_arithmetic_is_left_alone(call):
    before = model(chain("float", call, FLOATS))
    after, result = apply(EliminateNoopArithmetic(), before)
    assert result.rewrites == 0 and not result.misses and ops(after) == ops(before)


@pytest.mark.parametrize("call", ["And(a, no)", "Or(a, yes)", "Xor(a, yes)"])
def test_other_logic_is_left_alone(call):
    before = model(chain("bool", call, BOOLS))
    assert apply(EliminateNoopArithmetic(), before)[1].rewrites == 0


def test_a_constant_that_the_caller_may_override_is_none():
    before = model(
        "g (float[N,4] x, float[1] c) => (float[N,4] y) { a = Mul(x, c) y = Neg(a) }", c=np.ones(1, np.float32)
    )
    after, result = apply(EliminateNoopArithmetic(), before)
    assert result.rewrites == 0 and after == before
    x = np.ones((2, 4), np.float32)
    assert run(after, {"x": x, "c": np.array([3], np.float32)})[0][0, 0] == -3


def test_half_precision_zero_keeps_its_sign():
    before = model("g (float16[N] x) => (float16[N] y) { a = Add(x, c) y = Identity(a) }", c=np.array([0], np.float16))
    assert apply(EliminateNoopArithmetic(), before)[1].rewrites == 0
