"""What the values of a model's inputs must satisfy, learned from the nodes that read them.

An int64 input may be a token, a shape or a trip count; the type does not tell. So every input is followed forward
through the nodes that keep its values (Cast, Reshape, Slice, Add of a constant, into subgraphs and local functions) up
to the nodes that restrict them, such as Gather, Reshape and Loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from onnx import ModelProto, NodeProto

from onnxcompress.samples.scopes import Dim, Dims, Model, Scope, attribute

MAX_STEPS = 20_000  # Uses visited per input: a bound for models that call the same function thousands of times.
MAX_FLOWS = 4  # Ways to one value: a loop may add 1 in every round.
KNOWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")

T = TypeVar("T")


def _each(words: str, value: T) -> dict[str, T]:
    return dict.fromkeys(words.split(), value)


# Operators whose outputs hold the values of these inputs, moved or chosen among; None: of all inputs.
_KEEPS: dict[str, tuple[int, ...] | None] = {
    **_each("Cast CastLike Identity Reshape Unsqueeze Squeeze Flatten Transpose Slice Gather", (0,)),
    **_each("GatherElements GatherND Expand Tile Split Pad Compress ReduceMax ReduceMin Trilu", (0,)),
    **_each("Optional OptionalGetElement ReverseSequence", (0,)),
    **_each("ScatterElements ScatterND Scatter", (0, 2)),
    **_each("Concat Max Min SequenceConstruct", None),
    "Where": (1, 2),
}
_PARTIAL = _each("Concat Split Slice Gather Max Min Where SequenceConstruct", True)  # not the whole vector in order
_COMPARES = _each("Equal Less Greater LessOrEqual GreaterOrEqual", True)

# "operator.input": the axis of input 0 that an index runs over, by attribute name or number.
_INDEX_OF: dict[str, str | int] = {
    **_each("Gather.1 GatherElements.1 ScatterElements.1 Scatter.1", "axis"),
    **_each("SoftmaxCrossEntropyLoss.1 NegativeLogLikelihoodLoss.1", 1),
    "GatherBlockQuantized.1": "gather_axis",
    "ArrayFeatureExtractor.1": -1,
    "RoiAlign.2": 0,
}
# The input that holds the table an index runs over, along its first axis.
_TABLE_OF = {
    "EmbedLayerNormalization.0": 2,
    "EmbedLayerNormalization.1": 4,
    "EmbedLayerNormalization.8": 3,
    "RotaryEmbedding.3": 1,
    "com.microsoft.RotaryEmbedding.1": 2,
}
_POSITIONS = {"GatherND.1", "ScatterND.1"}
# The input and the axis of it that a length may fill.
_LENGTH_OF: dict[str, tuple[int, str | int]] = {
    **_each("LSTM.4 GRU.4 RNN.4", (0, 0)),
    "ReverseSequence.1": (0, "time_axis"),
    "TopK.1": (0, "axis"),
    "Attention.6": (1, -2),  # nonpad_kv_seqlen
}
_KINDS = {
    use: kind
    for kind, uses in {
        "target-shape": "Reshape.1",
        "broadcast-shape": "Expand.1",
        "repeats": "Tile.1",
        "split": "Split.1 SplitToSequence.1",
        "starts": "Slice.1",
        "ends": "Slice.2",
        "axes": "Slice.3 Pad.3 Unsqueeze.1 Squeeze.1",
        "steps": "Slice.4",
        "pads": "Pad.1",
        "scales": "Resize.2 Upsample.1",
        "sizes": "Resize.3 AffineGrid.1",
        "flag": "If.0 Loop.1",
        "count": "Loop.0 ConstantOfShape.0 OneHot.1 NonMaxSuppression.2 CenterCropPad.1 STFT.1 BitShift.1",
        "start": "Range.0",
        "limit": "Range.1",
        "step": "Range.2",
        "window": "HannWindow.0 HammingWindow.0 BlackmanWindow.0 DFT.1 STFT.3",
        "axis": "CumSum.1 Trilu.1 DFT.2 SequenceAt.1",
        "divisor": "Div.1 Mod.1",
        "ratio": "Dropout.1 NonMaxSuppression.3 NonMaxSuppression.4 Bernoulli.0",
        "inference": "Dropout.2",
    }.items()
    for use in uses.split()
}
_VECTORS = _each("target-shape broadcast-shape repeats split starts ends axes steps pads scales sizes", True)


@dataclass(frozen=True)
class Bound:
    """An index: 0 <= scale * x + low, scale * x + high < limit. The limit is a size, a dimension's name, or unknown."""

    limit: Dim
    scale: int = 1
    low: int = 0
    high: int = 0

    def interval(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """The smallest and the largest x, with unknown limits read as 2."""
        limit = self.limit if isinstance(self.limit, int) else sizes.get(self.limit or "", 2)
        return -(self.low // self.scale), (limit - 1 - self.high) // self.scale


@dataclass
class Role:
    """How one input is used.

    Attributes:
        kind: "number" unless a node gives the values another meaning ("index", "count", "target-shape", ...).
        bounds: The indices that are made of this input.
        lengths: Dimensions that the value may fill, at least 1.
        specials: Numbers that it is compared with.
        data: Shape of the tensor that a shape-like input works on; ``result`` of what comes out, ``axis`` the node's.
        opaque: A node of an unknown domain reads it, so its meaning is a guess.
    """

    kind: str = "number"
    bounds: list[Bound] = field(default_factory=list)
    lengths: list[Dim] = field(default_factory=list)
    specials: list[float] = field(default_factory=list)
    data: Dims | None = None
    result: Dims | None = None
    axis: int = 0
    opaque: bool = False

    def interval(self, sizes: Mapping[str, int]) -> tuple[int, int] | None:
        """The range that satisfies every bound under ``sizes``; None when nothing bounds the input."""
        if not self.bounds:
            return None
        pairs = [bound.interval(sizes) for bound in self.bounds]
        low, high = max(low for low, _ in pairs), min(high for _, high in pairs)
        return low, max(low, high)


@dataclass(frozen=True)
class _Flow:
    """Values scale * x + [low, high] of an input x; ``whole`` while every element of it is still there in order."""

    scale: int = 1
    low: int = 0
    high: int = 0
    whole: bool = True

    def shifted(self, low: int, high: int) -> _Flow:
        return _Flow(self.scale, self.low + low, self.high + high, self.whole)

    def times(self, factor: int) -> _Flow:
        return _Flow(self.scale * factor, self.low * factor, self.high * factor, self.whole)

    def part(self) -> _Flow:
        return _Flow(self.scale, self.low, self.high, False)


def input_roles(model: ModelProto, names: Iterable[str]) -> dict[str, Role]:
    """Follow each named graph input to the nodes that restrict its values."""
    root = Scope(Model(model), model.graph)
    return {name: _Tracer(root, name).role for name in names}


class _Tracer:
    """Follows one input breadth first; a value reached in several ways, as by i and i + 1, is followed in each."""

    def __init__(self, root: Scope, name: str) -> None:
        self.role = Role()
        self.seen: dict[tuple[int, str], set[_Flow]] = {}
        self.queue: list[tuple[Scope, str, _Flow]] = []
        self._push(root, name, _Flow())
        steps = 0
        while self.queue and steps < MAX_STEPS:
            scope, current, flow = self.queue.pop(0)
            for node, index, inner in scope.uses.get(current, ()):
                steps += 1
                self._visit(inner, node, index, flow)
            self._leave(scope, current, flow)

    def _push(self, scope: Scope, name: str, flow: _Flow) -> None:
        flows = self.seen.setdefault((id(scope), name), set())
        if name and flow not in flows and len(flows) < MAX_FLOWS:
            flows.add(flow)
            self.queue.append((scope, name, flow))

    def _leave(self, scope: Scope, name: str, flow: _Flow) -> None:
        """An output of a body is an output of the node that owns it."""
        if scope.owner is None:
            return
        node, outer = scope.owner
        shift = 1 if node.op_type == "Loop" else 0
        for index in (i - shift for i, output in enumerate(scope.outputs) if output == name):
            if 0 <= index < len(node.output):
                self._push(outer, node.output[index], flow)

    def _visit(self, scope: Scope, node: NodeProto, index: int, flow: _Flow) -> None:
        function = scope.model.functions.get((node.domain, node.op_type))
        if function is not None:
            inner = scope.call(node, function)
            if index < len(inner.inputs):
                self._push(inner, inner.inputs[index], flow)
            return
        for body in scope.bodies.get(id(node), ()):
            if index < len(body.inputs):  # Loop and Scan; the branches of If have no inputs
                self._push(body, body.inputs[index], flow)
        key = _key(node, index)
        if node.domain not in KNOWN_DOMAINS:
            self.role.opaque = True
        elif key in _INDEX_OF or key in _TABLE_OF or key in _POSITIONS:
            self._bounded(_limit(scope, node, index), flow)
        elif key == "OneHot.0":
            depth = scope.constant(node.input[1])
            self._bounded(int(depth.reshape(-1)[0]) if depth is not None and depth.size else None, flow)
        elif key in _LENGTH_OF:
            self.role.kind = "length"
            source, axis = _LENGTH_OF[key]
            self.role.lengths.append(_axis_dim(scope, node, axis, -1 if node.op_type == "TopK" else 0, source))
        elif key in _KINDS or (index == 1 and node.op_type.startswith("Reduce")):
            self._named(_KINDS.get(key, "axes"), scope, node, flow)
        else:
            self._onward(scope, node, index, flow)

    def _bounded(self, limit: Dim, flow: _Flow) -> None:
        self.role.kind = "index" if self.role.kind == "number" else self.role.kind
        self.role.bounds.append(Bound(limit, flow.scale, flow.low, flow.high))

    def _named(self, kind: str, scope: Scope, node: NodeProto, flow: _Flow) -> None:
        if self.role.kind != "number":
            return
        if kind in _VECTORS and not flow.whole:
            kind = "count"  # an element of a shape that is put together from several values
        self.role.kind = kind
        self.role.axis = attribute(node, "axis", 0)
        self.role.data = scope.dims(node.input[0]) if node.input else None
        self.role.result = scope.dims(node.output[0]) if node.output else None

    def _onward(self, scope: Scope, node: NodeProto, index: int, flow: _Flow) -> None:
        op = node.op_type
        if op in _COMPARES:
            other = scope.constant(node.input[1 - index])
            if other is not None and 0 < other.size <= 16 and other.dtype.kind in "iuf":
                values = (np.unique(other).astype(float) - flow.low) / flow.scale
                self.role.specials.extend(float(value) for value in values)
        elif op in ("Add", "Sub", "Mul") and len(node.input) == 2:
            other = scope.constant(node.input[1 - index])
            moved = None if other is None or not other.size else _arithmetic(op, index, other, flow)
            if moved is not None:
                self._push(scope, node.output[0], moved)
        elif op in _KEEPS:
            kept = _KEEPS[op]
            if kept is None or index in kept:
                for name in node.output:
                    self._push(scope, name, flow.part() if op in _PARTIAL else flow)


def _arithmetic(op: str, index: int, other: np.ndarray, flow: _Flow) -> _Flow | None:
    """What Add, Sub or Mul with a constant does to the values, where it keeps their order."""
    if not np.all(np.isfinite(other.astype(np.float64))):
        return None
    low, high = float(other.min()), float(other.max())
    if op == "Mul":
        return flow.times(int(low)) if low == high and low >= 1 and low.is_integer() else None
    if op == "Sub" and index == 1:
        return None
    sign = -1 if op == "Sub" else 1
    first, last = sorted((sign * low, sign * high))
    return flow.shifted(int(np.floor(first)), int(np.ceil(last)))


def _axis_dim(scope: Scope, node: NodeProto, axis: str | int, default: int = 0, source: int = 0) -> Dim:
    dims = scope.dims(node.input[source])
    number = attribute(node, axis, default) if isinstance(axis, str) else axis
    return dims[number] if dims is not None and -len(dims) <= number < len(dims) else None


def _key(node: NodeProto, index: int) -> str:
    # The one operator whose inputs are in another order in onnxruntime's domain.
    moved = node.op_type == "RotaryEmbedding" and node.domain == "com.microsoft"
    return f"com.microsoft.RotaryEmbedding.{index}" if moved else f"{node.op_type}.{index}"


def _limit(scope: Scope, node: NodeProto, index: int) -> Dim:
    """How many entries an index operand can choose from; None when that is not known."""
    key = _key(node, index)
    if key in _TABLE_OF:
        table = node.input[_TABLE_OF[key]] if len(node.input) > _TABLE_OF[key] else ""
        dims = scope.dims(table) if table else None
        return dims[0] if dims else None
    if key in _INDEX_OF:
        return _axis_dim(scope, node, _INDEX_OF[key])
    dims = scope.dims(node.input[0])  # GatherND, ScatterND: a row of indices is a position
    picked = scope.dims(node.input[1])
    if dims is None:
        return None
    batch = attribute(node, "batch_dims", 0)
    width = picked[-1] if picked and isinstance(picked[-1], int) else len(dims) - batch
    sizes = [dim for dim in dims[batch : batch + width] if isinstance(dim, int)]
    return min(sizes) if len(sizes) == width else min([2, *sizes])
