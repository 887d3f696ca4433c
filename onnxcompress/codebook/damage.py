"""How much a network's outputs suffer when one layer is quantized: measured by running it.

Output probabilities say little once they are near 0 or 1, and two classes say little about features. So the error is
taken before a final Softmax or Sigmoid, and at the input of the layer that makes the output as well. At each of these
places it is relative and squared,  sum |y - y'|^2 / sum |y - mean y|^2;  the damage is their mean. For small errors it
is proportional to the squared error of the layer's own output, which is what ``offers.py`` estimates for every form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.codebook.layers import Layer
from onnxcompress.codebook.segments import Network, Replacements, prune
from onnxcompress.graph import Graph, Node, Tensor, is_constant, is_op
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.validation.equivalence import run_model

# Between an output and the numbers that count.
SATURATING = ("Softmax", "LogSoftmax", "Sigmoid", "Tanh", "HardSigmoid", "Clip")
MOVING = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast")
CHOOSING = ("ArgMax", "TopK")
LAYERS = ("Gemm", "MatMul", "Conv", "ConvTranspose")
MAX_DAMAGE = 4.0  # an error twice as large as the output: more says nothing more


def find_taps(graph: Graph) -> list[str]:
    """Names of the tensors to measure at: behind each output, the last one that is not saturated, and the features."""
    taps: list[str] = []
    for output in graph.outputs:
        tensor = _unsaturated(output)
        if not _is_float(tensor):
            continue
        taps.append(tensor.name)
        features = _features(tensor)
        if features is not None and _is_float(features):
            taps.append(features.name)
    inputs = {tensor.name for tensor in graph.inputs}
    return [name for name in dict.fromkeys(taps) if name and name not in inputs]


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype is None or np.dtype(tensor.dtype).kind == "f"


def _unsaturated(tensor: Tensor) -> Tensor:
    while tensor.inputs and is_op(tensor.inputs[0], *SATURATING, *MOVING, *CHOOSING):
        before = tensor.inputs[0].inputs[0]
        if is_constant(before) or not before.inputs:
            break
        tensor = before
    return tensor


def _features(tensor: Tensor) -> Tensor | None:
    """What the layer that makes a tensor reads."""
    node: Node | None = tensor.inputs[0] if tensor.inputs else None
    if is_op(node, "Add") and node is not None:
        makers = [value.inputs[0] for value in node.inputs if not is_constant(value) and value.inputs]
        node = makers[0] if len(makers) == 1 else None
    if node is None or not is_op(node, *LAYERS):
        return None
    data = [value for value in node.inputs[:2] if not is_constant(value)]
    return data[0] if data and data[0].inputs else None


class DamageMeter:
    """Runs the network with one layer changed.

    Args:
        graph: The outermost graph.
        layers: Its layers.
        feeds: A few samples that no fit uses.
        runtime: Where it runs.
        custom_ops: Shared library with custom operators.
    """

    def __init__(
        self,
        graph: Graph,
        layers: Sequence[Layer],
        feeds: Sequence[Mapping[str, Any]],
        runtime: Runtime,
        custom_ops: Path | None = None,
    ) -> None:
        self._feeds, self._runtime = feeds, runtime
        self._options = RunOptions("off", custom_ops=custom_ops)
        self._network = Network(graph, layers, list(feeds[0]))
        made = {name for operation in self._network.operations for name in operation.writes}
        self.taps = [name for name in find_taps(graph) if name in made]
        self._operations = prune(self._network.operations, self.taps)
        self._expected = self._run(None) if self.taps else []

    def measure(self, layer: Layer, decoded: np.ndarray, bias: np.ndarray | None) -> float:
        """The damage of another weight (outputs, D) and bias in a layer that is in no body."""
        if not self.taps:
            return 0.0
        replacements = Replacements()
        replacements.replace(layer, decoded, bias)
        return relative_damage(self._expected, self._run(replacements))

    def _run(self, replacements: Replacements | None) -> list[list[Any]]:
        model = self._network.model(self._operations, self._feeds[0], self.taps, replacements)
        return run_model(self._runtime, model, self._feeds, self._options)


def relative_damage(references: Sequence[Sequence[Any]], others: Sequence[Sequence[Any]]) -> float:
    """Mean over the tensors of the relative squared error, at most ``MAX_DAMAGE`` each.

    Args:
        references: A list of tensors for each feed.
        others: The same of the other model.
    """
    found = []
    for index in range(len(references[0])):
        pairs = [(np.asarray(a[index]), np.asarray(b[index])) for a, b in zip(references, others, strict=True)]
        found.append(min(squared_error(pairs), MAX_DAMAGE))
    return float(np.mean(found)) if found else 0.0


def squared_error(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """sum |y - y'|^2 / sum |y - mean y|^2 over the batches of one tensor; the mean is each element's over the samples.

    Where nothing varies between samples, or sizes differ between batches, the mean is that of all numbers.
    """
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    wide = [(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs if a.size]
    if not wide:
        return 0.0
    lost = sum(float(((a - b) ** 2).sum()) for a, b in wide)
    if not np.isfinite(lost):
        return float("inf")
    spread = 0.0
    if all(a.ndim and a.shape[1:] == wide[0][0].shape[1:] for a, _ in wide):
        samples = np.concatenate([a for a, _ in wide])
        spread = float(((samples - samples.mean(axis=0)) ** 2).sum())
    if spread <= 0:
        count = sum(a.size for a, _ in wide)
        mean = sum(float(a.sum()) for a, _ in wide) / count
        spread = sum(float(((a - mean) ** 2).sum()) for a, _ in wide) or sum(float((a**2).sum()) for a, _ in wide)
    return lost / spread if spread > 0 else (0.0 if lost == 0 else float("inf"))
