"""Tensors as they lie in a file: read when asked for, external data only from inside the model's folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcompress.errors import ModelError


class StoredValues(LazyValues):
    """A tensor of the file, read when asked for.

    Args:
        tensor: The TensorProto.
        folder: The model's folder, for external data.
    """

    def __init__(self, tensor: TensorProto, folder: Path | None) -> None:
        self.tensor = tensor
        self.folder = folder
        self.shape = tuple(tensor.dims)
        self.dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        self.nbytes = packed_bytes(tensor.data_type, int(np.prod(self.shape, dtype=np.int64)))

    def load(self) -> np.ndarray:
        if self.tensor.data_location != TensorProto.EXTERNAL:
            return np.asarray(numpy_helper.to_array(self.tensor)).reshape(self.shape)
        data = self.external_bytes()
        if self.tensor.data_type in _PACKED_BITS:
            inline = TensorProto(data_type=self.tensor.data_type, dims=self.tensor.dims, raw_data=data.tobytes())
            return numpy_helper.to_array(inline)
        return data.view(self.dtype).reshape(self.shape)

    def external_bytes(self) -> np.ndarray:
        """The external bytes as a memory map, uint8.

        Raises:
            ModelError: The file is missing, too short, or outside the model's folder.
        """
        path, offset, length = external_location(self.tensor, self.folder)
        if length is None:
            length = self.nbytes
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ModelError(
                f"tensor {self.tensor.name!r}: external data {path} cannot be read: {error.strerror}"
            ) from error
        if length != self.nbytes or offset < 0 or offset + length > size:
            raise ModelError(
                f"tensor {self.tensor.name!r}: external data {path.name} holds {size} bytes, "
                f"and {self.nbytes} bytes are needed at offset {offset} (length given: {length})"
            )
        if length == 0:
            return np.zeros(0, np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(length,))


def external_alignment(size_bytes: int) -> int:
    """Where a tensor may start in a data file: large ones on a page, small ones so that padding adds less than 1 %."""
    return 4096 if size_bytes >= 1 << 20 else 64 if size_bytes >= 1 << 13 else 1


_PACKED_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in {
        **dict.fromkeys(["INT4", "UINT4", "FLOAT4E2M1"], 4),
        **dict.fromkeys(["INT2", "UINT2"], 2),
        **dict.fromkeys(["FLOAT6E2M3", "FLOAT6E3M2"], 6),
    }.items()
    if hasattr(TensorProto, name)
}


def packed_bytes(data_type: int, count: int) -> int:
    """Bytes of ``count`` elements of an ONNX type on disk; strings count as zero."""
    if data_type in _PACKED_BITS:
        return (count * _PACKED_BITS[data_type] + 7) // 8
    if data_type == TensorProto.STRING:
        return 0
    return int(np.dtype(helper.tensor_dtype_to_np_dtype(data_type)).itemsize) * count


def external_location(tensor: TensorProto, folder: Path | None) -> tuple[Path, int, int | None]:
    """Path, offset and length (bytes) of a tensor's external data.

    Raises:
        ModelError: The location is malformed or leads outside the model's folder.
    """
    entry = {pair.key: pair.value for pair in tensor.external_data}
    location = entry.get("location", "")
    if folder is None:
        raise ModelError(f"tensor {tensor.name!r} has external data, and a model given as bytes has no folder")
    base = folder.resolve()
    path = (folder / location).resolve() if location and "\0" not in location else base
    if os.path.isabs(location) or path == base or base not in path.parents:
        raise ModelError(f"tensor {tensor.name!r}: external data {location!r} lies outside the model's folder {folder}")
    try:
        return path, int(entry.get("offset", 0)), int(entry["length"]) if "length" in entry else None
    except ValueError as error:
        raise ModelError(f"tensor {tensor.name!r}: external data offset or length is not a number") from error


def all_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Initializers and tensors in attributes, those of subgraphs and functions included."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for attr in (attr for node in nodes for attr in node.attribute):
        if attr.type == AttributeProto.TENSOR:
            yield attr.t
        yield from attr.tensors
        if attr.type == AttributeProto.GRAPH:
            yield from _graph_tensors(attr.g)
        for body in attr.graphs:
            yield from _graph_tensors(body)


def external_files(proto: ModelProto, folder: Path | None) -> Iterator[Path]:
    """Data files that a model reads, each once.

    Raises:
        ModelError: A location is malformed or leads outside the model's folder.
    """
    seen = set()
    for tensor in all_tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            path = external_location(tensor, folder)[0]
            if path not in seen:
                seen.add(path)
                yield path
