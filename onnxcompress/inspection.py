"""What is in a model: interface, operator sets, operators, parameters, bytes by initializer, MACs."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, TypeProto, ValueInfoProto

from onnxcompress.graph import STANDARD_DOMAINS, Graph, is_constant
from onnxcompress.measure import figures, gzip_bytes, size_on_disk
from onnxcompress.model_io import external_files, load
from onnxcompress.shapes import infer_shapes


def inspect_model(path: str | os.PathLike[str], *, download: bool = True) -> dict[str, Any]:
    """Everything that ``onnxcompress inspect`` shows, as plain data.

    Args:
        path: The model file.
        download: Measure the size after gzip as well.

    Raises:
        ModelError: The file is missing or damaged.
    """
    path = Path(path)
    graph = load(path)
    proto = graph.model
    assert proto is not None
    interface = {"inputs": _interface(graph, proto.graph.input), "outputs": _interface(graph, proto.graph.output)}
    infer_shapes(graph)
    counted = figures(graph, size_on_disk(path, graph), download_bytes=gzip_bytes(path) if download else None)
    initializers = _initializers(graph)
    return {
        "path": str(path),
        "ir_version": proto.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "producer": f"{proto.producer_name} {proto.producer_version}".strip(),
        "graph": proto.graph.name,
        "doc_string": proto.doc_string,
        "metadata": {entry.key: entry.value for entry in proto.metadata_props},
        "external_data": [str(file.name) for file in external_files(proto, graph.folder)],
        **interface,
        "nodes": counted.nodes,
        "constant_nodes": counted.constant_nodes,
        "operators": _operators(graph),
        "subgraphs": sum(1 for _ in graph.walk()) - 1,
        "functions": [f"{function.domain}.{function.name}" for function in proto.functions],
        "parameters": counted.parameters,
        "macs": counted.macs,
        "macs_exact": counted.macs_exact,
        "size_bytes": counted.size_bytes,
        "download_bytes": counted.download_bytes,
        "weight_bytes_by_type": dict(
            Counter({kind: sum(i["bytes"] for i in initializers if i["type"] == kind) for kind in _kinds(initializers)})
        ),
        "initializers": initializers,
    }


def largest_initializers(path: str | os.PathLike[str], count: int) -> dict[str, Any]:
    """The constants of a model with most bytes, and what the others come to.

    Args:
        path: The model file.
        count: Of those to list.

    Returns:
        ``rows`` as in ``inspect_model``, and ``rest`` with ``count`` and ``bytes``.

    Raises:
        ModelError: The file is missing or damaged.
    """
    found = _initializers(load(Path(path)))
    rest = found[count:]
    return {"rows": found[:count], "rest": {"count": len(rest), "bytes": sum(entry["bytes"] for entry in rest)}}


def _kinds(initializers: list[dict[str, Any]]) -> set[str]:
    return {entry["type"] for entry in initializers}


def _interface(graph: Graph, values: Any) -> list[dict[str, Any]]:
    constants = {t.name for t in graph.inputs if is_constant(t)}
    return [
        {
            "name": value.name,
            "type": type_text(value),
            "shape": shape_of(value),
            "has_default": value.name in graph.overridable,
        }
        for value in values
        if value.name not in constants
    ]


def type_text(value: ValueInfoProto) -> str:
    """The declared type in a word: float, int64, sequence(float), ..."""
    return _type_text(value.type)


def _type_text(kind: TypeProto) -> str:
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        name: str = TensorProto.DataType.Name(getattr(kind, which).elem_type).lower()
        return name if which == "tensor_type" else f"sparse({name})"
    if which in ("sequence_type", "optional_type"):
        return f"{which.removesuffix('_type')}({_type_text(getattr(kind, which).elem_type)})"
    if which == "map_type":
        key = TensorProto.DataType.Name(kind.map_type.key_type).lower()
        return f"map({key}, {_type_text(kind.map_type.value_type)})"
    return "unknown"


def shape_of(value: ValueInfoProto) -> list[int | str] | None:
    """Declared sizes; symbols as strings, ``?`` where nothing is said; None where the rank is open."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        return None
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in kind.shape.dim]


def _operators(graph: Graph) -> dict[str, int]:
    found: Counter[str] = Counter()
    for inner in graph.walk():
        for node in inner.nodes:
            found[node.op if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op}"] += 1
    return dict(found.most_common())


def _initializers(graph: Graph) -> list[dict[str, Any]]:
    """Constants with their bytes, largest first; the values of Constant nodes are among them."""
    seen: dict[int, dict[str, Any]] = {}
    for inner in graph.walk():
        for node in inner.nodes:
            held = [*node.inputs, *(v for v in node.attrs.values() if is_constant(v))]
            for tensor in held:
                if not is_constant(tensor) or id(tensor) in seen:
                    continue
                seen[id(tensor)] = {
                    "name": tensor.name or (node.outputs[0].name if node.outputs else node.name),
                    "type": "string" if tensor.dtype == object else str(np.dtype(tensor.dtype)),
                    "shape": [int(dim) for dim in tensor.shape],
                    "elements": math.prod(tensor.shape),
                    "bytes": int(tensor.nbytes),
                    "read_by": node.op,
                }
    return sorted(seen.values(), key=lambda entry: -entry["bytes"])
