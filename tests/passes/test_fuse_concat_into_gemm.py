"""Matrix products of one input, concatenated, into the next one."""

import re

import numpy as np
import pytest

from onnxcompress.passes.fuse_concat_into_gemm import FuseConcatIntoGemm
from onnxcompress.testing import apply, assert_equivalent, model, ops

REL = 3e-6  # measured 3.4e-7


def normal(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


WEIGHTS = {
    "A": normal(8, 6),
    "B": normal(8, 10),
    "a": normal(6),
    "c": normal(5),
    "W": normal(16, 5),
    "V": normal(24, 5),
}


def build(text):
    return model(text, **{k: v for k, v in WEIGHTS.items() if re.search(rf"\b{k}\b", text)})


def text(x="float[N,T,8] x", y="float[N,T,5] y", body="", more=""):
    return f"g ({x}) => ({y}{more}) {{ {body} }}"


PARTS = "p = MatMul(x, A) s = Add(p, a) t = MatMul(x, B)"


@pytest.mark.parametrize(
    ("body", "shape", "after_ops"),
    [
        (f"{PARTS} k = Concat<axis=2>(s, t) y = MatMul(k, W)", 3, ["MatMul", "Add"]),
        (f"{PARTS} k = Concat<axis=-1>(s, t, x) m = MatMul(k, V) y = Add(m, c)", 3, ["MatMul", "Add"]),
        ("s = Gemm(x, A, a) t = Gemm(x, B) k = Concat<axis=1>(s, t) y = Gemm(k, W, c)", 2, ["Gemm"]),
    ],
)
def test_merges(body, shape, after_ops):
    lead = "N,T" if shape == 3 else "N"
    before = build(text(f"float[{lead},8] x", f"float[{lead},5] y", body))
    after, result = apply(FuseConcatIntoGemm(), before)
    assert result.rewrites == 1 and ops(after) == after_ops
    assert_equivalent(before, after, rel=REL)


@pytest.mark.parametrize(
    ("before_text", "reason"),
    [
        (text(body=f"{PARTS} k = Concat<axis=2>(s, t) y = MatMul(k, W)", more=", float[N,T,16] k"), "read elsewhere"),
        (
            text(
                "float[N,T,8] x, float[N,T,8] v",
                body="s = MatMul(x, A) t = MatMul(v, B) k = Concat<axis=2>(s, t) y = MatMul(k, W)",
            ),
            "one input",
        ),
        (
            text(
                "float[N,4,8] x",
                "float[N,8,5] y",
                "s = MatMul(x, Q) t = MatMul(x, Q) k = Concat<axis=1>(s, t) y = MatMul(k, W2)",
            ),
            "last axis",
        ),
        (text(body=f"{PARTS} k = Concat<axis=2>(s, t) r = Relu(k) y = MatMul(r, W)"), None),
    ],
)
def test_near_miss_is_left_alone(before_text, reason):
    more = {"Q": normal(8, 6), "W2": normal(6, 5)}
    before = model(before_text, **{k: v for k, v in {**WEIGHTS, **more}.items() if re.search(rf"\b{k}\b", before_text)})
    after, result = apply(FuseConcatIntoGemm(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert [reason in miss.reason for miss in result.misses] == ([True] if reason else [])
    assert_equivalent(before, after)


def test_a_merge_that_does_not_pay_is_left_alone():
    narrow = {"A": normal(512, 4), "B": normal(512, 4, seed=1), "W": normal(8, 512)}
    body = "s = MatMul(x, A) t = MatMul(x, B) k = Concat<axis=1>(s, t) y = MatMul(k, W)"
    before = model(text("float[N,512] x", "float[N,512] y", body), **narrow)
    after, result = apply(FuseConcatIntoGemm(), before)
    assert result.rewrites == 0 and "grow" in result.misses[0].reason and ops(after) == ops(before)
