"""The node tests shipped inside the onnx package go through every pass unchanged in meaning.

Each model runs as it is, and again with all inputs but the first turned into initializers, so that folding and fusing
find something to do. The expected outputs are those that onnx ships.
"""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcompress import pipeline
from onnxcompress.errors import RuntimeFailure
from onnxcompress.model_io import load, to_proto
from onnxcompress.rewrite import Settings
from onnxcompress.runtime import Runtime
from onnxcompress.validation.randomness import random_outputs

# A quarter of the models runs by default, all of them with `-m slow`.
SHARDS = [*range(2), *(pytest.param(number, marks=pytest.mark.slow) for number in range(2, 8))]


@pytest.fixture(scope="module")
def cases():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return collect_testcases(None)


@pytest.fixture(scope="module")
def runtime():
    with Runtime() as child:
        yield child


def with_constants(proto: ModelProto, inputs: list) -> tuple[ModelProto, list] | None:
    """The model with every tensor input but the first as an initializer, and the inputs that are left."""
    if len(inputs) < 2 or not all(isinstance(value, np.ndarray) for value in inputs[1:]):
        return None
    copy = ModelProto()
    copy.CopyFrom(proto)
    for value, array in zip(list(proto.graph.input)[1:], inputs[1:], strict=True):
        if not value.type.HasField("tensor_type"):
            return None
        tensor = numpy_helper.from_array(array, value.name)
        if tensor.data_type != value.type.tensor_type.elem_type:
            return None
        copy.graph.initializer.append(tensor)
    del copy.graph.input[1:]
    return copy, inputs[:1]


def evaluate(runtime: Runtime, proto: ModelProto, feeds: dict) -> list | None:
    """Outputs from onnxruntime; from the reference evaluator where onnxruntime does not know the model; or None."""
    try:
        return runtime.run(proto.SerializeToString(), [feeds])[0]
    except RuntimeFailure:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ReferenceEvaluator(proto).run(None, feeds)
    except Exception:  # the reference evaluator lacks operators as well, and fails in many ways
        return None


def assert_same(expected, actual, case, what):
    if isinstance(expected, list):
        assert len(expected) == len(actual), what
        for one, two in zip(expected, actual, strict=True):
            assert_same(one, two, case, what)
    elif isinstance(expected, np.ndarray):
        actual = np.asarray(actual)
        assert expected.shape == actual.shape and expected.dtype == actual.dtype, what
        if expected.dtype == object or expected.dtype.kind in "USb":
            assert np.array_equal(expected, actual), what
        else:
            a, b = expected.astype(np.complex128 if expected.dtype.kind == "c" else np.float64), actual
            np.testing.assert_allclose(np.asarray(b).astype(a.dtype), a, rtol=case.rtol, atol=case.atol, err_msg=what)
    else:
        assert expected == actual or expected is actual, what


@pytest.mark.parametrize("shard", SHARDS)
def test_node_models_keep_their_meaning(shard, cases, runtime):
    settings = Settings(evaluate=lambda model, feeds: runtime.run(model.SerializeToString(), [feeds])[0])
    selected = pipeline.select()
    compared = 0
    for case in cases[shard :: len(SHARDS)]:
        inputs = [
            numpy_helper.to_array(value) if isinstance(value, TensorProto) else value for value in case.data_sets[0][0]
        ]
        for form in ((case.model, inputs), with_constants(case.model, inputs)):
            if form is None:
                continue
            proto, values = form
            what = case.name + (" with constants" if proto is not case.model else "")
            names = [value.name for value in proto.graph.input]
            feeds = dict(zip(names, values, strict=False))
            before = None if random_outputs(proto) else evaluate(runtime, proto, feeds)
            graph = load(ModelProto.FromString(proto.SerializeToString()))
            pipeline.run(graph, selected, settings)
            after = to_proto(graph)
            assert list(after.graph.input) == list(proto.graph.input), what
            assert list(after.graph.output) == list(proto.graph.output), what
            try:
                onnx.checker.check_model(proto)
            except onnx.checker.ValidationError:
                continue
            onnx.checker.check_model(after)
            if before is None:
                continue  # nothing runs it, or it is random
            result = evaluate(runtime, after, feeds)
            assert result is not None, f"{what}: the result does not run"
            assert_same(before, result, case, what)
            compared += 1
    assert compared > 1.2 * len(cases[shard :: len(SHARDS)]), "most models are compared, many of them twice"
