"""The whole verb, and what counts as a change of the interface."""

import json
import math

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.data import Dataset
from onnxcompress.errors import DataError, RecipeError
from onnxcompress.runtime import Runtime
from onnxcompress.testing import model
from onnxcompress.validation.judge import METRIC_TOLERANCE, data_feeds, interface_differences, validate

RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((3, 8)).astype(np.float32)
LABELS = np.arange(60) % 3
POINTS = (CENTRES[LABELS] + 0.1 * RNG.standard_normal((60, 8))).astype(np.float32)


@pytest.fixture(scope="module")
def runtime():
    with Runtime(timeout_s=60) as it:
        yield it


def classifier(weights=CENTRES.T, batch="N"):
    """The nearest centre by the inner product; on these points all are right."""
    text = f"g (float[{batch},8] x) => (float[{batch},3] scores) {{ a = MatMul(x, W)  scores = Sub(a, b) }}"
    return model(text, W=np.ascontiguousarray(weights), b=(np.square(CENTRES).sum(1) / 2).astype(np.float32))


def swapped(wrong):
    """A classifier that takes ``wrong`` of the 60 points for another class: it recognizes them by their first value."""
    marks = POINTS[:wrong, 0]
    text = """g (float[N,8] x) => (float[N,3] scores) {
        a = MatMul(x, W)  s = Sub(a, b)  f = Gather<axis=1>(x, zero)  g = Equal(f, marks)  h = Cast<to=1>(g)
        i = ReduceMax<axes=[1], keepdims=1>(h)  j = Cast<to=9>(i)  k = Neg(s)  scores = Where(j, k, s) }"""
    weights = {"W": np.ascontiguousarray(CENTRES.T), "b": (np.square(CENTRES).sum(1) / 2).astype(np.float32)}
    return model(text, zero=np.array([0]), marks=marks, **weights)


def dataset(labels=LABELS):
    return Dataset([{"x": row} for row in POINTS], labels, "points")


def test_seeded_inputs(runtime):
    result = validate(classifier(), classifier(), runtime=runtime)
    assert result.within_tolerance
    assert result.interface == []
    assert result.metric is None
    assert result.quality == {}
    assert result.inputs == ["sample 1: x 2x8", "sample 2: x 1x8"]
    other = validate(classifier(), classifier(CENTRES.T * 1.01), runtime=runtime)
    assert not other.within_tolerance
    assert other.message().startswith("output 'scores': max|d| / max|y| = ")
    assert validate(classifier(), classifier(CENTRES.T * 1.01), tolerance=0.1, runtime=runtime).within_tolerance


def test_a_runtime_of_its_own():
    assert validate(classifier(), classifier()).within_tolerance


def test_accuracy_on_labelled_data(runtime):
    result = validate(classifier(), swapped(6), data=dataset(), metric="top1", runtime=runtime)
    assert result.metric.plain == (1.0, 0.9)
    assert result.metric.deployed == (1.0, 0.9)
    assert result.metric.labelled
    assert result.metric.samples == 60
    assert result.quality == {"top1, optimizations off": (1.0, 0.9), "top1, as deployed": (1.0, 0.9)}
    assert result.tolerance == METRIC_TOLERANCE
    assert not result.within_tolerance
    assert not result.comparison.equivalent
    assert result.message() == "top1 1 -> 0.9 on 60 samples, drop 0.1, allowed 0.005"
    assert result.inputs == ["60 samples of points"]


def test_the_metric_decides_when_there_is_one(runtime):
    result = validate(classifier(), swapped(6), data=dataset(), metric="top1", tolerance=0.11, runtime=runtime)
    assert result.within_tolerance
    assert not result.comparison.equivalent
    better = validate(swapped(6), classifier(), data=dataset(), metric="top1", runtime=runtime)
    assert better.metric.drop == pytest.approx(-0.1)
    assert better.within_tolerance


def test_without_labels_the_first_model_is_what_is_expected(runtime):
    data = dataset(None)
    result = validate(classifier(), swapped(6), data=data, metric="agreement", runtime=runtime)
    assert result.metric.plain == (1.0, 0.9)
    assert not result.metric.labelled
    scaled = classifier(CENTRES.T * 1.5)
    result = validate(classifier(), scaled, data=data, metric="mae", tolerance=0.01, runtime=runtime)
    assert result.metric.plain[0] == 0
    assert 0.1 < result.metric.drop < 2
    assert not result.within_tolerance


def test_psnr_without_labels_leaves_the_judgement_to_the_outputs(runtime):
    result = validate(classifier(), classifier(), data=dataset(None), metric="psnr", runtime=runtime)
    assert result.metric.plain == (math.inf, math.inf)
    assert result.within_tolerance
    other = validate(classifier(), swapped(6), data=dataset(None), metric="psnr", runtime=runtime)
    assert math.isnan(other.metric.drop)
    assert not other.within_tolerance


def test_as_dict_is_json(runtime):
    result = validate(classifier(), swapped(6), data=dataset(None), metric="psnr", runtime=runtime)
    found = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert found["within_tolerance"] is False
    assert found["metric"]["optimizations_off"][0] is None
    assert found["equivalence"]["outputs"][0]["name"] == "scores"


def test_data_of_a_file_with_a_fixed_batch(runtime, tmp_path):
    path = tmp_path / "points.npz"
    np.savez(path, x=POINTS, labels=LABELS)
    fixed = classifier(batch=4)
    result = validate(fixed, fixed, data=str(path), metric="top1", limit=20, runtime=runtime)
    assert result.metric.samples == 20
    assert result.metric.plain == (1.0, 1.0)
    assert [feed["x"].shape for feed in data_feeds(str(path), classifier(), limit=4)] == [(2, 8), (2, 8)]


def test_own_metric_and_output(runtime, tmp_path, monkeypatch):
    (tmp_path / "largest_metric.py").write_text("def largest(y_true, y_pred):\n    return float(y_pred.max())\n")
    monkeypatch.chdir(tmp_path)
    text = "g (float[N,8] x) => (float[N,8] y, float[N,8] z) { y = Neg(x)  z = Relu(x) }"
    arguments = {"data": dataset(), "metric": "largest_metric:largest", "runtime": runtime}
    result = validate(model(text), model(text), output="z", **arguments)
    assert result.metric.plain[0] == pytest.approx(POINTS.max())
    with pytest.raises(RecipeError, match="output 'w': the model has 'y', 'z'"):
        validate(model(text), model(text), output="w", **arguments)


def test_settings_that_do_not_go_together(runtime):
    with pytest.raises(RecipeError, match="metric top1 needs samples: give --data"):
        validate(classifier(), classifier(), metric="top1", runtime=runtime)
    with pytest.raises(DataError, match="top1 needs labels, and points has none"):
        validate(classifier(), classifier(), data=dataset(None), metric="top1", runtime=runtime)


def test_a_fixed_batch_is_compared_at_its_size(runtime):
    result = validate(classifier(), classifier(batch=3), runtime=runtime)
    assert result.within_tolerance
    assert result.interface == [
        "input 'x' is float[3, 8], expected float[N, 8]",
        "output 'scores' is float[3, 3], expected float[N, 3]",
    ]
    assert result.inputs[0] == "sample 1: x 3x8"


def test_an_input_that_went(runtime):
    before = model("g (float[N,8] x, float[N] unused) => (float[N,8] y) { y = Relu(x) }")
    result = validate(before, model("g (float[N,8] x) => (float[N,8] y) { y = Relu(x) }"), runtime=runtime)
    assert result.within_tolerance
    assert result.interface == ["input 'unused' is gone"]


def test_a_model_that_refuses_everything(runtime):
    broken = model("g (float[N,9] x) => (float[N,3] scores) { scores = MatMul(x, W) }", W=np.ones((9, 3), np.float32))
    result = validate(classifier(), broken, runtime=runtime)
    assert not result.within_tolerance
    assert result.message().startswith("the candidate does not run: ")


BASE = "g (float[N,8] x, int64[2] s) => (float[N,8] y, float[A,B] z) { y = Relu(x)  z = Reshape(x, s) }"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("x", "x"), []),
        (("[N,8] x", "[M,8] x"), ["input 'x' is float[M, 8], expected float[N, 8]"]),
        (("[N,8] x", "[2,8] x"), ["input 'x' is float[2, 8], expected float[N, 8]"]),
        (("[N,8] x", "[N,?] x"), ["input 'x' is float[N, ?], expected float[N, 8]"]),
        (("[N,8] x", "[N,8,1] x"), ["input 'x' is float[N, 8, 1], expected float[N, 8]"]),
        (("float[N,8] x", "double[N,8] x"), ["input 'x' is double[N, 8], expected float[N, 8]"]),
        (("[N,8] y", "[N,8] u"), ["output 'y' is gone", "output 'u' is new"]),
        (("[A,B] z", "[A,C] z"), ["output 'z' is float[A, C], expected float[A, B]"]),
    ],
)
def test_interface_differences(change, expected):
    before, after = (helper.make_model(onnx_graph(text)) for text in (BASE, BASE.replace(*change)))
    assert interface_differences(before, after) == expected


def onnx_graph(text):
    from onnx import parser

    return parser.parse_graph(text)


def test_the_order_counts():
    before, after = (helper.make_model(onnx_graph(BASE)) for _ in range(2))
    first = after.graph.output.pop(0)
    after.graph.output.append(first)
    assert interface_differences(before, after) == ["outputs are in another order: z, y, expected y, z"]


def test_no_shape_is_not_an_empty_one():
    before, after = (helper.make_model(onnx_graph(BASE)) for _ in range(2))
    after.graph.output[0].type.tensor_type.ClearField("shape")
    assert interface_differences(before, after) == ["output 'y' is float of any shape, expected float[N, 8]"]


def test_types_that_are_no_tensors():
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N"])
    kinds = [helper.make_sequence_type_proto(tensor), helper.make_optional_type_proto(tensor)]
    kinds.append(helper.make_map_type_proto(TensorProto.INT64, tensor))
    texts = []
    for kind in kinds:
        before, after = (helper.make_model(onnx_graph(BASE)) for _ in range(2))
        after.graph.input[0].type.CopyFrom(kind)
        texts += interface_differences(before, after)
        before.graph.input[0].type.CopyFrom(kind)
        assert interface_differences(before, after) == []
    assert [text.removeprefix("input 'x' is ").partition(", expected")[0] for text in texts] == [
        "sequence of float[N]",
        "optional of float[N]",
        "map of int64 to float[N]",
    ]


def with_default(ir_version, *, listed=True, weight=True):
    x, w, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xwy")
    constant = [numpy_helper.from_array(np.ones(4, np.float32), "w")]
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x, w] if listed else [x], [y], constant if weight else [])
    return helper.make_model(graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", 7)])


def test_defaults_are_part_of_the_interface():
    before = with_default(8)
    assert interface_differences(before, with_default(8)) == []
    assert interface_differences(before, with_default(8, weight=False)) == ["input 'w' has no default any more"]
    assert interface_differences(with_default(8, weight=False), before) == ["input 'w' has a default now"]
    assert interface_differences(before, with_default(8, listed=False)) == [
        "input 'w' is gone",
        "input 'w' has no default any more",
    ]


def test_before_ir_4_a_listed_initializer_is_no_input():
    assert interface_differences(with_default(3), with_default(3, listed=False)) == []


def test_weights_listed_as_inputs_are_passed_over_when_told():
    before = with_default(8, listed=False)
    skeleton = with_default(8, weight=False)
    assert interface_differences(before, skeleton) == ["input 'w' is new"]
    assert interface_differences(before, skeleton, initializers=False) == []


def test_integers_in_front_are_not_what_a_metric_is_taken_of(runtime, tmp_path):
    """Ids that a model hands through agree whatever the weights."""
    text = "g (float[N,4] x) => (int64[N,1] ids, float[N,3] y) { ids = ArgMax<axis=1>(x)  y = MatMul(x, w) }"
    weights = [np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32) for seed in range(2)]
    first, second = (model(text, w=values) for values in weights)
    x = np.random.default_rng(2).normal(size=(64, 4)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    found = validate(first, second, data=str(tmp_path / "d.npz"), metric="agreement", runtime=runtime)
    assert found.metric is not None and found.metric.name == "agreement"
    same = float(np.mean((x @ weights[0]).argmax(1) == (x @ weights[1]).argmax(1)))
    assert found.quality["agreement, optimizations off"][1] == pytest.approx(same) and same < 0.9
    ids = validate(first, second, data=str(tmp_path / "d.npz"), metric="agreement", output="ids", runtime=runtime)
    assert ids.quality["agreement, optimizations off"][1] == 1
