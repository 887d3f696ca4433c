"""Check inputs for models that refuse naive ones: every size 2, every integer 7."""

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.errors import ModelError, RecipeError, RuntimeFailure
from onnxcompress.runtime import Runtime
from onnxcompress.samples import MAX_TRIES, check_samples
from onnxcompress.samples.scopes import value_dims
from onnxcompress.testing import model

W34 = np.arange(12, dtype=np.float32).reshape(3, 4)
FUNCTION = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
g (int64[N] i, float[3,4] W) => (float[N,4] y) { y = local.pick(W, i) }
<domain: "local", opset_import: ["": 17]>
pick (table, places) => (rows) { p = Identity(places)  rows = Gather(table, p) }"""
BODY = "<body = b (int64 t, bool c, int64[N] j) => (bool d, int64[N] k, float[N,4] s)"
LOOP = f"""g (int64[N] i) => (float[A,N,4] y) {{
    n, y = Loop {BODY} {{ d = Identity(c)  k = Identity(j)  s = Gather(W, k) }}> """


@pytest.fixture(scope="module")
def runtime():
    with Runtime(timeout_s=60) as it:
        yield it


@pytest.fixture
def run_of(runtime):
    def make(proto):
        data = proto.SerializeToString()
        return lambda feed: runtime.run(data, [feed])[0]

    return make


def naive(proto):
    """A feed without a thought: sizes 2, integers 7."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    feed = {}
    for value in proto.graph.input:
        if value.name not in weights:
            shape = [dim if isinstance(dim, int) else 2 for dim in value_dims(value.type)]
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            values = np.random.default_rng(0).normal(size=shape) if dtype.kind == "f" else np.full(shape, 7)
            feed[value.name] = np.asarray(values.astype(dtype))
    return feed


REFUSES_NAIVE = {
    "gather": ("g (int64[N] i) => (float[N,4] y) { y = Gather(W, i) }", {"W": W34}),
    "gather of a computed table": (
        "g (int64[N] i, float[3,4] x) => (float[N,4] y) { t = Mul(x, W)  y = Gather(t, i) }",
        {"W": W34},
    ),
    "gather along a named dimension": (
        "g (int64[3] i, float[N,4] x) => (float[3,4] y) { y = Gather(x, i) }",
        {},
    ),
    "gather elements": ("g (int64[3,N] i) => (float[3,N] y) { y = GatherElements<axis=1>(W, i) }", {"W": W34}),
    "gather nd": ("g (int64[N,2] i) => (float[N] y) { y = GatherND(W, i) }", {"W": W34}),
    "scatter elements": (
        "g (int64[3,2] i, float[3,2] u) => (float[3,4] y) { y = ScatterElements<axis=1>(W, i, u) }",
        {"W": W34},
    ),
    "through cast, unsqueeze and slice": (
        """g (int32[N,M] i) => (float[A,B,C,4] y) {
            a = Cast<to=7>(i)  b = Unsqueeze(a, zero)  c = Slice(b, zero, two, two)  d = Transpose(c)
            y = Gather(W, d) }""",
        {"W": W34, "zero": np.array([0]), "two": np.array([2])},
    ),
    "minus a constant": (
        "g (int64[N] i) => (float[N,4] y) { a = Sub(i, five)  b = Mul(a, one)  y = Gather(W, b) }",
        {"W": W34, "five": np.array(-5 + 3), "one": np.array(1)},
    ),
    "quantized table in a branch": (
        """g (int64[N] i, bool c) => (float[N,4] y) {
            y = If(c) <then_branch = t () => (float[N,4] a) { d = DequantizeLinear(W, k)  a = Gather(d, i) },
                       else_branch = e () => (float[N,4] b) { n = DequantizeLinear(W, k)  b = Gather(n, i) }> }""",
        {"W": np.arange(12, dtype=np.int8).reshape(3, 4), "k": np.float32(0.5)},
    ),
    "captured by a branch": (
        """g (int64[N] i, bool c) => (float[N,4] y) {
            y = If(c) <then_branch = t () => (float[N,4] a) { a = Gather(W, i) },
                       else_branch = e () => (float[N,4] b) { b = Gather(V, i) }> }""",
        {"W": W34, "V": -W34},
    ),
    "result of a branch": (
        """g (int64[N] i, bool c) => (float[N,4] y) {
            j = If(c) <then_branch = t () => (int64[N] a) { a = Identity(i) },
                       else_branch = e () => (int64[N] b) { b = Add(i, one) }>
            y = Gather(W, j) }""",
        {"W": W34, "one": np.array(1)},
    ),
    "carried by a loop": (LOOP + "(three, , i) }", {"W": W34, "three": np.array(3)}),
    "in a local function": (FUNCTION, {}),
    "reshape": ("g (float[2,6] x, int64[3] s) => (float[A,B,C] y) { y = Reshape(x, s) }", {}),
    "reshape to a declared shape": ("g (float[2,6] x, int64[3] s) => (float[3,2,2] y) { y = Reshape(x, s) }", {}),
    "expand": ("g (float[2,1] x, int64[3] s) => (float[A,B,C] y) { y = Expand(x, s) }", {}),
    "split": ("g (float[9] x, int64[2] s) => (float[A] y, float[B] z) { y, z = Split(x, s) }", {}),
    "squeeze axes": ("g (float[1,4] x, int64[1] a) => (float[4] y) { y = Squeeze(x, a) }", {}),
    "reduce axes": ("g (float[3,4] x, int64[1] a) => (float[A,B] y) { y = ReduceSum(x, a) }", {}),
    "top k": ("g (float[N,4] x, int64[1] k) => (float[N,K] y, int64[N,K] z) { y, z = TopK(x, k) }", {}),
    "resize sizes": (
        'g (float[1,2,4,4] x, int64[4] s) => (float[A,B,C,D] y) { y = Resize<mode="linear">(x, , , s) }',
        {},
    ),
    "lengths of an LSTM": (
        "g (float[5,N,3] x, int32[N] n) => (float[5,1,N,2] y) { y = LSTM<hidden_size=2>(x, V, R, , n) }",
        {"V": np.ones((1, 8, 3), np.float32), "R": np.ones((1, 8, 2), np.float32)},
    ),
    "reversed sequences": (
        "g (float[5,N] x, int64[N] n) => (float[5,N] y) { y = ReverseSequence<time_axis=0, batch_axis=1>(x, n) }",
        {},
    ),
    "image of 32 a step": (
        """g (float[N,3,H,W] x) => (float[N,3,H,W] y) {
            a = AveragePool<kernel_shape=[32,32], strides=[32,32]>(x)  b = Resize<mode="nearest">(a, , k)
            y = Sub(x, b) }""",
        {"k": np.array([1, 1, 32, 32], np.float32)},
    ),
    "image of one size, channels last": (
        "g (float[N,H,W,3] x) => (float[N,4] y) { a = Reshape(x, s)  y = MatMul(a, M) }",
        {"s": np.array([0, 28 * 28 * 3]), "M": np.eye(28 * 28 * 3, 4, dtype=np.float32)},
    ),
    "a sum of names": (
        """g (float[1,past,4] p, float[1,length,4] x, float[1,"past + length"] m) => (float[1,A,4] z) {
            a = Concat<axis=1>(p, x)  n = Unsqueeze(m, two)  z = Mul(a, n) }""",
        {"two": np.array([2])},
    ),
    "sample rate": (
        """g (float[N,256] x, int64 sr) => (float[N,256] y) {
            a = Div(sr, k)  b = Sub(a, three)  c = Gather(W, b)  y = Mul(x, c) }""",
        {"k": np.array(8000), "three": np.array(3), "W": np.array([1.0, 2.0], np.float32)},
    ),
}


HIGHEST = {  # index, of a table of three rows or four columns
    **dict.fromkeys(["gather elements", "scatter elements"], 3),
    "minus a constant": 0,
    "result of a branch": 1,
    "gather along a named dimension": 1,
}
TRIES = {"image of one size, channels last": 36}  # the others are right at once, for each of two samples


@pytest.mark.parametrize("rule", REFUSES_NAIVE)
def test_a_model_that_refuses_naive_inputs_gets_others(run_of, rule):
    text, weights = REFUSES_NAIVE[rule]
    proto = model(text, **weights)
    run = run_of(proto)
    with pytest.raises(RuntimeFailure):
        run(naive(proto))
    samples = check_samples(proto, run, seed=1)
    assert len(samples) == 2
    assert all(sample.weakness is None for sample in samples.samples)
    assert samples.tries == TRIES.get(rule, 2)
    if "i" in samples[0]:
        assert max(feed["i"].max() for feed in samples) == HIGHEST.get(rule, 2)


def found(run_of, text, *, weights=None, **options):
    proto = model(text, **(weights or {}))
    return check_samples(proto, run_of(proto), **options)


def test_floats_are_signed_with_ties_and_zeros(run_of):
    x = found(run_of, "g (float[4] x) => (float[4] y) { y = Exp(x) }")[0]["x"]
    assert x.dtype == np.float32
    assert x.min() < 0 < x.max()
    assert (x == 0).any()
    assert not np.signbit(x[x == 0]).any()
    assert np.unique(x).size < x.size


def test_uniform_inputs_would_hide_this_padding(run_of):
    before = model(
        "g (float[1,2,12,12] x) => (float[1,2,B,C] y) { y = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) }"
    )
    after = model(
        "g (float[1,2,12,12] x) => (float[1,2,B,C] y) { p = Pad(x, k)  y = MaxPool<kernel_shape=[3,3]>(p) }",
        k=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    )
    one, two = run_of(before), run_of(after)
    assert any((one(feed)[0] != two(feed)[0]).any() for feed in check_samples(before, one))
    uniform = {"x": np.random.default_rng(0).random((1, 2, 12, 12), np.float32)}
    assert (one(uniform)[0] == two(uniform)[0]).all()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16), ("double", np.float64), ("uint8", np.uint8)],
)
def test_every_number_type(run_of, kind, dtype):
    samples = found(run_of, f"g ({kind}[N,64] x) => ({kind}[N,64] y) {{ y = Identity(x) }}")
    assert all(feed["x"].dtype == dtype for feed in samples)
    if kind == "uint8":
        assert samples[0]["x"].max() > 200


def test_wide_integers_without_a_restriction_are_signed(run_of):
    x = found(run_of, "g (int64[N,64] x) => (int64[N,64] y) { y = Neg(x) }")[0]["x"]
    assert x.min() < 0 < x.max() < 10


def test_both_ends_of_a_table_are_used(run_of):
    samples = found(run_of, REFUSES_NAIVE["gather"][0], weights=REFUSES_NAIVE["gather"][1])
    assert {0, 2} <= set(samples[0]["i"].tolist()) <= {0, 1, 2}


def test_an_index_follows_the_size_of_its_dimension(run_of):
    for feed in found(run_of, REFUSES_NAIVE["gather along a named dimension"][0]):
        assert feed["i"].max() == len(feed["x"]) - 1


def test_a_list_is_no_batch_unless_it_goes_with_one(run_of):
    text = "g (float[n] x, int64[3] s) => (float[A] a, float[B] b, float[C] c) { a, b, c = Split(x, s) }"
    assert [feed["x"].shape for feed in found(run_of, text)] == [(16,), (8,)]
    text = "g (int64[n] k, float[n,4] x) => (float[n,4] y) { c = Cast<to=1>(k)  d = Unsqueeze(c, one)  y = Mul(x, d) }"
    samples = found(run_of, text, weights={"one": np.array([1])})
    assert [feed["k"].shape for feed in samples] == [(2,), (1,)]


def test_axes_of_one_name_have_one_size_and_two_sizes_in_all(run_of):
    text = "g (float[batch,T] x, float[batch,T] y, float[T] z) => (float[batch,T] s) { a = Add(x, y)  s = Add(a, z) }"
    samples = found(run_of, text)
    assert [feed["x"].shape for feed in samples] == [feed["y"].shape for feed in samples]
    assert [feed["x"].shape[0] for feed in samples] == [2, 1]
    assert len({feed["z"].shape for feed in samples}) == 2
    assert samples.held == ()


def test_unnamed_axes_that_have_to_agree_move_together(run_of):
    text = """g (float[?,4] x, float[1,?,4] state) => (float[1,B,8] y) {
        a = Unsqueeze(x, k)  y = Concat<axis=2>(a, state) }"""
    samples = found(run_of, text, weights={"k": np.array([0])})
    sizes = [(feed["x"].shape[0], feed["state"].shape[1]) for feed in samples]
    assert all(a == b for a, b in sizes)
    assert len(set(sizes)) == 2
    assert found(run_of, text, weights={"k": np.array([0])}, batch=5)[0]["state"].shape == (1, 5, 4)


def test_a_size_that_cannot_vary_is_reported(run_of):
    text, weights = REFUSES_NAIVE["image of one size, channels last"]
    samples = found(run_of, text, weights=weights)
    assert samples.held == ("H", "W")
    assert samples[0]["x"].shape == (2, 28, 28, 3)
    assert samples[1]["x"].shape == (1, 28, 28, 3)
    assert samples.describe()[-1] == "one size only: H = 28, W = 28"


def test_images_are_multiples_of_32_and_differ(run_of):
    text, weights = REFUSES_NAIVE["image of 32 a step"]
    assert [feed["x"].shape for feed in found(run_of, text, weights=weights)] == [(2, 3, 64, 96), (1, 3, 96, 64)]


def test_an_input_without_a_shape(run_of):
    proto = model("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    samples = check_samples(proto, run_of(proto))
    assert samples[0]["x"].ndim == 4
    assert samples[1]["x"].ndim != 4


def test_given_shapes_and_batch(run_of):
    text = "g (float[N,H,4] x, float[N,T] y) => (float[N,H,4] z, float[N,T] w) { z = Relu(x)  w = Relu(y) }"
    samples = found(run_of, text, shapes={"x": (None, 5, 4)}, batch=7)
    assert [feed["x"].shape for feed in samples] == [(7, 5, 4), (7, 5, 4)]
    assert [feed["y"].shape[0] for feed in samples] == [7, 7]
    assert samples[0]["y"].shape != samples[1]["y"].shape


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1,)}, "no such input to feed; its inputs: x, y"),
        ({"x": (1, 2)}, "2 sizes, the model declares 3 dimensions"),
        ({"x": (1, 2, 5)}, "axis 2 is 5, but 4 is declared"),
        ({"x": (1, 2, 4), "y": (3, 3)}, "axis 0 is 3, but 1 is already given for 'N'"),
    ],
)
def test_a_given_shape_that_does_not_fit(run_of, shapes, message):
    text = "g (float[N,H,4] x, float[N,T] y) => (float[N,H,4] z, float[N,T] w) { z = Relu(x)  w = Relu(y) }"
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        found(run_of, text, shapes=shapes)


def test_masks_end_in_zeros_and_keep_a_one(run_of):
    text = """g (int64[N,T] input_ids, int64[N,T] attention_mask, int64[N,T] token_type_ids) => (float[N,T,4] y) {
        a = Gather(W, input_ids)  b = Gather(V, token_type_ids)  c = Add(a, b)
        m = Cast<to=1>(attention_mask)  n = Unsqueeze(m, k)  y = Mul(c, n) }"""
    samples = found(run_of, text, weights={"W": W34, "V": W34[:2], "k": np.array([2])})
    for feed in samples:
        mask = feed["attention_mask"]
        assert (mask[:, 0] == 1).all()
        assert (np.diff(mask, axis=1) <= 0).all()
        assert (mask == 0).any()
    assert (samples[0]["token_type_ids"] == 0).all()
    assert set(samples[1]["token_type_ids"].reshape(-1)) == {0, 1}


def test_one_hot_stays_below_its_depth(run_of):
    text = "g (int64[N,16] i) => (float[N,16,3] y) { y = OneHot(i, depth, values) }"
    weights = {"depth": np.array(3), "values": np.array([0, 1], np.float32)}
    assert found(run_of, text, weights=weights)[0]["i"].max() == 2


def test_a_part_of_a_shape_is_a_small_number(run_of):
    text = "g (float[12] x, int64[1] n) => (float[A,B] y) { s = Concat<axis=0>(n, rest)  y = Reshape(x, s) }"
    samples = found(run_of, text, weights={"rest": np.array([-1])})
    assert [int(feed["n"][0]) for feed in samples] == [3, 2]
    assert samples.tries == 2


def test_positions_count_up(run_of):
    text = "g (int64[N,T] position_ids) => (float[N,T,4] y) { y = Gather(W, position_ids) }"
    ids = found(run_of, text, weights={"W": np.tile(W34, (10, 1))})[0]["position_ids"]
    assert (ids == np.arange(ids.shape[1])).all()
    text = "g (int64[N,T] position_ids) => (float[N,T] y) { a = Cast<to=1>(position_ids)  y = Sin(a) }"
    ids = found(run_of, text)[0]["position_ids"]
    assert (ids == np.arange(ids.shape[1])).all()


def test_conditions_take_both_values(run_of):
    text = """g (float[4] x, bool c) => (float[4] y) { y = If(c) <then_branch = t () => (float[4] a) { a = Relu(x) },
        else_branch = e () => (float[4] b) { b = Neg(x) }> }"""
    assert [bool(feed["c"]) for feed in found(run_of, text)] == [True, False]


def test_trip_counts_are_small(run_of):
    text = """g (int64 n, float[4] x) => (float[4] y) { y = Loop (n, , x)
        <body = b (int64 i, bool c, float[4] u) => (bool d, float[4] v) { d = Identity(c)  v = Add(u, u) }> }"""
    counts = [int(feed["n"]) for feed in found(run_of, text)]
    assert set(counts) <= {1, 2, 3}
    assert len(set(counts)) == 2


def test_both_sides_of_a_comparison_are_taken(run_of):
    text = """g (float[4] x, int64 mode) => (float[4] y) { c = Equal(mode, k)
        y = If(c) <then_branch = t () => (float[4] a) { a = Relu(x) },
                   else_branch = e () => (float[4] b) { b = Neg(x) }> }"""
    taken = [int(feed["mode"]) == 48 for feed in found(run_of, text, weights={"k": np.array(48)})]
    assert taken == [True, False]


def test_thresholds_are_hit(run_of):
    text = "g (float[N,64] x) => (bool[N,64] y) { y = Less(x, k) }"
    assert (found(run_of, text, weights={"k": np.float32(0.3)})[0]["x"] == np.float32(0.3)).any()


def test_sample_rates(run_of):
    text, weights = REFUSES_NAIVE["sample rate"]
    assert [int(feed["sr"]) for feed in found(run_of, text, weights=weights)] == [16000, 8000]


def test_strings(run_of):
    samples = found(run_of, "g (string[N,3] x) => (string[N,3] y) { y = Identity(x) }")
    words = [word for feed in samples for word in feed["x"].reshape(-1)]
    assert all(isinstance(word, str) and word.isascii() for word in words)


def interface(inputs, outputs, nodes, weights=(), opset=17, ir_version=8):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def test_sequences_of_tensors(run_of):
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 3])
    x = helper.make_value_info("x", helper.make_sequence_type_proto(tensor))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    proto = interface([x], [y], [helper.make_node("ConcatFromSequence", ["x"], ["y"], axis=0)])
    samples = check_samples(proto, run_of(proto))
    assert [len(feed["x"]) for feed in samples] == [2, 3]
    assert {item.shape for item in samples[0]["x"]} == {(2, 3)}


def test_optional_inputs_are_given_and_left_empty(run_of):
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, [4])
    x = helper.make_value_info("x", helper.make_optional_type_proto(tensor))
    y = helper.make_tensor_value_info("y", TensorProto.BOOL, [])
    proto = interface([x], [y], [helper.make_node("OptionalHasElement", ["x"], ["y"])], opset=18)
    first, second = check_samples(proto, run_of(proto))
    assert first["x"].shape == (4,)
    assert second["x"] is None


def overridable(ir_version):
    x, w, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xwy")
    weight = numpy_helper.from_array(np.full(4, 2, np.float32), "w")
    return interface([x, w], [y], [helper.make_node("Mul", ["x", "w"], ["y"])], [weight], 7, ir_version)


def test_defaults_are_left_alone_then_overridden(run_of):
    proto = overridable(8)
    samples = check_samples(proto, run_of(proto))
    assert "w" not in samples[0]
    assert samples.samples[1].defaults == ("w",)
    np.testing.assert_allclose(samples[1]["w"], 2, rtol=0.1)
    assert (samples[1]["w"] != 2).all()


def test_before_ir_4_initializers_are_no_inputs(run_of):
    proto = overridable(3)
    samples = check_samples(proto, run_of(proto))
    assert [set(feed) for feed in samples] == [{"x"}, {"x"}]
    assert samples.tries == 2


def test_a_model_without_inputs(run_of):
    proto = model("g () => (float[3,4] y) { y = Relu(W) }", W=W34)
    samples = check_samples(proto, run_of(proto))
    assert list(samples) == [{}]
    assert samples.describe() == ["sample 1: no inputs"]


def test_same_seed_same_inputs(run_of):
    one, two, other = (found(run_of, *[REFUSES_NAIVE["reshape"][0]], seed=seed) for seed in (3, 3, 4))
    assert all((a["x"] == b["x"]).all() for a, b in zip(one, two, strict=True))
    assert (one[0]["x"] != other[0]["x"]).any()


LOG = "g (float[N,8] x) => (float[N,8] y) { y = Log(x) }"


def test_values_that_give_nan_are_replaced(run_of):
    samples = found(run_of, LOG)
    assert [sample.variant for sample in samples.samples] == ["positive", "positive"]
    assert all(np.isfinite(outputs[0]).all() for outputs in samples.outputs)


def test_values_that_saturate_are_replaced(run_of):
    text = "g (float[N,8] x) => (float[N,8] y) { a = Mul(x, k)  b = Sub(a, m)  y = Sigmoid(b) }"
    first, _ = found(run_of, text, weights={"k": np.float32(8), "m": np.float32(25)}).samples
    assert first.variant != "signed"
    assert first.outputs[0].max() > 1e-4


def test_a_constant_output_is_accepted_and_told(run_of):
    samples = found(run_of, "g (float[N,8] x) => (float[N,8] y) { y = Mul(x, k) }", weights={"k": np.float32(0)})
    assert samples.samples[0].weakness == "every output is constant"
    assert samples.describe()[0] == "sample 1: x 2x8 (every output is constant)"


def test_the_refusal_names_input_sizes_reason_and_the_way_out(run_of):
    tried = 0
    proto = model("g (float[N,3,rows,cols] img, int64[5] k) => (float[N] y) { y = Reshape(img, k) }")

    def refuse(feed):
        nonlocal tried
        tried += 1
        raise RuntimeFailure("node 'a' wants more")

    with pytest.raises(ModelError) as caught:
        check_samples(proto, refuse)
    message = str(caught.value)
    assert "'img' float[N, 3, rows, cols]" in message
    assert "'k' int64[5]" in message
    assert f"{tried} tries" in message
    assert "rows = 28, 32, 48, ..., 1024" in message
    assert "node 'a' wants more" in message
    assert message.endswith("give --input-shape img:1,3,224,224 or --data FILE.npz")
    assert tried <= MAX_TRIES
    assert "\n" not in message


def test_a_model_that_does_not_load_is_not_tried_again(run_of):
    class Refused(RuntimeFailure):
        stage = "load"

    def refuse(feed):
        nonlocal tried
        tried += 1
        raise Refused("unknown operator")

    tried = 0
    with pytest.raises(ModelError, match="unknown operator"):
        check_samples(model(LOG), refuse)
    assert tried == 1
