"""What the builder of an operator is told about the node, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from onnxcompress.errors import ModelError

# Gets the node's inputs, None for one that is left out; gives its output, or all of its outputs in order.
Function = Callable[..., Tensor | Sequence[Tensor | None]]

_FLOATS: set[int] = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_TYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.INT4: torch.int8,
    onnx.TensorProto.UINT4: torch.uint8,
}


@dataclass
class Mode:
    """Switches shared by all operators of a twin; they may change between two runs.

    Args:
        batch_statistics: BatchNormalization uses the batch's statistics and updates the running ones.
        synchronize: Batch statistics are taken over all processes of the default process group.
    """

    batch_statistics: bool = False
    synchronize: bool = False


@dataclass(frozen=True)
class Call:
    """A node, as its builder sees it once, before anything runs.

    Args:
        op: Operator type.
        name: Of the node, or of its first output where it has none; for messages.
        attributes: Values as the graph holds them: numbers, strings, lists, arrays for tensors.
        opset: Version of the node's operator set.
        inputs: For each input, whether it is given.
        outputs: For each output, whether it is read by anyone (an unread one may be returned as None).
        constants: By input position, values that no training and no edit changes.
        float_type: What FLOAT, FLOAT16 and BFLOAT16 are computed in: half types are rounded only on writing back.
        mode: The twin's switches.
    """

    op: str
    name: str
    attributes: Mapping[str, Any]
    opset: int
    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]
    constants: Mapping[int, Tensor] = field(default_factory=dict)
    float_type: torch.dtype = torch.float32
    mode: Mode = field(default_factory=Mode)

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def has(self, position: int) -> bool:
        """Whether the input at ``position`` is given."""
        return position < len(self.inputs) and self.inputs[position]

    def integers(self, position: int) -> list[int] | None:
        """The input at ``position`` as integers, where it is constant."""
        found = self.constants.get(position)
        return None if found is None else integers(found)

    def torch_type(self, data_type: int | np.dtype | type) -> torch.dtype:
        """The torch type for a TensorProto.DataType or a NumPy type.

        Raises:
            ModelError: torch has none for it.
        """
        return torch_type(data_type, self.float_type, f"{self.op} {self.name!r}")

    def refuse(self, what: str) -> ModelError:
        """The error for a form of the operator that the twin does not compute."""
        return ModelError(f"{self.op} {self.name!r}: {what} cannot be trained through")


# Reads a node once, gives what computes it.
Builder = Callable[[Call], Function]


def torch_type(data_type: int | np.dtype | type, float_type: torch.dtype, what: str) -> torch.dtype:
    """The torch type for a TensorProto.DataType or a NumPy type; half and single precision become ``float_type``.

    Raises:
        ModelError: torch has none for it.
    """
    if not isinstance(data_type, int):
        data_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(data_type))
    if data_type in _FLOATS:
        return float_type
    if data_type not in _TYPES:
        raise ModelError(f"{what}: torch has no type for {onnx.TensorProto.DataType.Name(data_type)}")
    return _TYPES[data_type]


def integers(tensor: Tensor) -> list[int]:
    """The elements of an integer tensor, as Python numbers."""
    values: list[int] = tensor.reshape(-1).tolist()
    return values
