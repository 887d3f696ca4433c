"""What ``runtime.Runtime`` and its child process say to each other: frames on a pipe, no pickle.

A frame, in both directions, is

    8 bytes   length of the header, little endian
    header    JSON; "sizes" lists the lengths of the buffers
    buffers   raw bytes: models, and tensors in row-major order, 4- and 2-bit elements packed low bits first

and a value in a header is a tensor {"type", "shape"} that takes the next buffer, a string tensor {"strings", "shape"},
a sequence {"sequence"}, a map {"map"}, a plain scalar inside one of these, or null: an optional without a value.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Buffers = list[bytes | memoryview]

# NumPy's name of a type, ml_dtypes' where NumPy has none: the number ONNX gives it (TensorProto.DataType).
ELEMENT_TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "uint16": 4,
    "int16": 5,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "uint32": 12,
    "uint64": 13,
    "complex64": 14,
    "complex128": 15,
    "bfloat16": 16,
    "float8_e4m3fn": 17,
    "float8_e4m3fnuz": 18,
    "float8_e5m2": 19,
    "float8_e5m2fnuz": 20,
    "uint4": 21,
    "int4": 22,
    "float4_e2m1fn": 23,
    "float8_e8m0fnu": 24,
    "uint2": 25,
    "int2": 26,
}
ELEMENT_NAMES = {number: name for name, number in ELEMENT_TYPES.items()}
ELEMENT_BITS = {21: 4, 22: 4, 23: 4, 25: 2, 26: 2}  # those that are packed
LAST_NUMPY_TYPE = 15


def send(stream: IO[bytes], header: Mapping[str, Any], buffers: Sequence[bytes | memoryview] = ()) -> None:
    """Write one frame."""
    text = json.dumps({**header, "sizes": [len(buffer) for buffer in buffers]}).encode()
    stream.write(len(text).to_bytes(8, "little") + text)
    for buffer in buffers:
        stream.write(buffer)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    """Read one frame.

    Raises:
        EOFError: The other side is gone.
    """
    header = json.loads(_read(stream, int.from_bytes(_read(stream, 8), "little")))
    return header, [_read(stream, size) for size in header.pop("sizes")]


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"the pipe ended after {len(data)} of {size} bytes")
    return data


def encode(value: Any, buffers: Buffers) -> Any:
    """Describe a value for a header and append its bytes to ``buffers``.

    Raises:
        TypeError: The value, or something in it, has no ONNX type.
    """
    if isinstance(value, (np.ndarray, np.generic)):
        return _encode_array(np.asarray(value), buffers)
    if isinstance(value, Mapping):
        return {"map": [[_encode_scalar(key), _encode_scalar(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"sequence": [encode(item, buffers) for item in value]}
    if value is None:
        return None
    if hasattr(value, "data_ptr"):  # an OrtValue with a tensor
        size = value.tensor_size_in_bytes()
        buffers.append(ctypes.string_at(value.data_ptr(), size) if size else b"")
        return {"type": value.element_type(), "shape": list(value.shape())}
    raise TypeError(f"a {type(value).__name__} is no ONNX value: pass an array, a list, a dict or None")


def _encode_scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _encode_array(array: Array, buffers: Buffers) -> dict[str, Any]:
    shape = list(array.shape)
    if array.dtype.kind in "OUS":
        return {"strings": [_text(item) for item in array.reshape(-1).tolist()], "shape": shape}
    number = ELEMENT_TYPES.get(array.dtype.name)
    if number is None:
        raise TypeError(f"an array of {array.dtype.name} has no ONNX type")
    if not array.dtype.isnative:  # onnxruntime reads the memory as it lies
        array = array.astype(array.dtype.newbyteorder("="))
    flat = array.reshape(-1).view(np.uint8)
    buffers.append(pack(flat, ELEMENT_BITS[number]) if number in ELEMENT_BITS else flat.data)
    return {"type": number, "shape": shape}


def _text(item: Any) -> str:
    if isinstance(item, bytes):
        return item.decode()
    if isinstance(item, str):
        return item
    raise TypeError(f"an array of objects holds strings here, not {type(item).__name__}")


def pack(elements: Array, bits: int) -> bytes:
    """Pack elements (n,) uint8, each in the low ``bits`` of its byte, low bits first; pad the last byte with 0."""
    each = 8 // bits
    padded = np.zeros(-(-elements.size // each) * each, np.uint8)
    padded[: elements.size] = elements & (2**bits - 1)
    shifts = np.arange(each, dtype=np.uint8) * bits
    packed: Array = np.bitwise_or.reduce(padded.reshape(-1, each) << shifts, axis=1)
    return packed.tobytes()


def unpack(data: bytes, bits: int, count: int) -> Array:
    """Undo ``pack``: (count,) uint8."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    spread: Array = np.frombuffer(data, np.uint8)[:, np.newaxis] >> shifts & (2**bits - 1)
    return spread.reshape(-1)[:count]


def decode(node: Any, buffers: list[bytes], tensor: Callable[[int, list[int], bytes], Any]) -> Any:
    """Undo ``encode``; ``tensor`` makes one from the number of its type, its shape and its bytes.

    Buffers are taken from the front of ``buffers``.
    """
    if not isinstance(node, dict):
        return node
    if "sequence" in node:
        return [decode(item, buffers, tensor) for item in node["sequence"]]
    if "map" in node:
        return dict(node["map"])
    if "strings" in node:
        strings = np.empty(len(node["strings"]), object)
        strings[:] = node["strings"]
        return strings.reshape(node["shape"])
    return tensor(node["type"], node["shape"], buffers.pop(0))


def array(number: int, shape: list[int], data: bytes) -> Array:
    """A tensor for ``decode``, of ml_dtypes' type where NumPy has none."""
    name = ELEMENT_NAMES[number]
    if number > LAST_NUMPY_TYPE:
        import ml_dtypes

        dtype = np.dtype(getattr(ml_dtypes, name))
    else:
        dtype = np.dtype(name)
    elements: Array
    if number in ELEMENT_BITS:
        elements = unpack(data, ELEMENT_BITS[number], math.prod(shape)).view(dtype)
    else:
        elements = np.frombuffer(data, dtype).copy()  # bytes are read-only
    return elements.reshape(shape)
