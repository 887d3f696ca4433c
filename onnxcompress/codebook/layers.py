"""The weights of a graph that a codebook can hold: which they are, who reads them and as what matrix.

A layer is one stored weight, however many nodes read it: quantized once, with the statistics of all its readers. What
cannot be quantized is listed with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onnxcompress.codebook.readers import CANDIDATES, QUANTIZED_OPERATORS, Use, read_uses
from onnxcompress.codebook.recipes import MIN_OPSET
from onnxcompress.codebook.views import FLOATS, static_nodes
from onnxcompress.cost import node_macs
from onnxcompress.graph import STANDARD_DOMAINS, Graph, Node, Tensor, is_op
from onnxcompress.patterns.decoded_weights import find_codebooks, narrow_weights, unpacked_weights
from onnxcompress.shapes import infer_shapes


@dataclass(frozen=True)
class Refusal:
    """A weight that stays as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight that a codebook can hold.

    Attributes:
        name: Name of the stored tensor.
        uses: The nodes that read it, in execution order; at least one.
        outputs: Rows of the matrix, of all groups together.
        length: D, numbers in a row.
        groups: Groups of a convolution, or directions of a recurrence; each has outputs / groups rows and its own D.
        stored_bytes: Bytes of the weight in the file.
        macs: Multiply-accumulates of all its readers.
        depthwise: A kernel for each channel, and nothing relates its numbers to other inputs.
        in_body: Whether a reader stands in the body of an If, Loop or Scan, where no statistics are taken.
    """

    name: str
    uses: tuple[Use, ...]
    outputs: int
    length: int
    groups: int
    stored_bytes: int
    macs: int
    depthwise: bool = False
    in_body: bool = False

    @property
    def kind(self) -> str:
        """The operator of its first reader; "LSTM W" and "LSTM R" for the two weights of a recurrence."""
        return self.uses[0].kind

    @property
    def kernel(self) -> int:
        """Numbers of a row that belong to one input channel."""
        window = self.uses[0].rows.window
        return 1 if window is None else math.prod(window.kernel)

    @property
    def is_permutable(self) -> bool:
        """Whether its input channels can be stored in another order: of tables, rows are decoded one by one."""
        return self.kernel < self.length and all(use.kind != "Gather" for use in self.uses)

    @property
    def nodes(self) -> list[Node]:
        return [use.node for use in self.uses]

    @property
    def has_bias(self) -> bool:
        """Whether a bias can be written: there is one already, or a place where it costs nothing to speak of."""
        return self.uses[0].bias is not None and len(self.uses) == 1

    def matrix(self) -> np.ndarray:
        """(outputs, D) float32; read from the file each time."""
        use = self.uses[0]
        return np.ascontiguousarray(use.view.to_matrix(use.origin.values()).astype(np.float32))

    def bias(self) -> np.ndarray | None:
        """(outputs,) float32; None where there is none yet or none can be written."""
        bias = self.uses[0].bias
        return bias.values() if bias is not None and self.has_bias else None


def find_layers(graph: Graph) -> tuple[list[Layer], list[Refusal]]:
    """Every weight of a graph and of the graphs nested in it, in the order of its first reader.

    Args:
        graph: The outermost graph; types and shapes of its tensors are set.

    Returns:
        The layers, and what looked like one and is refused.
    """
    infer_shapes(graph)
    static = static_nodes(graph)
    decoded = decoded_already(graph)
    refusals: dict[str, Refusal] = {}
    uses: dict[Tensor, list[Use]] = {}
    for inner in graph.walk():
        for node in inner.nodes:
            if node.op in QUANTIZED_OPERATORS:
                name = node.inputs[QUANTIZED_OPERATORS[node.op]].name
                refusals[name] = Refusal(name, f"it is quantized already ({node.op})")
            if node.op not in CANDIDATES or node.domain not in STANDARD_DOMAINS or node in static:
                continue
            for found in read_uses(inner, node, static, decoded):
                if isinstance(found, Use):
                    uses.setdefault(found.origin.root, []).append(found)
                else:
                    refusals[found[0]] = Refusal(*found)
    layers = []
    for root, readers in uses.items():
        reason = refusals[root.name].reason if root.name in refusals else why_not_layer(graph, root, readers)
        if reason is None:
            layers.append(_layer(graph, root, readers))
        else:
            refusals[root.name] = Refusal(root.name, reason)
    return layers, list(refusals.values())


def decoded_already(graph: Graph) -> dict[Tensor, str]:
    """Weights that nodes decode from a codebook or from int8, and the reason why they are no layers."""
    decoded = {}
    for weight in find_codebooks(graph):  # of a table, what its rows are gathered from as well
        tables = [node.inputs[0] for node in weight.nodes if is_op(node, "Gather")]
        decoded.update(dict.fromkeys([weight.weight, *tables], "it is a codebook already"))
    for tensor in narrow_weights(graph, "int8"):
        decoded.setdefault(tensor, "it is quantized already (int8)")
    for tensor in unpacked_weights(graph):
        decoded.setdefault(tensor, "it is a codebook already")
    return decoded


def _layer(graph: Graph, root: Tensor, uses: list[Use]) -> Layer:
    first = uses[0]
    length, groups = first.view.length, first.groups
    depthwise = groups > 1 and first.kind in ("Conv", "ConvTranspose") and length == math.prod(first.view.shape[2:])
    return Layer(
        name=root.name,
        uses=tuple(uses),
        outputs=first.view.outputs,
        length=length,
        groups=groups,
        stored_bytes=first.origin.stored_bytes,
        macs=sum(_macs(use) for use in uses),
        depthwise=depthwise,
        in_body=any(use.node.graph is not graph for use in uses),
    )


def _macs(use: Use) -> int:
    if use.kind == "Gather":
        return 0
    macs, _ = node_macs(use.node)
    if is_op(use.node, "LSTM", "GRU", "RNN"):
        own, both = math.prod(use.view.shape), sum(math.prod(tensor.shape) for tensor in _recurrent(use.node))
        return int(macs * own // max(both, 1))
    return macs


def _recurrent(node: Node) -> list[Tensor]:
    return [tensor for tensor in node.inputs[1:3] if tensor.shape is not None]


def why_not_layer(graph: Graph, root: Tensor, uses: list[Use]) -> str | None:
    """The reason why a weight that these nodes read stays as it is, or None."""
    outer = [inner for inner in graph.walk() if any(use.node.graph is inner for use in uses)]
    chain = {root, *(tensor for use in uses for node in use.origin.nodes for tensor in node.outputs)}
    for tensor in chain:
        if graph.is_output(tensor) or any(inner.is_output(tensor) for inner in outer):
            return "it is a graph output as well"
    stray = _stray_reader(chain, uses)
    if stray is not None:
        return f"{stray.op} {stray.name!r} reads it too, and would keep the original in the file"
    if graph.opset < MIN_OPSET:
        return f"opset {graph.opset} cannot decode a weight, {MIN_OPSET} is needed"
    values = uses[0].origin.values()
    if values.dtype.name not in FLOATS:
        return f"it is {values.dtype.name}, not {' or '.join(FLOATS)}"
    if not values.size:
        return "it is empty"
    if not np.isfinite(values).all():
        return f"{int(values.size - np.isfinite(values).sum())} of {values.size} weights are NaN or infinite"
    matrix = None
    for use in uses[1:]:
        matrix = uses[0].view.to_matrix(values) if matrix is None else matrix
        if use.groups != uses[0].groups or not np.array_equal(use.view.to_matrix(use.origin.values()), matrix):
            return f"{uses[0].node.name!r} and {use.node.name!r} read it as different matrices"
    return None


def _stray_reader(chain: Iterable[Tensor], uses: list[Use]) -> Node | None:
    """A node that reads the weight and is none of its readers."""
    weights = {(use.node, use.slot) for use in uses}
    moves = {node for use in uses for node in use.origin.nodes}
    for tensor in chain:
        for reader in tensor.outputs:
            slots = [slot for slot, given in enumerate(reader.inputs) if given is tensor]
            if reader not in moves and not all((reader, slot) in weights for slot in slots):
                stray: Node = reader
                return stray
    return None
