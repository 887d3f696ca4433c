"""What an operator costs: multiply-accumulates, weight bytes, and time, estimated or measured.

A merge pass describes what stands there and what would stand there as ``OperatorSpec`` lists and asks a ``CostModel``
whether the change pays. ``MacsAndBytes`` estimates; ``Measured`` times the candidates on onnxruntime on this machine.
MACs alone rank wrongly: a 5x5 convolution has 1.39 times the MACs of two 3x3 and takes 1.3 to 3.4 times as long.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx
from onnx import helper

from onnxcompress.graph import Graph, Node, is_constant, is_op, static_shape

if TYPE_CHECKING:
    from onnxcompress.runtime import Runtime

logger = logging.getLogger(__name__)

NOMINAL_SIZE = 32  # stands for an unknown spatial size or row count; an unknown batch counts as 1


@dataclass(frozen=True)
class OperatorSpec:
    """One operator by shapes alone.

    Args:
        op: Conv, ConvTranspose, MatMul, Gemm, AveragePool, GlobalAveragePool, Concat, Split (with the sizes as an
            attribute ``split``) or an elementwise operator, whose first input is ``input_shape``.
        input_shape: Shape of the first input.
        weight_shapes: Shapes of the constant inputs.
        attrs: Attributes as (name, value) pairs, lists as tuples.
        dtype: Element type, NumPy's name.
        live_shapes: Shapes of further inputs that are not constant.
        stored_bytes: Bytes of the constant inputs in the file, where that is less than their shapes say.
    """

    op: str
    input_shape: tuple[int, ...]
    weight_shapes: tuple[tuple[int, ...], ...] = ()
    attrs: tuple[tuple[str, int | float | tuple[int, ...]], ...] = ()
    dtype: str = "float32"
    live_shapes: tuple[tuple[int, ...], ...] = ()
    stored_bytes: int | None = None

    @property
    def weight_bytes(self) -> int:
        return self.loaded_bytes if self.stored_bytes is None else self.stored_bytes

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the constant inputs in memory."""
        return sum(math.prod(shape) for shape in self.weight_shapes) * np.dtype(self.dtype).itemsize

    @property
    def output_shape(self) -> tuple[int, ...]:
        attrs: dict[str, Any] = dict(self.attrs)
        shape = self.input_shape
        if self.op == "Conv":
            weight = self.weight_shapes[0]
            return (shape[0], weight[0], *_conv_output(shape[2:], weight[2:], attrs))
        if self.op == "ConvTranspose":
            weight, group = self.weight_shapes[0], int(attrs.get("group", 1))
            return (shape[0], weight[1] * group, *_transpose_output(shape[2:], weight[2:], attrs))
        if self.op in ("MatMul", "Gemm"):
            return (*shape[:-1], self.weight_shapes[0][0 if attrs.get("transB", 0) else -1])
        if self.op == "AveragePool":
            return (*shape[:2], *_conv_output(shape[2:], attrs["kernel_shape"], attrs))
        if self.op == "GlobalAveragePool":
            return (*shape[:2], *[1] * (len(shape) - 2))
        if self.op == "Concat":
            axis = int(attrs["axis"])
            return (*shape[:axis], sum(s[axis] for s in (shape, *self.live_shapes)), *shape[axis + 1 :])
        if self.op == "Split":
            return shape  # of all outputs together
        return tuple(np.broadcast_shapes(self.input_shape, *self.weight_shapes, *self.live_shapes))

    @property
    def macs(self) -> int:
        if self.op == "Conv":
            return math.prod(self.output_shape) * math.prod(self.weight_shapes[0][1:])
        if self.op == "ConvTranspose":
            return math.prod(self.input_shape) * math.prod(self.weight_shapes[0][1:])
        if self.op in ("MatMul", "Gemm"):
            return math.prod(self.output_shape) * self.input_shape[-1]
        return 0


def _transpose_output(size: Sequence[int], kernel: Sequence[int], attrs: dict[str, Any]) -> list[int]:
    rank = len(kernel)

    def ints(name: str, default: int, count: int = rank) -> list[int]:
        return list(attrs.get(name) or [default] * count)

    strides, dilations, extra = ints("strides", 1), ints("dilations", 1), ints("output_padding", 0)
    pads = ints("pads", 0, 2 * rank)
    return [
        max(strides[i] * (size[i] - 1) + extra[i] + dilations[i] * (kernel[i] - 1) + 1 - pads[i] - pads[i + rank], 1)
        for i in range(rank)
    ]


def _conv_output(size: Sequence[int], kernel: Sequence[int], attrs: dict[str, Any]) -> list[int]:
    rank = len(kernel)

    def ints(name: str, default: list[int]) -> list[int]:
        return list(attrs.get(name) or default)

    strides, dilations, pads = ints("strides", [1] * rank), ints("dilations", [1] * rank), ints("pads", [0] * 2 * rank)
    return [
        max((size[i] + pads[i] + pads[i + rank] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1, 1)
        for i in range(rank)
    ]


@dataclass(frozen=True)
class Price:
    """Time in milliseconds and weight bytes of a list of operators."""

    latency_ms: float
    weight_bytes: int


class CostModel(Protocol):
    """Prices operators; see ``why_not_pay`` for the decision."""

    def price(self, specs: Sequence[OperatorSpec]) -> Price:
        """The price of running these one after the other."""
        ...


# A change must gain this much of the time; less is within what the estimate or the clock can tell.
REQUIRED_GAIN = 0.03
GROWTH_ALLOWANCE_BYTES = 4096


def why_not_pay(
    cost: CostModel,
    before: Sequence[OperatorSpec],
    after: Sequence[OperatorSpec],
    *,
    growth_bytes: int = GROWTH_ALLOWANCE_BYTES,
) -> str | None:
    """The reason why ``after`` is no better than ``before``, or None when it is."""
    old, new = cost.price(before), cost.price(after)
    if new.weight_bytes > old.weight_bytes + growth_bytes:
        return f"weights would grow from {old.weight_bytes} to {new.weight_bytes} bytes"
    if new.latency_ms > old.latency_ms * (1 - REQUIRED_GAIN):
        return f"it would not be faster: {old.latency_ms:.4f} -> {new.latency_ms:.4f} ms"
    return None


@dataclass(frozen=True)
class MacsAndBytes:
    """An estimate from MACs and bytes moved: a roofline with a fixed cost per operator.

    The rates are those of one core of a present server CPU with onnxruntime 1.31; only their ratios matter.
    """

    dense_macs_per_ms: float = 2.5e7
    depthwise_macs_per_ms: float = 4e6
    bytes_per_ms: float = 1e7
    overhead_ms: float = 0.004
    channel_block: int = 8

    def price(self, specs: Sequence[OperatorSpec]) -> Price:
        return Price(sum(self._latency(spec) for spec in specs), sum(spec.weight_bytes for spec in specs))

    def _latency(self, spec: OperatorSpec) -> float:
        size = np.dtype(spec.dtype).itemsize
        live = [spec.input_shape, *spec.live_shapes, spec.output_shape]
        moved = sum(math.prod(shape) for shape in live) * size + spec.loaded_bytes
        rate = self.dense_macs_per_ms
        if spec.op == "Conv":
            weight, group = spec.weight_shapes[0], int(dict(spec.attrs).get("group", 1))  # type: ignore[arg-type]
            if group > 1:
                # Channels per group decide how well the matrix kernels are used: 1 is depthwise, 16 and more are dense.
                fill = min(weight[1] / 16, 1.0)
                rate = self.depthwise_macs_per_ms * (1 - fill) + self.dense_macs_per_ms * fill
            else:
                if max(weight[2:], default=1) > 3:
                    rate *= 0.8
                # Output channels are computed in blocks of 8 (AVX2) or 16 (AVX-512): fewer take as long.
                rate *= weight[0] / (-(-weight[0] // self.channel_block) * self.channel_block)
        if spec.op == "Split":
            # Convolutions keep channels in blocks, and a Split first has them laid out plainly. Measured inside a net,
            # 1x1 -> Relu -> 1x1 at 7x7 to 28x28, the Split form is 0.78 to 1.05 times as fast as separate convolutions.
            moved *= 2
        return max(spec.macs / rate, moved / self.bytes_per_ms) + self.overhead_ms


class Measured:
    """Times candidates on onnxruntime on this machine, and remembers.

    Args:
        runtime: Child process that runs them.
        cache: JSON file of earlier measurements; ``$XDG_CACHE_HOME/onnxcompress/latency.json`` by default.
        threads: Intra-op threads, 0 for onnxruntime's own choice.
    """

    def __init__(self, runtime: Runtime, cache: Path | None = None, threads: int = 0) -> None:
        self.runtime = runtime
        self.threads = threads
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache = cache or home / "onnxcompress" / "latency.json"
        self.known = self._read()

    def price(self, specs: Sequence[OperatorSpec]) -> Price:
        key = self._key(specs)
        if key not in self.known:
            self.known[key] = self._measure(specs)
            self._write()
        return Price(self.known[key], sum(spec.weight_bytes for spec in specs))

    def _key(self, specs: Sequence[OperatorSpec]) -> str:
        import onnxruntime

        text = f"{onnxruntime.__version__} {os.cpu_count()} {self.threads} {_cpu_name()} {list(specs)}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _measure(self, specs: Sequence[OperatorSpec]) -> float:
        from onnxcompress.runtime import RunOptions

        model, feeds = candidate_model(specs)
        options = RunOptions(optimization="all", threads=self.threads)
        (runs,) = self.runtime.latency([model.SerializeToString()], feeds, options=options, budget_s=0.25)
        return float(np.median(runs))

    def _read(self) -> dict[str, float]:
        try:
            return {str(k): float(v) for k, v in json.loads(self.cache.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}  # no cache, or a damaged one: measured anew

    def _write(self) -> None:
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.cache.parent)
            with os.fdopen(handle, "w") as out:
                json.dump(self.known, out)
            os.replace(name, self.cache)
        except OSError as error:
            logger.info("latency cache %s cannot be written: %s", self.cache, error.strerror)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    import platform

    return platform.processor() or platform.machine()


def candidate_model(specs: Sequence[OperatorSpec]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A runnable model of the operators, each fed by the one before where shapes agree, and its inputs."""
    rng = np.random.default_rng(0)
    nodes, inputs, feeds, weights = [], [], {}, []
    previous: tuple[str, tuple[int, ...]] | None = None
    unread: dict[str, OperatorSpec] = {}

    def live(name: str, shape: tuple[int, ...], dtype: str) -> str:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        inputs.append(helper.make_tensor_value_info(name, kind, shape))
        feeds[name] = rng.normal(size=shape).astype(dtype)
        return name

    for i, spec in enumerate(specs):
        if previous is not None and previous[1] == spec.input_shape:
            first = previous[0]
            unread.pop(first, None)
        else:
            first = live(f"x{i}", spec.input_shape, spec.dtype)
        names = [first]
        for j, shape in enumerate(spec.live_shapes):
            names.append(live(f"x{i}_{j}", shape, spec.dtype))
        for j, shape in enumerate(spec.weight_shapes):
            values = (rng.normal(size=shape) * 0.05).astype(spec.dtype)
            weights.append(onnx.numpy_helper.from_array(values, f"w{i}_{j}"))
            names.append(f"w{i}_{j}")
        attrs: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in spec.attrs}
        made = [f"y{i}"]
        if spec.op == "Split":
            sizes = np.array(attrs.pop("split"), np.int64)
            weights.append(onnx.numpy_helper.from_array(sizes, f"s{i}"))
            names.append(f"s{i}")
            made = [f"y{i}_{j}" for j in range(len(sizes))]
        nodes.append(helper.make_node(spec.op, names, made, **attrs))
        unread |= dict.fromkeys(made, spec)
        # The first of several outputs has another shape, so that nothing is fed by it.
        previous = (made[0], spec.output_shape if len(made) == 1 else ())
    kinds = {name: helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)) for name, spec in unread.items()}
    outputs = [helper.make_tensor_value_info(name, kinds[name], None) for name in unread]
    graph = helper.make_graph(nodes, "candidate", inputs, outputs, weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), feeds


# -- counting a graph ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphCount:
    """MACs and parameters of a graph; unknown sizes count as the nominal ones, and ``exact`` is then False."""

    macs: int
    parameters: int
    exact: bool
    by_operator: dict[str, int] = field(default_factory=dict)


def known_shape(node_input: object) -> tuple[tuple[int, ...] | None, bool]:
    """A shape with unknown axes replaced (axis 0 by 1, others by the nominal size), and whether it was exact."""
    shape = getattr(node_input, "shape", None)
    if shape is None:
        return None, False
    exact = all(isinstance(dim, (int, np.integer)) for i, dim in enumerate(shape) if i > 0)
    sized = tuple(
        int(dim) if isinstance(dim, (int, np.integer)) else (1 if i == 0 else NOMINAL_SIZE)
        for i, dim in enumerate(shape)
    )
    return sized, exact


def node_macs(node: Node) -> tuple[int, bool]:
    """Multiply-accumulates of one node at batch 1 where the batch is dynamic, and whether the count is exact."""
    if is_op(node, "Conv", "ConvInteger", "QLinearConv"):
        weight = node.inputs[3 if node.op == "QLinearConv" else 1]
        out, exact = known_shape(node.outputs[0])
        kernel, _ = known_shape(weight)
        if kernel is None or out is None:
            return 0, False
        return math.prod(out) * math.prod(kernel[1:]), exact
    if is_op(node, "ConvTranspose"):
        source, exact = known_shape(node.inputs[0])
        weight_shape = static_shape(node.inputs[1])
        if source is None or weight_shape is None:
            return 0, False
        return math.prod(source) * math.prod(weight_shape[1:]), exact
    if is_op(node, "MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"):
        left, exact_left = known_shape(node.inputs[0])
        out, exact_out = known_shape(node.outputs[0])
        if not left or out is None:
            return 0, False
        inner = left[0] if node.op == "Gemm" and node.attrs.get("transA", 0) else left[-1]
        return math.prod(out) * inner, exact_left and exact_out
    if is_op(node, "Resize", "Upsample") and node.attrs.get("mode") in ("linear", "cubic"):
        source, exact_source = known_shape(node.inputs[0])
        out, exact_out = known_shape(node.outputs[0])
        if source is None or out is None:
            return 0, False
        near = 2 if node.attrs["mode"] == "linear" else 4  # neighbours along each axis that is resized
        resized = sum(a != b for a, b in zip(source, out, strict=True))
        return math.prod(out) * near**resized if resized else 0, exact_source and exact_out
    if is_op(node, "LSTM", "GRU", "RNN"):
        source, exact = known_shape(node.inputs[0])
        w, r = static_shape(node.inputs[1]), static_shape(node.inputs[2])
        if source is None or w is None or r is None:
            return 0, False
        steps = source[1] if node.attrs.get("layout", 0) else source[0]
        batch = source[0] if node.attrs.get("layout", 0) else source[1]
        return steps * batch * (math.prod(w) + math.prod(r)), exact
    return 0, True


def count(graph: Graph) -> GraphCount:
    """MACs and parameters of a graph and all graphs nested in it (a Loop body counts once)."""
    macs, exact = 0, True
    by_operator: dict[str, int] = {}
    constants: dict[int, int] = {}
    for inner in graph.walk():
        for node in inner.nodes:
            by_operator[node.op] = by_operator.get(node.op, 0) + 1
            found, sure = node_macs(node)
            macs += found
            exact = exact and sure
            for tensor in node.inputs:
                if is_constant(tensor) and tensor.dtype != object:
                    elements = math.prod(tensor.shape)
                    # Few integers are sizes and axes; many are a quantized weight or a table.
                    if np.dtype(tensor.dtype).kind not in "iub" or elements > 64:
                        constants[id(tensor)] = elements
            if is_op(node, "Constant") and "value" in node.attrs:
                constants[id(node)] = math.prod(node.attrs["value"].shape)
    return GraphCount(macs, sum(constants.values()), exact, dict(sorted(by_operator.items(), key=lambda kv: -kv[1])))
