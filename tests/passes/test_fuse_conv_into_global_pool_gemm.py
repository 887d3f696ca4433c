"""1x1 Conv, global mean, Gemm: every form of the mean and of what flattens it."""

import numpy as np
import pytest

from onnxcompress.cost import Price
from onnxcompress.passes.fuse_conv_into_global_pool_gemm import FuseConvIntoGlobalPoolGemm
from onnxcompress.rewrite import Settings
from onnxcompress.testing import apply, assert_equivalent, model, ops


def normal(*shape, seed=0):
    scale = 1 / np.sqrt(np.prod(shape[1:]))
    return (np.random.default_rng(seed + sum(shape)).normal(size=shape) * scale).astype(np.float32)


def fused(before, rel=8e-6, **kwargs):
    after, result = apply(FuseConvIntoGlobalPoolGemm(), before)
    assert_equivalent(before, after, rel=rel, sizes={"H": 5, "W": 6}, **kwargs)  # measured 8.8e-7 at worst
    return after, result


X, Y = "float[N,4,H,W] x", "float[N,3] y"
GEMM = "y = Gemm(f, G, g)"
WEIGHTS = {"A": normal(8, 4, 1, 1), "a": normal(8), "G": normal(8, 3), "g": normal(3)}


@pytest.mark.parametrize(
    ("mean", "flatten"),
    [
        ("p = GlobalAveragePool(c)", "f = Flatten(p)"),
        ("p = GlobalAveragePool(c)", "f = Flatten<axis=-3>(p)"),
        ("p = GlobalAveragePool(c)", "f = Reshape(p, s)"),
        ("p = GlobalAveragePool(c)", "f = Squeeze(p, t)"),
        ("p = ReduceMean<axes=[2,3]>(c)", "f = Flatten(p)"),
        ("f = ReduceMean<axes=[-1,2], keepdims=0>(c)", ""),
    ],
)
def test_forms(mean, flatten):
    shapes = (
        {"s": np.array([-1, 8])} if "Reshape" in flatten else {"t": np.array([3, -2])} if "Squeeze" in flatten else {}
    )
    before = model(f"g ({X}) => ({Y}) {{ c = Conv(x, A, a) {mean} {flatten} {GEMM} }}", **WEIGHTS, **shapes)
    after, result = fused(before)
    assert "Conv" not in ops(after) and len(ops(after)) == (3 if flatten else 2)
    assert result.rewrites == 1


@pytest.mark.parametrize(
    "gemm", ["y = MatMul(f, G)", "y = Gemm<alpha=0.5, beta=2.0>(f, G, g)", "y = Gemm<transB=1>(f, K)"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_matrices(gemm, bias):
    conv = "c = Conv<group=2>(x, A, a)" if bias else "c = Conv<group=2>(x, A)"
    used = {
        name: v
        for name, v in {**WEIGHTS, "K": normal(3, 8), "A": normal(8, 2, 1, 1)}.items()
        if f" {name}" in conv + gemm
    }
    text = f"g ({X}) => ({Y}) {{ {conv} p = GlobalAveragePool(c) f = Flatten(p) {gemm} }}"
    after, _ = fused(model(text, **used))
    assert ops(after) == [
        "GlobalAveragePool",
        "Flatten",
        "MatMul" if gemm.startswith("y = MatMul") and not bias else "Gemm",
    ]


@pytest.mark.parametrize(("size", "axes"), [("L", "[2]"), ("D,H,W", "[2,3,4]")])
def test_other_ranks(size, axes):
    ones = [1] * (size.count(",") + 1)
    text = f"g (float[N,4,{size}] x) => ({Y}) {{ c = Conv(x, A) f = ReduceMean<axes={axes}, keepdims=0>(c) {GEMM} }}"
    after, _ = fused(model(text, A=normal(8, 4, *ones), G=WEIGHTS["G"], g=WEIGHTS["g"]))
    assert ops(after) == ["ReduceMean", "Gemm"]


def test_reduce_mean_of_opset_18():
    text = f"g ({X}) => ({Y}) {{ c = Conv(x, A, a) f = ReduceMean<keepdims=0>(c, t) {GEMM} }}"
    after, _ = fused(model(text, opset=18, **WEIGHTS, t=np.array([2, 3])))
    assert ops(after) == ["ReduceMean", "Gemm"]


def test_average_pool_over_everything():
    text = f"""g (float[N,4,5,6] x) => ({Y}) {{
        c = Conv(x, A, a) p = AveragePool<kernel_shape=[5,6]>(c) f = Flatten(p) {GEMM}
    }}"""
    after, _ = fused(model(text, **WEIGHTS))
    assert ops(after) == ["AveragePool", "Flatten", "Gemm"]


def test_many_classes_keep_the_conv_behind_the_mean():
    # 256 -> 16 -> 4096: the merged matrix has 1 M elements, the pair 69,632.
    text = """g (float[N,256,7,7] x) => (float[N,4096] y) {
        c = Conv(x, A) p = GlobalAveragePool(c) f = Flatten(p) y = MatMul(f, G)
    }"""
    before = model(text, A=normal(16, 256, 1, 1), G=normal(16, 4096))
    after, result = apply(FuseConvIntoGlobalPoolGemm(), before)
    assert ops(after) == ops(before) and "weights would grow" in result.misses[0].reason


class MultiplicationsOnly:
    def price(self, specs):
        return Price(float(sum(spec.macs for spec in specs)), 0)


def test_a_conv_that_is_cheaper_behind_the_mean_is_left_for_that():
    text = f"g ({X}) => (float[N,64] y) {{ c = Conv(x, A) p = GlobalAveragePool(c) f = Flatten(p) y = MatMul(f, G) }}"
    before = model(text.replace("N,4", "N,64"), A=normal(8, 64, 1, 1), G=normal(8, 64))
    after, result = apply(FuseConvIntoGlobalPoolGemm(Settings(cost=MultiplicationsOnly())), before)
    assert ops(after) == ops(before)
    assert result.misses[0].reason == "the Conv is cheaper kept, behind the mean"


PADDED = f"g ({X}) => ({Y}) {{ c = Conv<pads=[1,0,0,0]>(x, A, a) p = GlobalAveragePool(c) f = Flatten(p) {GEMM} }}"
STRIDED = f"g ({X}) => ({Y}) {{ c = Conv<strides=[2,1]>(x, A, a) p = GlobalAveragePool(c) f = Flatten(p) {GEMM} }}"
LIVE = (
    f"g ({X}, float[8,3] U) => ({Y}) {{ c = Conv(x, A, a) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, U, g) }}"
)
LIVE_C = (
    f"g ({X}, float[3] u) => ({Y}) {{ c = Conv(x, A, a) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, G, u) }}"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PADDED, "does not have the positions"),
        (STRIDED, "does not have the positions"),
        (LIVE, "not a constant"),
        (LIVE_C, "not a constant"),
    ],
)
def test_near_miss_is_left_alone(text, reason):
    before = model(text, **{name: v for name, v in WEIGHTS.items() if f" {name}" in text})
    after, result = apply(FuseConvIntoGlobalPoolGemm(), before)
    assert ops(after) == ops(before) and reason in result.misses[0].reason
    assert_equivalent(before, after, sizes={"H": 5, "W": 6})


TWO_READERS = "c = Conv(x, A, a) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, G, g) z = Relu(c)"
MEAN_READ = "c = Conv(x, A, a) z = GlobalAveragePool(c) f = Flatten(z) y = Gemm(f, G, g)"
ROWS_ONLY = "c = Conv(x, A, a) p = ReduceMean<axes=[2]>(c) z = GlobalAveragePool(p) f = Flatten(z) y = Gemm(f, G, g)"
ACTIVATION = "c = Conv(x, A, a) r = Relu(c) z = GlobalAveragePool(r) f = Flatten(z) y = Gemm(f, G, g)"


@pytest.mark.parametrize("nodes", [TWO_READERS, MEAN_READ, ROWS_ONLY, ACTIVATION])
def test_another_thing_is_left_alone(nodes):
    before = model(f"g ({X}) => ({Y}, float[N,8,h,w] z) {{ {nodes} }}", **WEIGHTS)
    after, result = apply(FuseConvIntoGlobalPoolGemm(), before)
    assert ops(after) == ops(before) and result.rewrites == 0


@pytest.mark.parametrize(("axes", "shape"), [("[2]", "8,8,3"), ("[1,2]", "8,3"), ("[0,2]", "8,3")])
def test_a_mean_over_other_axes_is_no_pool(axes, shape):
    # Each gives 8 columns, as many as the matrix takes.
    nodes = f"c = Conv(x, A, a) f = ReduceMean<axes={axes}, keepdims=0>(c) y = MatMul(f, G)"
    weights = {name: values for name, values in WEIGHTS.items() if name != "g"}
    before = model(f"g (float[8,4,8,8] x) => (float[{shape}] y) {{ {nodes} }}", **weights)
    after, result = apply(FuseConvIntoGlobalPoolGemm(), before)
    assert ops(after) == ops(before) and result.rewrites == 0


def test_flatten_of_something_else_is_no_head():
    text = """g (float[2,4,H,W] x) => (float[1,3] y) {
        c = Conv(x, A, a) p = GlobalAveragePool(c) f = Reshape(p, s) y = MatMul(f, K)
    }"""
    before = model(text, A=WEIGHTS["A"], a=WEIGHTS["a"], s=np.array([1, 16]), K=normal(16, 3))
    after, result = apply(FuseConvIntoGlobalPoolGemm(), before)
    assert ops(after) == ops(before) and result.rewrites == 0
