"""A pruned graph held against the same graph with these channels at zero, on onnxruntime.

They are compared before a final Softmax or Sigmoid, which rounds small numbers to steps as large as themselves: where
it makes 4e-7 of everything, an error of 2e-7 before it is one of 0.3 behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcompress.codebook.damage import SATURATING
from onnxcompress.graph import Graph, is_op
from onnxcompress.model_io import StagedFile, load
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.shapes import infer_shapes
from onnxcompress.validation.comparison import Comparison
from onnxcompress.validation.equivalence import Reference, for_runtime


def compare_with_zeroed(
    pruned: onnx.ModelProto,
    zeroed: onnx.ModelProto,
    feeds: Sequence[Mapping[str, Any]],
    runtime: Runtime,
    folder: Path,
    *,
    tolerance: float,
    options: RunOptions,
) -> Comparison:
    """Run both graphs.

    Args:
        pruned: Without the channels.
        zeroed: With them at zero.
        feeds: Inputs.
        runtime: Where they run.
        folder: For the files, ``pruned-taps.onnx`` and ``zeroed-taps.onnx``.
        tolerance: Largest max|d| / max|y|.
        options: How onnxruntime loads them.
    """
    graph = load(zeroed)
    infer_shapes(graph)
    names = _taps(graph)
    paths = []
    for proto, name in ((zeroed, "zeroed-taps.onnx"), (pruned, "pruned-taps.onnx")):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        if names:
            del copy.graph.output[:]
            kept = {value.name: value for value in proto.graph.output}
            for tap in names:
                value = kept.get(tap) or onnx.helper.make_tensor_value_info(tap, onnx.TensorProto.FLOAT, None)
                copy.graph.output.append(value)
        with StagedFile(load(copy), folder / name) as staged:
            staged.commit()
        paths.append(folder / name)
    reference = Reference(for_runtime(paths[0]), feeds, runtime, options=options)
    return reference.compare(for_runtime(paths[1]), tolerance=tolerance, options=options)


def _taps(graph: Graph) -> list[str]:
    """The float tensors that the outputs are made of, saturation undone; none where an output is of another type."""
    names: list[str] = []
    for output in graph.outputs:
        tensor = output
        while tensor.inputs and is_op(tensor.inputs[0], *SATURATING) and tensor.inputs[0].inputs[0].inputs:
            tensor = tensor.inputs[0].inputs[0]
        if tensor.dtype != np.float32:
            return []
        names.append(tensor.name)
    return list(dict.fromkeys(names))
