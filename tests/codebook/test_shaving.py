"""Shaving a small file: what is dropped says nothing, what is narrowed stays near, and names that matter stay."""

import numpy as np
import onnx
import pytest

from onnxcompress.codebook.shaving import Shaving, shave
from onnxcompress.model_io import load, to_proto
from onnxcompress.testing import model, ops, run
from onnxcompress.validation.signature import interface_differences

RNG = np.random.default_rng(0)
DEFAULTS = "strides = [1, 1], dilations = [1, 1], group = 1, pads = [0, 0, 0, 0]"
TEXT = f"""g (float[N,2,6,6] x) => (float[N,64,4,4] y)
    {{ long_name_of_a_sum = Conv<{DEFAULTS}, kernel_shape = [3, 3]>(x, W, b)  y = Relu(long_name_of_a_sum) }}"""


def rand(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def half(*shape):
    """Numbers that float16 holds."""
    return rand(*shape).astype(np.float16).astype(np.float32)


def example():
    proto = model(TEXT, W=rand(64, 2, 3, 3), b=half(64))
    node = proto.graph.node[0]
    node.name, node.doc_string = "features.0/Conv", "a note"
    node.metadata_props.add(key="pkg.torch.stack_trace", value="long")
    proto.graph.value_info.add(name="long_name_of_a_sum").type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return proto


def shaved(proto, amount):
    graph = load(proto)
    shave(graph, amount)
    return to_proto(graph)


def test_what_says_nothing_goes_and_numbers_stay():
    before = example()
    after = shaved(before, Shaving.NAMES)
    onnx.checker.check_model(after, full_check=True)
    assert not interface_differences(before, after)
    assert ops(after) == ["Cast", "Conv", "Relu"] and not after.graph.value_info
    conv = after.graph.node[1]
    assert [attr.name for attr in conv.attribute] == ["kernel_shape"]
    assert conv.name == "features.0/Conv" and not conv.doc_string and not conv.metadata_props
    assert {t.name: t.data_type for t in after.graph.initializer} == {"W": 1, "b": 10}
    assert len(conv.output[0]) == 1 and after.graph.node[2].output[0] == "y"
    feeds = {"x": rand(3, 2, 6, 6)}
    np.testing.assert_array_equal(run(before, feeds)[0], run(after, feeds)[0])
    assert before.ByteSize() - after.ByteSize() > 128  # of the biases alone


def test_how_far_it_goes():
    before = example()
    assert shaved(before, Shaving.NONE) == before
    plain, named = shaved(before, Shaving.PLAIN), shaved(before, Shaving.NAMES)
    assert plain.graph.node[1].output[0] == "long_name_of_a_sum"
    assert named.ByteSize() < plain.ByteSize() < before.ByteSize()


@pytest.mark.parametrize(
    "attributes", ["strides = [2, 2]", "dilations = [2, 2]", "pads = [1, 1, 1, 1]", "group = 2", 'auto_pad = "VALID"']
)
def test_attributes_that_say_something_stay(attributes):
    channels = 1 if "group" in attributes else 2
    text = f"g (float[N,2,6,6] x) => (float[N,64,A,B] y) {{ y = Conv<{attributes}, kernel_shape = [3, 3]>(x, W) }}"
    before = model(text, W=rand(64, channels, 3, 3))
    after = shaved(before, Shaving.NAMES)
    assert after.graph.node[0] == before.graph.node[0]
    feeds = {"x": rand(2, 2, 6, 6)}
    np.testing.assert_array_equal(run(before, feeds)[0], run(after, feeds)[0])


BN = "y = BatchNormalization(x, s, b, m, v)"
NEAR_MISSES = {
    "too few to pay": ("g (float[N,8] x) => (float[N,8] y) { y = Add(x, b) }", {"b": rand(8)}),
    "a weight": ("g (float[N,64] x) => (float[N,64] y) { y = Gemm<transB = 1>(x, W) }", {"W": rand(64, 64)}),
    "beyond float16": ("g (float[N,64] x) => (float[N,64] y) { y = Add(x, b) }", {"b": 1e6 * rand(64)}),
    "a divisor": ("g (float[N,64] x) => (float[N,64] y) { y = Div(x, b) }", {"b": rand(64)}),
    "an int8 scale": (
        "g (float[N,64] x) => (float[N,64] y) { c = Cast<to = 1>(q)  W = Mul(c, s)  y = Gemm<transB = 1>(x, W) }",
        {"q": RNG.integers(-9, 9, (64, 64)).astype(np.int8), "s": rand(64, 1)},
    ),
    "an output": ("g (float[N,64] x) => (float[N,64] y, float[64] b) { y = Add(x, b) }", {"b": half(64)}),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_constants_that_stay_as_they_are(name):
    text, weights = NEAR_MISSES[name]
    before = model(text, **weights)
    after = shaved(before, Shaving.NAMES)
    assert ops(after) == ops(before)
    assert {t.name: t.data_type for t in after.graph.initializer} == {
        t.name: t.data_type for t in before.graph.initializer
    }


def test_a_variance_stays_and_a_shared_constant_has_one_cast():
    before = model(f"g (float[N,64] x) => (float[N,64] y) {{ {BN} }}", **{k: half(64) for k in "sbm"}, v=rand(64) ** 2)
    after = shaved(before, Shaving.NAMES)
    assert {t.name: t.data_type for t in after.graph.initializer} == {"s": 10, "b": 10, "m": 10, "v": 1}
    before = model("g (float[N,64] x) => (float[N,64] y) { h = Mul(x, s)  k = Relu(h)  y = Mul(k, s) }", s=half(64))
    after = shaved(before, Shaving.NAMES)
    assert ops(after) == ["Cast", "Mul", "Relu", "Mul"]
    feeds = {"x": rand(3, 64)}
    np.testing.assert_array_equal(run(before, feeds)[0], run(after, feeds)[0])


def test_names_of_bodies_stay_unique():
    text = """g (bool c, float[N,3] x) => (float[N,3] y) {
        outer = Relu(x)
        y = If(c) <
            then_branch = t () => (float[N,3] p) { inner = Neg(outer)  p = Exp(inner) },
            else_branch = e () => (float[N,3] q) { other = Abs(outer)  q = Neg(other) }>
    }"""
    before = model(text)
    after = shaved(before, Shaving.NAMES)
    onnx.checker.check_model(after)
    for flag in (True, False):
        feeds = {"c": np.array(flag), "x": rand(2, 3)}
        np.testing.assert_array_equal(run(before, feeds)[0], run(after, feeds)[0])
    assert b"outer" not in after.SerializeToString() and b"inner" not in after.SerializeToString()
