"""BatchNormalization between Transposes: structure, numbers, near misses."""

import numpy as np
import pytest

from onnxcompress.passes.replace_transposed_batchnorm import ReplaceTransposedBatchNorm
from onnxcompress.testing import apply, assert_equivalent, model, ops

BN = "BatchNormalization(t, s, B, m, v)"
LAST = f"g (float[N,T,4] x) => (float[N,a,b] y) {{ t = Transpose<perm=[0,2,1]>(x) n = {BN} %s }}"


def weights(channels=4, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    positive = rng.uniform(0.05, 2, channels)
    return {
        "s": rng.normal(size=channels).astype(dtype),
        "B": rng.normal(size=channels).astype(dtype),
        "m": rng.normal(size=channels).astype(dtype),
        "v": positive.astype(dtype),
    }


@pytest.mark.parametrize(
    ("shape", "there", "back"),
    [
        ("N,T,4", [0, 2, 1], [0, 2, 1]),
        ("N,H,W,4", [0, 3, 1, 2], [0, 2, 3, 1]),
        ("N,H,W,4", [0, 3, 2, 1], [0, 3, 2, 1]),
        ("4,T,N", [2, 0, 1], [1, 2, 0]),
        ("N,4,T", [2, 1, 0], [2, 1, 0]),
    ],
)
def test_replaces(shape, there, back):
    before = model(
        f"g (float[{shape}] x) => (float[{shape}] y) "
        f"{{ t = Transpose<perm={there}>(x) n = {BN} y = Transpose<perm={back}>(n) }}",
        **weights(),
    )
    after, result = apply(ReplaceTransposedBatchNorm(), before)
    assert result.rewrites == 1 and ops(after) == ["Mul", "Add"]
    assert_equivalent(before, after, rel=1e-6, sizes={"T": 5, "H": 3})  # measured 1.9e-7


def test_half_precision():
    before = model(LAST.replace("float", "float16") % "y = Transpose<perm=[0,2,1]>(n)", **weights(dtype=np.float16))
    after, result = apply(ReplaceTransposedBatchNorm(), before)
    assert result.rewrites == 1
    assert_equivalent(before, after, rel=3e-3, sizes={"T": 5})  # measured 4.5e-4: the product is rounded on the way


NEAR = {
    "not undone": (
        f"g (float[N,H,W,4] x) => (float[a,b,c,d] y) "
        f"{{ t = Transpose<perm=[0,3,1,2]>(x) n = {BN} y = Transpose<perm=[0,3,1,2]>(n) }}"
    ),
    "transposed read": LAST.replace("(float[N,a,b] y)", "(float[N,a,b] y, float[N,a,b] z)")
    % "y = Transpose<perm=[0,2,1]>(n) z = Relu(t)",
    "result read": LAST.replace("(float[N,a,b] y)", "(float[N,a,b] y, float[N,a,b] z)")
    % "y = Transpose<perm=[0,2,1]>(n) z = Relu(n)",
    "result is an output": LAST.replace("(float[N,a,b] y)", "(float[N,a,b] y, float[N,a,b] n)")
    % "y = Transpose<perm=[0,2,1]>(n)",
    "scale is an input": (LAST % "y = Transpose<perm=[0,2,1]>(n)").replace(
        "float[N,T,4] x", "float[N,T,4] x, float[4] s"
    ),
}


@pytest.mark.parametrize("text", NEAR.values(), ids=NEAR.keys())
def test_near_miss_is_left_alone(text):
    constants = weights()
    if "float[4] s" in text:
        del constants["s"]
    before = model(text, **constants)
    after, result = apply(ReplaceTransposedBatchNorm(), before)
    assert len(result.misses) == 1 and ops(after) == ops(before)
    assert_equivalent(before, after, sizes={"T": 5, "H": 3})  # bitwise


def test_a_shift_that_rounds_is_left_alone():
    constants = weights() | {"m": np.array([1e5, 0, 0, 0], np.float32)}
    before = model(LAST % "y = Transpose<perm=[0,2,1]>(n)", **constants)
    after, result = apply(ReplaceTransposedBatchNorm(), before)
    assert len(result.misses) == 1 and "rounds" in result.misses[0].reason and ops(after) == ops(before)
