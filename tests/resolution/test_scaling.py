"""Graphs at another resolution: as the original at that size, mended where a size was written down, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxcompress.cost import count
from onnxcompress.errors import ModelError, RecipeError
from onnxcompress.graph import Graph
from onnxcompress.model_io import load, to_proto
from onnxcompress.resolution.scaling import Resolution, admissible_ratios, scale_resolution
from onnxcompress.shapes import infer_shapes
from onnxcompress.testing import graph_of, inputs_for, model, run

MODELS = Path(__file__).parents[2] / "models"
RNG = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def scaled(proto: onnx.ModelProto, ratio: float, **options: object) -> tuple[onnx.ModelProto, Resolution]:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = graph_of(copy)
    found = scale_resolution(graph, ratio, **options)  # type: ignore[arg-type]
    after = to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    return after, found


def at_size(proto: onnx.ModelProto, size: tuple[int, int]) -> onnx.ModelProto:
    """The same nodes with another declared input size."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    dims = copy.graph.input[0].type.tensor_type.shape.dim
    dims[2].dim_value, dims[3].dim_value = size
    for output in copy.graph.output:
        output.type.tensor_type.ClearField("shape")
    del copy.graph.value_info[:]
    return copy


def resized(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, half-pixel, by onnxruntime."""
    proto = model(
        'r (float[n,c,h,w] x) => (float y) { y = Resize<mode="linear">(x, , , sizes) }',
        sizes=np.array([*images.shape[:2], *size]),
    )
    (result,) = run(proto, {"x": images})
    return np.asarray(result)


CONVOLUTIONS = """g (float[N,3,32,24] x) => (float[N,5] y) {
    a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w1)  b = Relu(a)
    c = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(b)
    d = Conv<pads=[1,1,1,1]>(c, w2)  e = Add(c, d)  f = GlobalAveragePool(e)  h = Flatten(f)  y = Gemm(h, w3, b3) }"""
WEIGHTS = {"w1": weight(8, 3, 3, 3), "w2": weight(8, 8, 3, 3), "w3": weight(8, 5), "b3": weight(5)}


@pytest.mark.parametrize("ratio", [0.9, 0.75, 0.5, 0.3])
def test_native_is_the_original_at_that_size(ratio):
    proto = model(CONVOLUTIONS, **WEIGHTS)
    after, found = scaled(proto, ratio, native=True)
    assert found.repairs == () and found.old == (32, 24)
    feeds = inputs_for(after)
    assert feeds["x"].shape[2:] == found.new == tuple(int(ratio * side + 0.5) for side in (32, 24))
    assert np.array_equal(run(after, feeds)[0], run(at_size(proto, found.new), feeds)[0])  # bitwise


@pytest.mark.parametrize("ratio", [0.9, 0.55])
def test_default_keeps_the_interface_and_resizes_inside(ratio):
    proto = model(CONVOLUTIONS, **WEIGHTS)
    after, found = scaled(proto, ratio)
    assert list(after.graph.input) == list(proto.graph.input) and list(after.graph.output) == list(proto.graph.output)
    assert after.graph.node[0].op_type == "Resize"
    native, _ = scaled(proto, ratio, native=True)
    feeds = inputs_for(proto)
    small = {"x": resized(feeds["x"], found.new)}
    # The factors of the Resize are float32, so weights of pixels differ by some 1e-7: measured 1.9e-7.
    np.testing.assert_allclose(run(after, feeds)[0], run(native, small)[0], rtol=1e-6, atol=1e-6)


def test_ratio_1_is_the_identity():
    proto = model(CONVOLUTIONS, **WEIGHTS)
    for native in (False, True):
        after, found = scaled(proto, 1.0, native=native)
        assert after == proto and found.old == found.new and found.ratio == 1


def test_fewer_macs_are_counted():
    proto = model(CONVOLUTIONS, **WEIGHTS)
    after, _ = scaled(proto, 0.5)
    # 16x12 -> 8x6 behind the first Conv, 8x6 -> 4x3 behind the pool; 40 for the Gemm
    convolutions = 48 * 8 * 27 + 12 * 8 * 72
    assert count(graph_of(after)).macs == convolutions + 40 + 4 * 3 * 16 * 12  # four neighbours for each pixel


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.01, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(RecipeError, match="above 0 and at most 1"):
        scaled(model(CONVOLUTIONS, **WEIGHTS), ratio)


FLATTENED = """g (float[N,3,8,8] x) => (float[N,5] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1)  b = Flatten(a)  y = Gemm(b, w2) }"""
RESHAPED = """g (float[N,3,8,8] x) => (float[N,5] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1)  b = Reshape(a, target)  y = MatMul(b, w2) }"""
WHOLE_KERNEL = "g (float[N,3,8,8] x) => (float[N,5,1,1] y) { y = Conv(x, w) }"
PER_PLACE = "g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Mul(x, w) }"
COORDINATES = "g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Add(x, w) }"
NORMALIZED = "g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = LayerNormalization<axis=1>(x, w) }"
MASKED = """g (float[N,16,4,4] x) => (float[N,16,16] y) {
    t = Reshape(x, target)  u = Transpose<perm=[0,2,1]>(t)  s = MatMul(u, t)  y = Add(s, w) }"""
NO_RULE = "g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = GridSample(x, w) }"
CUT = "g (float[N,3,8,8] x) => (float[N,3,3,8] y) { y = Slice(x, w, e, w2) }"
PLACE = "g (float[N,3,8,8] x) => (float[N,3,8] y) { y = Gather<axis=2>(x, w) }"


@pytest.mark.parametrize(
    ("text", "weights", "message"),
    [
        (FLATTENED, {"w1": weight(4, 3, 3, 3), "w2": weight(256, 5)}, "Gemm 'y' flattens 4 x 8 x 8 = 256"),
        (
            RESHAPED,
            {"w1": weight(4, 3, 3, 3), "w2": weight(256, 5), "target": np.array([-1, 256])},
            "MatMul 'y' flattens 4 x 8 x 8 = 256",
        ),
        (WHOLE_KERNEL, {"w": weight(5, 3, 8, 8)}, "Conv 'y' has a kernel of 8, which fits 8 and not 6"),
        (PER_PLACE, {"w": weight(1, 1, 8, 8)}, "Mul 'y' reads a constant of 1x1x8x8, tied to the size"),
        (COORDINATES, {"w": weight(1, 3, 8, 8)}, "fewer than 8 numbers for each place"),
        (NORMALIZED, {"w": weight(3, 8, 8)}, "LayerNormalization 'y' has parameters for each of 8 places"),
        (MASKED, {"target": np.array([0, 16, 16]), "w": weight(16, 16)}, "several numbers for each pair of places"),
        (NO_RULE, {"w": weight(1, 8, 8, 2)}, "GridSample 'y' is not understood"),
        (CUT, {"w": np.array([0]), "e": np.array([3]), "w2": np.array([2])}, "cuts 8 places at 3"),
        (PLACE, {"w": np.array(5)}, "takes place 5 of 8"),
    ],
)
def test_what_is_tied_to_the_size_is_refused_by_name(text, weights, message):
    proto = model(text, **weights)
    graph = graph_of(proto)
    before, shape = to_proto(graph).SerializeToString(), graph.outputs[0].shape
    with pytest.raises(ModelError, match=message):
        scale_resolution(graph, 0.75, native=True)
    assert to_proto(graph).SerializeToString() == before
    assert graph.outputs[0].shape == shape


GLOBAL_POOL = """g (float[1,3,8,8] x) => (float[1,5] y) {
    a = AveragePool<kernel_shape=[8,8], strides=[8,8]>(x)  b = Reshape(a, target)  y = MatMul(b, w) }"""


def test_a_pool_of_the_whole_image_stays_global():
    weights = {"target": np.array([1, 3]), "w": weight(3, 5)}
    after, found = scaled(model(GLOBAL_POOL, **weights), 0.75, native=True)
    assert [repair.node for repair in found.repairs] == ["a"]
    feeds = inputs_for(after)
    expected = feeds["x"].mean((2, 3)) @ weights["w"]
    np.testing.assert_allclose(run(after, feeds)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_pool_of_a_part_stays_as_it_is():
    text = "g (float[1,3,8,8] x) => (float[1,3,4,4] y) { y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x) }"
    after, found = scaled(model(text), 0.75, native=True)
    assert found.repairs == () and run(after, inputs_for(after))[0].shape == (1, 3, 3, 3)
    assert [dim.dim_value for dim in after.graph.output[0].type.tensor_type.shape.dim] == [1, 3, 3, 3]


TOKENS = """g (float[N,3,16,8] x) => (float[N,5] y) {
    p = Conv<strides=[4,4], kernel_shape=[4,4]>(x, w1)  r = Reshape(p, target)  t = Transpose<perm=[0,2,1]>(r)
    s = Shape<start=0, end=1>(x)  l = Concat<axis=0>(s, ones)  c = Expand(cls, l)  u = Concat<axis=1>(c, t)
    v = Add(u, position)  k = Transpose<perm=[0,2,1]>(v)  q = MatMul(v, k)  m = Softmax<axis=-1>(q)  o = MatMul(m, v)
    f = Gather<axis=1>(o, zero)  y = MatMul(f, w2) }"""


def tokens() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    weights = {
        "w1": weight(12, 3, 4, 4),
        "target": np.array([-1, 12, 8]),
        "ones": np.array([1, 12]),
        "cls": weight(1, 1, 12),
        "position": weight(1, 9, 12),
        "zero": np.array(0),
        "w2": weight(12, 5),
    }
    return model(TOKENS, **weights), weights


def test_positions_of_patches_are_interpolated_and_the_class_token_is_kept():
    proto, weights = tokens()
    after, found = scaled(proto, 0.5, native=True)
    assert found.new == (8, 4) and {repair.node for repair in found.repairs} == {"r", "v"}
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in after.graph.initializer}
    (made,) = [stored[n.input[1]] for n in after.graph.node if n.op_type == "Add"]
    grid = weights["position"][:, 1:].reshape(1, 4, 2, 12).transpose(0, 3, 1, 2)
    expected = resized(grid, (2, 1)).reshape(1, 12, 2).transpose(0, 2, 1)
    assert np.array_equal(made[:, :1], weights["position"][:, :1])
    np.testing.assert_allclose(made[:, 1:], expected, atol=1e-6)  # measured 1.2e-7
    assert run(after, inputs_for(after))[0].shape == (2, 5)


def test_rows_that_no_patch_takes_are_told():
    proto, _ = tokens()
    after, found = scaled(proto, 0.75)
    assert found.new == (12, 6) and [loss.what for loss in found.losses] == ["2 of 6 columns are in no patch"]
    assert run(after, inputs_for(proto))[0].shape == (2, 5)


def test_admissible_ratios_are_those_that_work():
    proto, _ = tokens()
    graph = graph_of(proto)
    assert admissible_ratios(graph) == [0.5, 1.0]
    assert 0.75 in admissible_ratios(graph, whole_patches=False)
    assert admissible_ratios(graph_of(model(FLATTENED, w1=weight(4, 3, 3, 3), w2=weight(256, 5)))) == [1.0]
    assert to_proto(graph) == proto


UNET = """g (float[N,3,16,16] x) => (float[N,2,16,16] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1)  b = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
    c = Resize<mode="nearest">(b, , , sizes)
    d = Concat<axis=1>(a, c)  y = Conv(d, w2) }"""
UNET_SCALES = UNET.replace("(b, , , sizes)", "(b, , sizes)")


def test_sizes_of_a_resize_follow_what_they_meet():
    weights = {"w1": weight(4, 3, 3, 3), "w2": weight(2, 8, 1, 1)}
    proto = model(UNET.replace("N", "1"), sizes=np.array([1, 4, 16, 16]), **weights)
    after, found = scaled(proto, 0.81, native=True)  # 13 pixels, 6 behind the pool
    assert found.new == (13, 13) and len(found.repairs) == 1
    assert run(after, inputs_for(after))[0].shape == (1, 2, 13, 13)


def test_scales_of_a_resize_stay_and_sizes_that_do_not_fit_are_refused():
    weights = {"w1": weight(4, 3, 3, 3), "w2": weight(2, 8, 1, 1), "sizes": np.array([1, 1, 2, 2], np.float32)}
    proto = model(UNET_SCALES, **weights)
    after, _ = scaled(proto, 0.75, native=True)
    feeds = inputs_for(after)
    assert np.array_equal(run(after, feeds)[0], run(at_size(proto, (12, 12)), feeds)[0])  # bitwise
    with pytest.raises(ModelError, match=r"Concat 'd' joins parts that would be \[12, 13\] long"):
        scaled(proto, 0.81)
    assert admissible_ratios(graph_of(proto)) == [n / 16 for n in (4, 6, 8, 10, 12, 14, 16)]


def test_an_output_that_is_an_image_gets_its_size_back():
    weights = {"w1": weight(4, 3, 3, 3), "w2": weight(2, 8, 1, 1), "sizes": np.array([1, 1, 2, 2], np.float32)}
    proto = model(UNET_SCALES, **weights)
    after, found = scaled(proto, 0.75)
    feeds = inputs_for(proto)
    (small,) = run(scaled(proto, 0.75, native=True)[0], {"x": resized(feeds["x"], found.new)})
    assert list(after.graph.output) == list(proto.graph.output)
    np.testing.assert_allclose(run(after, feeds)[0], resized(small, (16, 16)), atol=2e-5)  # measured 2e-6


def test_an_output_of_another_kind_needs_the_native_input():
    text = "g (float[N,3,8,8] x) => (float[N,3,64] y) { y = Reshape(x, target) }"
    proto = model(text, target=np.array([0, 3, 64]))
    with pytest.raises(ModelError, match=r"output 'y' would be \[N, 3, 16\] instead .* change the input itself"):
        scaled(proto, 0.5)
    after, found = scaled(proto, 0.5, native=True)
    assert run(after, inputs_for(after))[0].shape == (2, 3, 16) and len(found.repairs) == 1


OPEN = "g (float[N,3,H,W] x) => (float[N,4,H,W] y) { a = Conv<pads=[1,1,1,1]>(x, w)  y = Relu(a) }"


def test_open_sizes_need_a_shape_and_stay_open():
    proto = model(OPEN, w=weight(4, 3, 3, 3))
    with pytest.raises(ModelError, match="leaves open how many rows"):
        scaled(proto, 0.5)
    after, found = scaled(proto, 0.5, input_shape=(1, 3, 20, 12))
    assert found.old == (20, 12) and found.new == (10, 6)
    assert list(after.graph.input) == list(proto.graph.input)
    for size in ((20, 12), (40, 16)):
        feeds = inputs_for(proto, sizes={"H": size[0], "W": size[1]})
        assert run(after, feeds)[0].shape == (2, 4, *size)


def test_channels_last():
    text = """g (float[N,8,8,3] x) => (float[N,4] y) {
        t = Transpose<perm=[0,3,1,2]>(x)  a = Conv<pads=[1,1,1,1]>(t, w)  y = ReduceMean<axes=[2,3], keepdims=0>(a) }"""
    proto = model(text, w=weight(4, 3, 3, 3))
    after, found = scaled(proto, 0.75)
    assert found.new == (6, 6)
    feeds = inputs_for(proto)
    small = resized(feeds["x"].transpose(0, 3, 1, 2), (6, 6)).transpose(0, 2, 3, 1)
    native, _ = scaled(proto, 0.75, native=True)
    np.testing.assert_allclose(run(after, feeds)[0], run(native, {"x": small})[0], rtol=1e-5, atol=1e-6)


def test_windows_keep_their_size():
    text = """g (float[N,4,8,8] x) => (float[M,16,4] y) {
        a = Reshape(x, cut)  b = Transpose<perm=[0,2,4,3,5,1]>(a)  y = Reshape(b, windows) }"""
    weights = {"cut": np.array([-1, 4, 2, 4, 2, 4]), "windows": np.array([-1, 16, 4])}
    proto = model(text, **weights)
    after, found = scaled(proto, 0.5, native=True)
    assert [repair.what for repair in found.repairs] == ["target [-1, 4, 2, 4, 2, 4] is now [-1, 4, 1, 4, 1, 4]"]
    assert run(after, inputs_for(after))[0].shape == (2, 16, 4)
    with pytest.raises(ModelError, match="where rows and columns go is not known"):
        scaled(proto, 0.75, native=True)


def test_pixels_in_strips_of_a_slice():
    """The four pixels of each block become channels, as YOLO's Focus does."""
    text = """g (float[N,3,8,8] x) => (float[N,6,4,8] y) {
        a = Slice(x, zero, end, axis, two)  b = Slice(x, one, end, axis, two)  y = Concat<axis=1>(a, b) }"""
    weights = {"zero": [0], "one": [1], "two": [2], "axis": [2], "end": [np.iinfo(np.int64).max]}
    proto = model(text, **{name: np.array(value) for name, value in weights.items()})
    after, found = scaled(proto, 0.75, native=True)
    feeds = inputs_for(after)
    expected = np.concatenate([feeds["x"][:, :, 0::2], feeds["x"][:, :, 1::2]], 1)
    assert found.repairs == () and np.array_equal(run(after, feeds)[0], expected)


def test_a_second_input_needs_a_name():
    text = """g (float[N,3,8,8] a, float[N,3,8,8] b) => (float[N,3] y) {
        c = GlobalAveragePool(a)  d = GlobalAveragePool(b)  e = Add(c, d)  y = Flatten(e) }"""
    proto = model(text)
    with pytest.raises(ModelError, match="several inputs have rows and columns"):
        scaled(proto, 0.5)
    after, found = scaled(proto, 0.5, native=True, input_name="b")
    assert found.input_name == "b"
    assert [d.dim_value for d in after.graph.input[1].type.tensor_type.shape.dim][2:] == [4, 4]
    with pytest.raises(RecipeError, match="there is no input 'c'"):
        scaled(proto, 0.5, input_name="c")


def test_before_opset_11_only_the_input_itself_can_be_changed():
    text = "g (float[N,3,8,8] x) => (float[N,3,1,1] y) { y = GlobalAveragePool(x) }"
    with pytest.raises(ModelError, match="opset 9 has no half-pixel Resize"):
        scaled(model(text, opset=9), 0.5)
    assert scaled(model(text, opset=9), 0.5, native=True)[1].new == (4, 4)
    for opset in (11, 12, 13, 18):
        after, _ = scaled(model(text, opset=opset), 0.5)
        assert run(after, inputs_for(after))[0].shape == (2, 3, 1, 1)


def test_antialias_needs_its_opset():
    text = "g (float[N,3,8,8] x) => (float[N,3,1,1] y) { y = GlobalAveragePool(x) }"
    after, _ = scaled(model(text, opset=18), 0.5, antialias=True)
    assert helper.get_attribute_value(after.graph.node[0].attribute[-1]) == 1
    assert scaled(model(text, opset=18), 0.5)[0] == after  # what is better is the default
    after, _ = scaled(model(text, opset=18), 0.5, antialias=False)
    assert "antialias" not in [attribute.name for attribute in after.graph.node[0].attribute]
    with pytest.raises(ModelError, match="no antialiased Resize"):
        scaled(model(text), 0.5, antialias=True)


@pytest.mark.parametrize("path", [*sorted(MODELS.glob("*_digits.onnx")), MODELS / "digits.onnx"], ids=lambda p: p.stem)
@pytest.mark.parametrize("native", [False, True])
def test_reference_networks(path, native):
    graph = load(path)
    infer_shapes(graph)
    before = count(graph).macs
    found = scale_resolution(graph, 0.75, native=native)
    assert found.new == (6, 6) and 0.4 < count(graph).macs / before < 0.75
    side = 6 if native else 8
    feeds = {"image": np.random.default_rng(0).random((3, 1, side, side), dtype=np.float32)}
    assert run(to_proto(graph), feeds)[0].shape == (3, 10)


def test_a_nested_graph_that_reads_the_image_pins_it():
    then = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["t"])], "then", [], [helper.make_tensor_value_info("t", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["e"])], "else", [], [helper.make_tensor_value_info("e", 1, None)]
    )
    text = "g (float[1,3,8,8] x, bool[1] c) => (float[1,3,8,8] y) { a = Abs(x)  y = Identity(a) }"
    proto = model(text)
    del proto.graph.node[1]
    proto.graph.node.append(helper.make_node("If", ["c"], ["y"], name="choice", then_branch=then, else_branch=other))
    with pytest.raises(ModelError, match="If 'choice' reads 'a', whose size changes, in a nested graph"):
        scaled(proto, 0.5)


def test_the_graph_owns_its_shapes_afterwards():
    proto = model(CONVOLUTIONS, **WEIGHTS)
    graph: Graph = graph_of(proto)
    scale_resolution(graph, 0.5)
    shapes = {t.name: t.shape for node in graph.nodes for t in node.outputs}
    assert shapes["a"][1:] == [8, 8, 6] and shapes["y"][1:] == [5] and isinstance(shapes["a"][0], str)
