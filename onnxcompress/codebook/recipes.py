"""The constants and nodes that make a weight out of its stored form, before they are part of a graph.

    W/indices  -> Cast int32 ----------------\\
    W/codebook -> Cast float32 [-> Mul] -> Gather [-> Mul W/scales] [-> Reshape] [-> Transpose] [-> Reshape] -> W
    W/order    -> Cast int32 [-> Add] -> Gather(Reshape(the above), axis of the input channels) [-> Transpose ...] -> W
    W/int8     -> Cast float32 -> Mul W/scales -> W
    W/float16  -> Cast float32 -> W

Indices into up to 16 codewords take 4 bits: UINT4 from opset 21 on; before it two to a byte, those of the first half of
the outputs high, taken apart by Div, Mul, Sub and Concat. Inner tensors have short names: each is in the file twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from onnxcompress.codebook.codebook import QuantizedLayer
from onnxcompress.codebook.narrow import Float16Layer, Int8Layer
from onnxcompress.codebook.views import View

MIN_OPSET = 7  # Mul broadcasts, Cast knows its types by number
UINT4_OPSET, UINT4_IR = 21, 10
# Two indices in a byte cost four more nodes, of about this many bytes.
PACKING_BYTES = 250
SIXTEEN = "16"
MAX_NAME = 24  # a longer name of a weight stands in its file often enough without its constants


@dataclass(frozen=True)
class Step:
    """A node to be."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attrs: dict[str, Any]


@dataclass
class Recipe:
    """Constants by name, nodes in order, and what they make: ``weights`` has a name for each of ``views``.

    Attributes:
        name: What the names of its constants begin with.
        views: What the operators read.
        dtype: Element type that the operators read.
        opset: The model's opset.
        ir_version: The model's IR version.
        depthwise: It is the weight of a depthwise convolution, whose shared codebooks are for such alone.
        fresh: Makes a name unique.
    """

    name: str
    views: Sequence[View]
    dtype: np.dtype
    opset: int
    ir_version: int
    depthwise: bool = False
    fresh: Callable[[str], str] = str
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    shared: dict[str, np.ndarray] = field(default_factory=dict)  # with other layers
    steps: list[Step] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)

    def codebook(self, quantized: QuantizedLayer) -> Recipe:
        """Fill in the form of a codebook."""
        codewords = self._cast(self._codebook("codebook", quantized, quantized.codebook), TensorProto.FLOAT)
        if quantized.codebook_scale is not None:
            factors = self._codebook("codebook_scale", quantized, quantized.codebook_scale)
            codewords = self._step("Mul", codewords, factors)
        decoded = self._step("Gather", codewords, self._indices(quantized.indices, quantized.choice.codewords))
        outputs, blocks = quantized.indices.shape
        if quantized.scales is not None:
            factors = self.stored("scales", quantized.scales.reshape(-1, 1, 1))
            decoded = self._step("Mul", decoded, self._cast(factors, TensorProto.FLOAT))
        self._finish(decoded, (outputs, blocks, quantized.codebook.shape[1]), order=quantized.order)
        return self

    def int8(self, quantized: Int8Layer) -> Recipe:
        """Fill in the form of int8 numbers with a factor per output."""
        values, scales = quantized.values, quantized.scales[:, None]
        if len(self.views) == 1:
            spread = self.views[0].from_matrix(np.broadcast_to(scales, values.shape))
            for axis in range(spread.ndim):  # one factor per output: constant along the other axes
                first = spread.take([0], axis)
                spread = first if np.array_equal(np.broadcast_to(first, spread.shape), spread) else spread
            if spread.size <= scales.size:  # but not in the groups of a ConvTranspose
                values, scales = self.views[0].from_matrix(values), spread
        wide = self._cast(self.stored("int8", values), TensorProto.FLOAT)
        self._finish(self._step("Mul", wide, self.stored("scales", scales)), values.shape)
        return self

    def float16(self, quantized: Float16Layer) -> Recipe:
        """Fill in the form of float16 numbers."""
        values = quantized.values if len(self.views) > 1 else self.views[0].from_matrix(quantized.values)
        stored = self.stored("float16", values)
        self._finish(stored, values.shape, TensorProto.FLOAT16)
        return self

    def _codebook(self, suffix: str, quantized: QuantizedLayer, array: np.ndarray) -> str:
        """Add a codebook or its factors, which may be those of other layers as well; returns its name."""
        if not quantized.choice.shared:
            return self.stored(suffix, array)
        name = f"{suffix}_{quantized.choice.block}x{quantized.choice.codewords}{'_kernels' if self.depthwise else ''}"
        self.shared[name] = array
        return name

    def stored(self, suffix: str, array: np.ndarray) -> str:
        """Add a constant; returns its name."""
        name = self.fresh(f"{self.name}/{suffix}")
        self.constants[name] = array
        return name

    def overhead_bytes(self) -> int:
        """Bytes of the nodes, of the constants' headers and of what layers share; without the layer's own data."""
        nodes = [
            helper.make_node(step.op, list(step.inputs), [step.output], **step.attrs).ByteSize() for step in self.steps
        ]
        heads = [_tensor_bytes(name, array) - _data_bytes(array) for name, array in self.constants.items()]
        heads += [_tensor_bytes(name, array) for name, array in self.shared.items()]
        return int(sum(1 + _varint_bytes(size) + size for size in nodes) + sum(heads))

    # -- steps -------------------------------------------------------------------------------------------------------

    def _step(self, op: str, *inputs: str, **attrs: Any) -> str:
        output = self.fresh(f"q{len(self.steps)}")
        self.steps.append(Step(op, inputs, output, attrs))
        return output

    def _cast(self, tensor: str, elem_type: int) -> str:
        return self._step("Cast", tensor, to=int(elem_type))

    def _indices(self, indices: np.ndarray, codewords: int) -> str:
        if codewords <= 16 and self.opset >= UINT4_OPSET and self.ir_version >= UINT4_IR:
            return self._cast(self.stored("indices", indices.astype(ml_dtypes.uint4)), TensorProto.INT32)
        axis = next((axis for axis, size in enumerate(indices.shape) if size % 2 == 0), None)
        if codewords > 16 or axis is None or indices.size // 2 < PACKING_BYTES:
            return self._cast(self.stored("indices", indices), TensorProto.INT32)
        high, low = np.split(indices, 2, axis=axis)
        both = self._cast(self.stored("indices", (high * 16 + low).astype(np.uint8)), TensorProto.INT32)
        self.shared[SIXTEEN] = np.array(16, np.int32)
        first = self._step("Div", both, SIXTEEN)
        second = self._step("Sub", both, self._step("Mul", first, SIXTEEN))
        return self._step("Concat", first, second, axis=axis)

    def _finish(
        self,
        tensor: str,
        shape: Sequence[int],
        elem_type: int = TensorProto.FLOAT,
        order: np.ndarray | None = None,
    ) -> None:
        """Bring the decoded numbers into the form of every view."""
        made = helper.np_dtype_to_tensor_dtype(self.dtype)
        if made != elem_type:
            tensor = self._cast(tensor, made)
        if order is not None:
            tensor, shape = self._in_order(tensor, shape, order)
        for view in self.views:
            self.weights.append(self._shaped(tensor, tuple(shape), view))

    def _in_order(self, tensor: str, shape: Sequence[int], order: np.ndarray) -> tuple[str, tuple[int, ...]]:
        """Put the input channels in their own order; returns the tensor and its shape."""
        view = self.views[0]
        axis = view.channel_axis
        target = view.unfolded
        places = self._cast(self.stored("order", order), TensorProto.INT32)
        if order.ndim == 2:  # the runs, each counted from 0
            runs, reach = order.shape
            name = f"{runs}x{reach}_starts"
            self.shared[name] = np.arange(0, order.size, reach, dtype=np.int32)[:, None]
            places = self._step("Add", places, name)
        tensor = self._reshaped(tensor, tuple(shape), target)
        tensor = self._step("Gather", tensor, places, axis=axis)
        return tensor, (*target[:axis], *order.shape, *target[axis + 1 :])

    def _shaped(self, tensor: str, shape: tuple[int, ...], view: View) -> str:
        if shape != view.shape or len(self.views) > 1:
            moves = [] if view.perm is None else [axis for axis in view.perm if view.unfolded[axis] > 1]
            if moves != sorted(moves):
                tensor = self._reshaped(tensor, shape, view.unfolded)
                tensor = self._step("Transpose", tensor, perm=list(view.perm or ()))
                shape = tuple(view.unfolded[axis] for axis in view.perm or ())
            tensor = self._reshaped(tensor, shape, view.shape)
        return tensor

    def _reshaped(self, tensor: str, shape: tuple[int, ...], target: tuple[int, ...]) -> str:
        if shape == target:
            return tensor
        name = "x".join(map(str, target))
        self.shared[name] = np.array(target, np.int64)
        return self._step("Reshape", tensor, name)


def _data_bytes(array: np.ndarray) -> int:
    return (array.size + 1) // 2 if array.dtype == ml_dtypes.uint4 else array.nbytes


def _varint_bytes(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))


def _tensor_bytes(name: str, array: np.ndarray) -> int:
    """Bytes of an initializer in the file."""
    head = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    data = _data_bytes(array)
    size = head.ByteSize() + 1 + _varint_bytes(data) + data
    return int(1 + _varint_bytes(size) + size)
