"""Cast after Cast: which pairs are one, over all types."""

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxcompress.passes.fuse_cast_chain import FuseCastChain
from onnxcompress.testing import apply, assert_equivalent, model, ops, run

TYPES = ["bool", "int8", "uint8", "int16", "int32", "uint32", "int64", "float16", "float", "double"]
CODES = {name: getattr(TensorProto, name.upper()) for name in TYPES}


def extremes(kind):
    dtype = onnx.helper.tensor_dtype_to_np_dtype(CODES[kind])
    if dtype == np.bool_:
        return np.array([True, False])
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        some = [limits.min, limits.max, 0, 1, 3, 127, 100, limits.max - 1, limits.max // 3]
        return np.array(some, dtype)
    return np.array([0.0, -0.0, 1.5, -2.5, 100, 127, 0.1, 3e-5], dtype)


@pytest.mark.parametrize("source", TYPES)
def test_every_chain(source):
    """Where the pass fuses, onnxruntime gives the same bits, at the limits of the type as well."""
    for middle, target in itertools.product(TYPES, TYPES):
        text = f"""g ({source}[N] x) => ({target}[N] y) {{
            a = Identity(x) b = Cast<to = {CODES[middle]}>(a) c = Cast<to = {CODES[target]}>(b) y = Identity(c)
        }}"""
        before = model(text)
        after, result = apply(FuseCastChain(), before)
        if result.rewrites:
            expected = ["Identity", "Identity"] if source == target else ["Identity", "Cast", "Identity"]
            assert ops(after) == expected
            x = extremes(source)
            assert run(before, {"x": x})[0].tobytes() == run(after, {"x": x})[0].tobytes(), (middle, target)
        else:
            assert ops(after) == ops(before)


@pytest.mark.parametrize(
    ("source", "middle", "target"),
    [
        ("int32", "int64", "int32"),
        ("float", "double", "float"),
        ("bool", "float", "bool"),
        ("uint8", "int32", "float"),
        ("int64", "int32", None),
        ("float", "float16", None),
        ("float", "int64", None),
        ("int32", "float", None),
        ("int64", "bool", None),
        ("int64", "double", None),
        ("float", "double", "int8 differs"),
        ("int32", "double", "float16 rounds twice"),
    ],
)
def test_pairs(source, middle, target):
    last = (target or source).split()[0]
    text = f"""g ({source}[N] x) => ({last}[N] y) {{
        a = Identity(x) b = Cast<to = {CODES[middle]}>(a) c = Cast<to = {CODES[last]}>(b) y = Identity(c)
    }}"""
    _, result = apply(FuseCastChain(), model(text))
    fuses = target is not None and " " not in target
    assert result.rewrites == fuses and len(result.misses) == (not fuses)


def test_first_that_is_read_elsewhere_stays():
    before = model("g (int32[N] x) => (float[N] y, int64[N] z) { a = Cast<to = 7>(x) y = Cast<to = 1>(a) z = Neg(a) }")
    after, result = apply(FuseCastChain(), before)
    assert result.rewrites == 1 and sorted(ops(after)) == ["Cast", "Cast", "Neg"]
    assert_equivalent(before, after)


def test_output_that_would_be_an_input_keeps_one():
    before = model("g (int32[N] x) => (int32[N] y) { a = Cast<to = 7>(x) y = Cast<to = 6>(a) }")
    after, result = apply(FuseCastChain(), before)
    assert result.rewrites == 1 and ops(after) == ["Cast"]
    assert_equivalent(before, after)
