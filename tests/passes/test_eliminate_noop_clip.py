"""Clips that let everything pass."""

import numpy as np
import pytest

from onnxcompress.passes.eliminate_noop_clip import EliminateNoopClip
from onnxcompress.testing import apply, assert_equivalent, model, ops, run

INFINITE = np.array([np.inf, -np.inf, np.nan, -0.0, 3], np.float32)


def chain(call, constants="", kind="float"):
    return f"g ({kind}[N] x, {kind} t) => ({kind}[N] y) {constants} {{ a = Identity(x) b = {call} y = Identity(b) }}"


@pytest.mark.parametrize(
    ("kind", "call", "constants"),
    [
        ("int32", "Clip(a)", ""),
        ("int8", "Clip(a, lo, hi)", "<int8 lo = {-128}, int8 hi = {127}>"),
        ("uint8", "Clip(a, lo)", "<uint8 lo = {0}>"),
    ],
)
def test_drops_integers(kind, call, constants):
    before = model(chain(call, constants, kind))
    after, result = apply(EliminateNoopClip(), before)
    assert result.rewrites == 1 and ops(after) == ["Identity", "Identity"]
    assert_equivalent(before, after)


def test_drops_infinite_bounds():
    bounds = {"lo": np.array(-np.inf, np.float32), "hi": np.array(np.inf, np.float32)}
    before = model(chain("Clip(a, lo, hi)"), **bounds)
    after, result = apply(EliminateNoopClip(), before)
    assert result.rewrites == 1 and ops(after) == ["Identity", "Identity"]
    assert_equivalent(before, after, feeds=[{"x": INFINITE, "t": np.zeros((), np.float32)}])


@pytest.mark.parametrize("opset", [7, 10, 11, 17])
def test_default_bounds_stop_infinities(opset):
    before = model(chain("Clip(a)"), opset=opset)
    after, result = apply(EliminateNoopClip(), before)
    assert result.rewrites == 0 and len(result.misses) == 1 and ops(after) == ops(before)
    assert run(before, {"x": INFINITE, "t": np.zeros((), np.float32)})[0][0] == np.finfo(np.float32).max


@pytest.mark.parametrize(
    ("call", "constants", "kind", "opset"),
    [
        ("Clip(a, lo)", "<float lo = {-5}>", "float", 17),
        ("Clip<min = -5.0>(a)", "", "float", 10),
        ("Clip(a, t)", "", "float", 17),
        ("Clip(a, lo)", "<int32 lo = {0}>", "int32", 17),
    ],
)
def test_near_miss_is_left_alone(call, constants, kind, opset):
    before = model(chain(call, constants, kind), opset=opset)
    after, result = apply(EliminateNoopClip(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
