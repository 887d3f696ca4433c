"""How much a network's outputs suffer when one layer is quantized: measured by running it.

Output probabilities say little once they are near 0 or 1, and two classes say little about features. So the error is
taken before a final Softmax or Sigmoid, and at the input of the layer that makes the output as well. At each of these
places it is relative and squared,  sum |y - y'|^2 / sum |y - mean y|^2,  the mean that over the samples, or for what a
Softmax reads that over the classes, which it does not notice. The damage is the mean over these places. For small
errors it is proportional to the squared error of the layer's own output, which ``offers.py`` estimates for every form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.codebook.layers import Layer
from onnxcompress.codebook.segments import Network, Replacements, prune
from onnxcompress.graph import Graph, Node, Tensor, is_constant, is_op, rank
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.validation.equivalence import run_model

# Between an output and the numbers that count.
SATURATING = ("Softmax", "LogSoftmax", "Sigmoid", "Tanh", "HardSigmoid", "Clip")
MOVING = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast")
CHOOSING = ("ArgMax", "TopK")
LAYERS = ("Gemm", "MatMul", "Conv", "ConvTranspose")
MAX_DAMAGE = 4.0  # an error twice as large as the output: more says nothing more


@dataclass(frozen=True)
class Tap:
    """A tensor to measure at.

    Attributes:
        name: The tensor.
        classes: A Softmax over the last axis reads it.
    """

    name: str
    classes: bool = False


def find_taps(graph: Graph) -> list[Tap]:
    """Where to measure: behind each output, the last tensor that is not saturated, and the features it is made of."""
    taps: dict[str, Tap] = {}
    for output in graph.outputs:
        tensor, classes = _unsaturated(output)
        if not _is_float(tensor):
            continue
        taps.setdefault(tensor.name, Tap(tensor.name, classes))
        features = _features(tensor)
        if features is not None and _is_float(features):
            taps.setdefault(features.name, Tap(features.name))
    inputs = {tensor.name for tensor in graph.inputs}
    return [tap for name, tap in taps.items() if name and name not in inputs]


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype is None or np.dtype(tensor.dtype).kind == "f"


def _unsaturated(tensor: Tensor) -> tuple[Tensor, bool]:
    """Where an output's numbers come from, and whether the last thing done to them was a Softmax over the last axis."""
    classes = False
    while tensor.inputs and is_op(tensor.inputs[0], *SATURATING, *MOVING, *CHOOSING):
        node: Node = tensor.inputs[0]
        before = node.inputs[0]
        if is_constant(before) or not before.inputs:
            break
        if is_op(node, "Softmax", "LogSoftmax"):
            axes = rank(before)
            axis = int(node.attrs.get("axis", -1 if node.graph is None or node.graph.opset >= 13 else 1))
            classes = axis == -1 or (axes is not None and axis == axes - 1)
        elif not is_op(node, "Identity", "Cast", *CHOOSING):
            classes = False
        tensor = before
    return tensor, classes


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
    """Runs the network with some layers changed.

    Args:
        graph: The outermost graph.
        layers: Its layers.
        feeds: Samples that no fit uses.
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
        self.taps = [tap for tap in find_taps(graph) if tap.name in made]
        self._names = [tap.name for tap in self.taps]
        self._operations = prune(self._network.operations, self._names)
        self._expected = self._run(None) if self.taps else []

    def measure(self, changes: Iterable[tuple[Layer, np.ndarray, np.ndarray | None]]) -> float:
        """The damage of other weights (outputs, D) and biases; of layers that stand in a body nothing is measured."""
        if not self.taps:
            return 0.0
        replacements = Replacements()
        for layer, decoded, bias in changes:
            if not layer.in_body:
                replacements.replace(layer, decoded, bias)
        return relative_damage(self.taps, self._expected, self._run(replacements))

    def _run(self, replacements: Replacements | None) -> list[list[Any]]:
        model = self._network.model(self._operations, self._feeds[0], self._names, replacements)
        return run_model(self._runtime, model, self._feeds, self._options)


def relative_damage(taps: Sequence[Tap], references: Sequence[Sequence[Any]], others: Sequence[Sequence[Any]]) -> float:
    """Mean over the taps of the relative squared error, at most ``MAX_DAMAGE`` each.

    Args:
        taps: What the tensors are.
        references: A tensor of each tap, for each feed.
        others: The same of the other model.
    """
    found = []
    for index, tap in enumerate(taps):
        pairs = [(np.asarray(a[index]), np.asarray(b[index])) for a, b in zip(references, others, strict=True)]
        found.append(min(_class_error(pairs) if tap.classes else squared_error(pairs), MAX_DAMAGE))
    return float(np.mean(found)) if found else 0.0


def _class_error(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """The same of scores of classes, with the mean of each row taken off."""
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    lost = spread = 0.0
    for a, b in pairs:
        scores, others = (x.astype(np.float64) for x in (a, b))
        errors = scores - others
        lost += float(((errors - errors.mean(axis=-1, keepdims=True)) ** 2).sum())
        spread += float(((scores - scores.mean(axis=-1, keepdims=True)) ** 2).sum())
    return lost / spread if spread > 0 and np.isfinite(lost) else (0.0 if lost == 0 else float("inf"))


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
