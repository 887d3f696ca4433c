"""Tools to test passes, ours and foreign ones: a model from text, one pass on it, and its meaning compared.

before = model("g (float[1,4] x) => (float[1,4] y) { y = Identity(x) }")
after, result = apply(EliminateIdentity(), before)
assert ops(after) == []
assert_equivalent(before, after)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from onnxcompress.graph import Graph
from onnxcompress.model_io import load, to_proto
from onnxcompress.rewrite import PassResult, RewritePass
from onnxcompress.shapes import infer_shapes

DEFAULT_OPSET = 17


def model(text: str, *, opset: int = DEFAULT_OPSET, ir_version: int = 8, **weights: np.ndarray) -> ModelProto:
    """A model from ONNX text.

    Args:
        text: A graph in the syntax of ``onnx.parser``: ``name (inputs) => (outputs) { nodes }``; a full model with its
            header ``<ir_version: ..., opset_import: [...]>`` is taken as it is.
        opset: Version of the standard domain.
        ir_version: IR version.
        weights: Initializers by name.
    """
    if text.lstrip().startswith("<"):
        proto = parser.parse_model(text)
    else:
        graph = parser.parse_graph(text)
        proto = helper.make_model(graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", opset)])
    for name, values in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
    onnx.checker.check_model(proto)
    return proto


def apply(rewrite_pass: RewritePass[Any], before: ModelProto) -> tuple[ModelProto, PassResult]:
    """Run one pass on a copy of ``before``; the result has passed the checker."""
    copy = ModelProto()
    copy.CopyFrom(before)
    graph = load(copy)
    infer_shapes(graph)
    result = rewrite_pass.apply(graph)
    after = to_proto(graph)
    onnx.checker.check_model(after)
    return after, result


def graph_of(proto: ModelProto) -> Graph:
    """A graph with shapes inferred, as a pass sees it."""
    graph = load(proto)
    infer_shapes(graph)
    return graph


def ops(proto: ModelProto) -> list[str]:
    """Operator types of the outermost graph in order."""
    return [node.op_type for node in proto.graph.node]


def inputs_for(proto: ModelProto, *, seed: int = 0, sizes: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """Seeded inputs: signed, with ties, zeros and negatives; ``sizes`` sets symbolic dimensions (2 by default)."""
    rng = np.random.default_rng(seed)
    initializers = {t.name for t in proto.graph.initializer}
    feeds: dict[str, np.ndarray] = {}
    for value in proto.graph.input:
        if value.name in initializers:
            continue
        kind = value.type.tensor_type
        shape = [
            dim.dim_value if dim.HasField("dim_value") else (sizes or {}).get(dim.dim_param, 2)
            for dim in kind.shape.dim
        ]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        values: Any = rng.normal(size=shape)
        if kind.elem_type == TensorProto.BOOL:
            values = values > 0
        elif np.issubdtype(dtype, np.integer):
            values = rng.integers(0, 3, size=shape)
        else:
            values = np.where(rng.random(shape) < 0.2, np.round(values), values)
        feeds[value.name] = np.asarray(values).astype(dtype)
    return feeds


def run(proto: ModelProto, feeds: Mapping[str, np.ndarray]) -> list[Any]:
    """Outputs from onnxruntime without its own optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, dict(feeds))
    return outputs


def relative_error(reference: np.ndarray, actual: np.ndarray) -> float:
    """max|d| / max|reference|; 0.0 when bitwise equal, NaN positions must agree."""
    if reference.shape != actual.shape or reference.dtype != actual.dtype:
        return float("inf")
    if reference.tobytes() == actual.tobytes():
        return 0.0
    if reference.dtype == object or reference.dtype.kind in "biu":
        return float("inf") if np.any(reference != actual) else 0.0
    a, b = reference.astype(np.float64), actual.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    difference = np.abs(a - b)[finite].max(initial=0.0)
    scale = np.abs(a)[finite].max(initial=0.0)
    return float(difference / scale) if scale > 0 else float(difference)


def assert_equivalent(
    before: ModelProto,
    after: ModelProto,
    *,
    rel: float | None = None,
    feeds: Sequence[Mapping[str, np.ndarray]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> float:
    """Run both models and compare every output.

    Args:
        before: The original.
        after: The rewritten model; its interface must be the same.
        rel: Allowed max|d| / max|y| per output; bitwise equality when None.
        feeds: Inputs; two seeded sets by default.
        sizes: Sizes of symbolic dimensions for the default inputs.

    Returns:
        The largest relative error seen.
    """
    assert list(before.graph.input) == list(after.graph.input), "inputs changed"
    assert list(before.graph.output) == list(after.graph.output), "outputs changed"
    worst = 0.0
    for sample in feeds or [inputs_for(before, seed=seed, sizes=sizes) for seed in (0, 1)]:
        expected, actual = run(before, sample), run(after, sample)
        for value, a, b in zip(before.graph.output, expected, actual, strict=True):
            if not isinstance(a, np.ndarray):
                assert repr(a) == repr(b), f"output {value.name!r} differs"
                continue
            assert (a.shape, a.dtype) == (b.shape, b.dtype), f"output {value.name!r}: {a.shape} became {b.shape}"
            if rel is None:
                assert np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"), (
                    f"output {value.name!r} is not bitwise equal"
                )
                continue
            error = relative_error(a, b)
            worst = max(worst, error)
            assert error <= rel, f"output {value.name!r}: max|d| / max|y| = {error:.1e}, allowed {rel:.0e}"
    return worst
