"""Convolutions in a row: what merges, what a partition decides, and what must stay."""

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnxcompress.cost import Price
from onnxcompress.linear import Exactness
from onnxcompress.passes.fold_constants import FoldConstants
from onnxcompress.passes.fuse_conv_chain import FuseConvChain
from onnxcompress.rewrite import Settings
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops


class AlwaysPays:
    """A Conv costs ten, anything else one, weights nothing: every merge has fewer."""

    def price(self, specs):
        return Price(float(sum(10 if spec.op == "Conv" else 1 for spec in specs)), 0)


PAYS = Settings(cost=AlwaysPays())


def normal(*shape, seed=0):
    scale = 1 / np.sqrt(np.prod(shape[1:]))
    return (np.random.default_rng(seed + sum(shape)).normal(size=shape) * scale).astype(np.float32)


def merged(before, settings=PAYS, rel=5e-6, **kwargs):
    after, result = apply(FuseConvChain(settings), before)
    again, second = apply(FuseConvChain(settings), after)
    assert second.rewrites == 0 and ops(again) == ops(after)
    assert_equivalent(before, after, rel=rel, **kwargs)  # measured 5.8e-7 at worst over the tests of this file
    return after, result


def attributes(proto, index=0):
    return {a.name: onnx.helper.get_attribute_value(a) for a in proto.graph.node[index].attribute}


def initializer(proto, name):
    return next(onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name)


SPATIAL = {1: "9", 2: "9,8", 3: "6,5,7"}


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_unpadded_second_conv_is_exact(axes, bias):
    pads, strides = [1, 2, 0][:axes] + [2, 0, 1][:axes], [2, 1, 1][:axes]
    text = f"""g (float[N,4,{SPATIAL[axes]}] x) => (float[N,6,{",".join("hwd"[:axes])}] y) {{
        a = Conv<pads={pads}, strides={strides}>(x, A{bias}) y = Conv(a, B, c)
    }}"""
    weights = {"A": normal(5, 4, *[3] * axes), "B": normal(6, 5, *[1, 2, 1][:axes]), "c": normal(6)}
    after, result = merged(model(text, **weights, **({"b": normal(5)} if bias else {})))
    assert ops(after) == ["Conv"]
    assert [done.exactness for done in result.done] == [Exactness.EXACT]
    assert attributes(after)["kernel_shape"] == [3, 4, 3][:axes]


@pytest.mark.parametrize("size", ["9,8", "H,W"])
def test_padding_after_a_conv_without_bias_is_exact(size):
    text = f"g (float[N,4,{size}] x) => (float[N,6,h,w] y) {{ a = Conv(x, A) y = Conv<pads=[1,1,1,1]>(a, B, c) }}"
    before = model(text, A=normal(5, 4, 1, 1), B=normal(6, 5, 3, 3), c=normal(6))
    after, result = merged(before, sizes={"H": 5, "W": 6})
    assert ops(after) == ["Conv"]
    assert result.done[0].exactness is Exactness.EXACT_WITHOUT_BIAS


def test_padding_after_a_bias_makes_a_map():
    text = "g (float[N,4,9,8] x) => (float[N,6,h,w] y) { a = Conv(x, A, b) y = Conv<pads=[1,1,1,1]>(a, B, c) }"
    before = model(text, A=normal(5, 4, 1, 1), b=normal(5), B=normal(6, 5, 3, 3), c=normal(6))
    after, result = merged(before)
    assert ops(after) == ["Conv", "Add"]
    assert result.done[0].exactness is Exactness.EXACT_WITH_BIAS_MAP
    assert "2 Conv -> 1 Conv 3x3 with a bias map" in result.done[0].detail
    assert initializer(after, after.graph.node[1].input[1]).shape == (1, 6, 9, 8)


def test_map_varies_only_along_the_padded_axis():
    text = "g (float[N,4,9,W] x) => (float[N,6,h,w] y) { a = Conv(x, A, b) y = Conv<pads=[1,0,1,0]>(a, B) }"
    after, _ = merged(model(text, A=normal(5, 4, 1, 1), b=normal(5), B=normal(6, 5, 3, 3)), sizes={"W": 7})
    assert initializer(after, after.graph.node[1].input[1]).shape == (1, 6, 9, 1)


def test_map_in_the_middle_of_a_chain():
    text = """g (float[N,4,7,7] x) => (float[N,5,h,w] y) {
        a = Conv(x, A, b) d = Conv<pads=[1,1,1,1], group=8>(a, D, e) y = Conv<strides=[2,1]>(d, B, c)
    }"""
    weights = {"A": normal(8, 4, 1, 1), "b": normal(8), "D": normal(8, 1, 3, 3), "e": normal(8)}
    after, result = merged(model(text, **weights, B=normal(5, 8, 2, 1), c=normal(5)))
    assert ops(after) == ["Conv", "Add"] and result.rewrites == 1
    assert attributes(after)["strides"] == [2, 1] and attributes(after)["pads"] == [1, 1, 1, 1]


def test_end_padding_that_only_the_first_pair_would_read_is_no_hindrance():
    # The 2x2 reads its end padding, where the 3x3 sees data, for its last outputs, which the strided 1x1 does not take.
    text = """g (float[1,2,6,6] x) => (float[1,2,h,w] y) {
        a = Conv<pads=[0,0,1,1]>(x, A, b) d = Conv<pads=[0,0,1,1]>(a, B) y = Conv<strides=[3,3]>(d, C)
    }"""
    before = model(text, A=normal(2, 2, 3, 3), b=normal(2), B=normal(2, 2, 2, 2), C=normal(2, 2, 1, 1))
    after, result = merged(before)
    assert ops(after) == ["Conv"] and result.done[0].exactness is Exactness.EXACT


@pytest.mark.parametrize("pad", ['auto_pad="SAME_UPPER"', 'auto_pad="SAME_LOWER", strides=[2,2]', 'auto_pad="VALID"'])
def test_auto_pad(pad):
    text = f"g (float[N,4,7,6] x) => (float[N,3,h,w] y) {{ a = Conv<{pad}>(x, A, b) y = Conv(a, B) }}"
    after, _ = merged(model(text, A=normal(5, 4, 2, 3), b=normal(5), B=normal(3, 5, 1, 1)))
    assert ops(after) == ["Conv"]


def test_average_pool_takes_part():
    text = """g (float[N,4,8,9] x) => (float[N,3,h,w] y) {
        p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x) y = Conv(p, A, b)
    }"""
    after, result = merged(model(text, A=normal(3, 4, 1, 1), b=normal(3)))
    assert ops(after) == ["Conv"] and "1 AveragePool + 1 Conv" in result.done[0].detail


def test_the_name_of_a_model_output_stays():
    text = "g (float[N,4,8,8] x) => (float[N,4,h,w] y, float[N,4,h,w] z) { a = Conv(x, A) y = Conv(a, A) z = Relu(y) }"
    after, _ = merged(model(text, A=normal(4, 4, 1, 1)))
    assert ops(after) == ["Conv", "Relu"]


def test_shared_initializer_is_not_changed_for_the_other_reader():
    text = (
        "g (float[N,4,8,8] x) => (float[N,4,h,w] y, float[N,4,h,w] z) { a = Conv(x, A) y = Conv(a, A) z = Conv(x, A) }"
    )
    after, _ = merged(model(text, A=normal(4, 4, 1, 1)))
    assert ops(after) == ["Conv", "Conv"]


def test_inside_a_branch():
    text = """g (float[1,4,8,8] x, bool c) => (float[1,4,h,w] y) {
        y = If(c) <
            then_branch = t () => (float[1,4,h,w] u) { a = Conv(x, A) u = Conv(a, B) },
            else_branch = e () => (float[1,4,h,w] v) { v = Relu(x) }
        >
    }"""
    before = model(text, A=normal(6, 4, 1, 1), B=normal(4, 6, 1, 1))
    after, result = apply(FuseConvChain(PAYS), before)
    assert result.rewrites == 1
    assert_equivalent(before, after, rel=5e-6)


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_dtypes(kind):
    name = {np.float16: "float16", np.float64: "double"}[kind]
    text = f"g ({name}[N,4,8,8] x) => ({name}[N,4,h,w] y) {{ a = Conv(x, A, b) y = Conv(a, B) }}"
    weights = {"A": normal(6, 4, 3, 3), "b": normal(6), "B": normal(4, 6, 1, 1)}
    before = model(text, **{k: v.astype(kind) for k, v in weights.items()})
    after, result = apply(FuseConvChain(PAYS), before)
    assert result.rewrites == 1 and ops(after) == ["Conv"]
    if kind is np.float16:
        assert_equivalent(before, after, rel=5e-3)  # measured 1.0e-3; the original rounds between the two as well
        return
    # onnxruntime has no float64 Conv on the CPU.
    x = np.random.default_rng(0).normal(size=(2, 4, 8, 8))
    (a,), (b,) = (ReferenceEvaluator(proto).run(None, {"x": x}) for proto in (before, after))
    assert np.abs(a - b).max() <= 1e-14 * np.abs(a).max()  # measured 2.2e-16 to 1e-15


def test_a_value_that_does_not_fit_the_dtype_stays():
    text = "g (float16[N,2,4,4] x) => (float16[N,2,h,w] y) { a = Conv(x, A) y = Conv(a, A) }"
    before = model(text, A=np.full((2, 2, 1, 1), 300, np.float16))
    after, result = apply(FuseConvChain(PAYS), before)
    assert ops(after) == ["Conv", "Conv"] and "does not fit float16" in result.misses[0].reason


# -- what pays -------------------------------------------------------------------------------------------------------


def inverted_bottleneck(channels, expansion, size):
    wide = channels * expansion
    text = f"""g (float[N,{channels},{size},{size}] x) => (float[N,{channels},h,w] y) {{
        a = Conv(x, A, p) d = Conv<pads=[1,1,1,1], group={wide}>(a, D, q) y = Conv(d, B, r)
    }}"""
    shapes = {"A": (wide, channels, 1, 1), "D": (wide, 1, 3, 3), "B": (channels, wide, 1, 1)}
    biases = {"p": (wide,), "q": (wide,), "r": (channels,)}
    return model(text, **{name: normal(*shape) for name, shape in {**shapes, **biases}.items()})


def test_a_chain_pays_where_its_pairs_do_not():
    after, result = merged(inverted_bottleneck(64, 6, 7), settings=None)
    assert ops(after) == ["Conv", "Gather", "Gather", "Add"]
    assert "3 Conv -> 1 Conv 3x3 with a bias map, 2,577,792 -> 1,806,336 MACs" in result.done[0].detail


def test_a_large_map_is_stored_folded():
    before = inverted_bottleneck(16, 6, 56)
    after, result = merged(before, settings=None)
    assert ops(after) == ["Conv", "Gather", "Gather", "Add"]
    assert {tuple(t.dims) for t in after.graph.initializer} == {(16, 16, 3, 3), (1, 16, 3, 3), (56,)}
    assert result.done[0].exactness is Exactness.EXACT_WITH_BIAS_MAP
    assert after.ByteSize() < before.ByteSize()
    folded, result = apply(FoldConstants(), after)
    assert ops(folded) == ops(after)


def test_expansion_by_one_never_pays():
    before = inverted_bottleneck(64, 1, 7)
    after, result = apply(FuseConvChain(), before)
    assert ops(after) == ["Conv"] * 3 and "would" in result.misses[0].reason


def test_the_partition_cuts_a_chain_where_it_is_narrow():
    # 64 -> 8 -> 256 -> 8 -> 64: the wide middle goes, and the narrow 8 stays as a cut.
    text = """g (float[N,64,32,32] x) => (float[N,64,h,w] y) {
        a = Conv(x, A) b = Conv(a, B) c = Conv(b, C) y = Conv(c, D)
    }"""
    shapes = {"A": (8, 64, 3, 3), "B": (256, 8, 1, 1), "C": (8, 256, 1, 1), "D": (64, 8, 1, 1)}
    after, result = merged(model(text, **{name: normal(*shape) for name, shape in shapes.items()}), settings=None)
    assert ops(after) == ["Conv"] * 2 and result.rewrites == 1
    weights = [initializer(after, node.input[1]) for node in after.graph.node]
    assert [weight.shape for weight in weights] == [(8, 64, 3, 3), (64, 8, 1, 1)]


def test_weights_must_not_grow():
    text = "g (float[N,64,32,32] x) => (float[N,64,h,w] y) { a = Conv<strides=[4,4]>(x, A) y = Conv(a, B) }"
    before = model(text, A=normal(32, 64, 1, 1), B=normal(64, 32, 2, 2))
    after, result = apply(FuseConvChain(Settings(cost=FewerOperators())), before)
    assert ops(after) == ["Conv", "Conv"]
    assert result.misses[0].reason == "weights would grow from 40960 to 65536 bytes"


class FewerOperators:
    def price(self, specs):
        return Price(float(len(specs)), sum(spec.weight_bytes for spec in specs))


def test_a_shared_weight_is_not_saved():
    # The merged weight has 4 * 4 * 64 * 64 bytes, as each of the two; neither of these can go.
    text = """g (float[N,64,4,4] x) => (float[N,64,h,w] y, float[N,64,h,w] z) {
        a = Conv(x, A) y = Conv(a, B) c = Relu(x) d = Conv(c, A) e = Relu(d) z = Conv(e, B)
    }"""
    before = model(text, A=normal(64, 64, 1, 1), B=normal(64, 64, 1, 1))
    after, result = apply(FuseConvChain(), before)
    assert ops(after) == ops(before) and "other nodes share them" in result.misses[0].reason


# -- near misses -----------------------------------------------------------------------------------------------------

X, Y = "float[N,4,8,8] x", "float[N,4,h,w] y"
WEIGHTS = {"A": normal(4, 4, 3, 3), "B": normal(4, 4, 3, 3), "b": normal(4), "I": normal(4, 4, 1, 1)}
PADDED = f"g ({X}) => ({Y}) {{ a = Conv<pads=[1,1,1,1]>(x, A) y = Conv<pads=[1,1,1,1]>(a, B) }}"
MODEL_OUTPUT = f"g ({X}) => ({Y}, float[N,4,h,w] a) {{ a = Conv(x, A) y = Conv(a, B) }}"
TWO_READERS = f"g ({X}) => ({Y}, float[N,4,h,w] z) {{ a = Conv(x, A) y = Conv(a, B) z = Relu(a) }}"
WEIGHT_IS_INPUT = f"g ({X}, float[4,4,3,3] U) => ({Y}) {{ a = Conv(x, A) y = Conv(a, U) }}"
DYNAMIC_MAP = "g (float[N,4,H,W] x) => (float[N,4,h,w] y) { a = Conv(x, I, b) y = Conv<pads=[1,1,1,1]>(a, B) }"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PADDED, "class 4"),
        (MODEL_OUTPUT, "read elsewhere"),
        (TWO_READERS, "read elsewhere"),
        (WEIGHT_IS_INPUT, "not a constant"),
        (DYNAMIC_MAP, "needs the size of spatial axis 0"),
    ],
)
def test_near_miss_is_left_alone(text, reason):
    before = model(text, **{k: v for k, v in WEIGHTS.items() if f"{k}" in text})
    after, result = apply(FuseConvChain(PAYS), before)
    assert ops(after) == ops(before) and len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


def test_weight_that_is_not_finite_stays():
    weight = normal(4, 4, 3, 3)
    weight[0, 0, 0, 0] = np.inf
    before = model(f"g ({X}) => ({Y}) {{ a = Conv(x, A) y = Conv(a, B) }}", A=weight, B=WEIGHTS["B"])
    _, result = apply(FuseConvChain(PAYS), before)
    assert result.rewrites == 0 and "not finite" in result.misses[0].reason


@pytest.mark.parametrize("pool", ["ceil_mode=1", "pads=[1,1,1,1]", "count_include_pad=0, pads=[0,1,0,0]"])
def test_pool_that_is_no_convolution_ends_the_chain(pool):
    text = f"g ({X}) => ({Y}) {{ p = AveragePool<kernel_shape=[2,2], {pool}>(x) y = Conv(p, A) }}"
    before = model(text, A=WEIGHTS["A"])
    after, result = apply(FuseConvChain(PAYS), before)
    assert ops(after) == ops(before) and result.rewrites == 0


def test_activation_between_is_another_thing():
    before = model(f"g ({X}) => ({Y}) {{ a = Conv(x, A) r = Relu(a) y = Conv(r, B) }}", A=WEIGHTS["A"], B=WEIGHTS["B"])
    _, result = apply(FuseConvChain(PAYS), before)
    assert result.rewrites == 0 and not result.misses


def test_foreign_operator_of_the_same_name_is_left_alone():
    text = f"""<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g ({X}) => ({Y}) {{ a = ours.Conv(x, A) y = Conv(a, B) }}"""
    graph = graph_of(model(text, A=WEIGHTS["A"], B=WEIGHTS["B"]))
    assert FuseConvChain(PAYS).apply(graph).rewrites == 0
