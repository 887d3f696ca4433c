"""Facts about one .onnx file that need no run: nodes, bytes, interface, checker."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

CHUNK_BYTES = 1 << 20

Interface = dict[str, list[dict[str, Any]]]


def graphs_within(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """The subgraphs of ``nodes``, at any depth."""
    for node in nodes:
        for attribute in node.attribute:
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield graph
                yield from graphs_within(graph.node)


def node_lists(model: onnx.ModelProto) -> Iterator[Sequence[onnx.NodeProto]]:
    """The nodes of the main graph, of every function body, and of every subgraph of either."""
    for nodes in [model.graph.node, *(function.node for function in model.functions)]:
        yield nodes
        for graph in graphs_within(nodes):
            yield graph.node


def is_standard(domain: str, op_type: str, opset: int) -> bool:
    """Whether the ONNX standard has the operator at this version: LayerNormalization at opset 12 is no such thing."""
    try:
        onnx.defs.get_schema(op_type, max_inclusive_version=opset, domain=domain)
    except onnx.defs.SchemaError:  # the answer
        return False
    return True


def count_nodes(model: onnx.ModelProto) -> dict[str, Any]:
    """Count nodes wherever they stand. Constant nodes apart: an initializer is another spelling of the same.

    ``foreign_nodes`` are those that not every runtime of the standard knows. A call of the model's own function is as
    good as its body.
    """
    opsets = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}
    functions = {(function.domain, function.name) for function in model.functions}
    operators: Counter[str] = Counter()
    constants = foreign = 0
    for nodes in node_lists(model):
        for node in nodes:
            domain = "" if node.domain == "ai.onnx" else node.domain
            if (domain, node.op_type) == ("", "Constant"):
                constants += 1
                continue
            operators[f"{domain}:{node.op_type}" if domain else node.op_type] += 1
            own = (node.domain, node.op_type) in functions
            foreign += not own and not is_standard(domain, node.op_type, opsets.get(domain, 1))
    return {
        "nodes": operators.total(),
        "constant_nodes": constants,
        "foreign_nodes": foreign,
        "operators": dict(operators.most_common()),
    }


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in the model: initializers (dense and sparse) and attributes."""
    for graph in [model.graph, *(graph for nodes in node_lists(model) for graph in graphs_within(nodes))]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for nodes in node_lists(model):
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def external_files(path: Path) -> list[Path]:
    """The files beside ``path`` that hold its external data."""
    model = onnx.load(str(path), load_external_data=False)
    places = {
        entry.value
        for tensor in tensors(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path.parent / place for place in sorted(places)]


def gzip_bytes(files: Sequence[Path]) -> int:
    """Size of the download: ``files`` one after the other through gzip -6."""

    class Counting:
        total = 0

        def write(self, data: bytes) -> int:
            self.total += len(data)
            return len(data)

    sink = Counting()
    with gzip.GzipFile(fileobj=sink, mode="wb", compresslevel=6, mtime=0) as stream:  # type: ignore[call-overload]
        for file in files:
            with file.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    stream.write(chunk)
    return sink.total


def describe_value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, type and dims of one input or output; a dim is a number, a symbol, or None where it is not stated."""
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return {"name": value.name, "type": " ".join(str(value.type).split()), "dims": None}
    tensor = value.type.tensor_type
    dims = None
    if tensor.HasField("shape"):
        dims = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim]
    return {"name": value.name, "type": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), "dims": dims}


def interface_of(model: onnx.ModelProto) -> Interface:
    """What a caller must feed, may feed (initializers that are inputs too), and gets."""
    stored = {tensor.name for tensor in model.graph.initializer}
    stored |= {sparse.values.name for sparse in model.graph.sparse_initializer}
    # Before IR 4 every initializer had to be listed as an input; that never was an invitation to feed it.
    overridable = stored if model.ir_version >= 4 else set()
    return {
        "inputs": [describe_value(value) for value in model.graph.input if value.name not in stored],
        "defaults": [describe_value(value) for value in model.graph.input if value.name in overridable],
        "outputs": [describe_value(value) for value in model.graph.output],
    }


def _dim(dim: int | str | None) -> str:
    return "?" if dim is None else str(dim)


def _shape(dims: Sequence[int | str | None] | None) -> str:
    return "unstated" if dims is None else "[" + ",".join(_dim(dim) for dim in dims) + "]"


def _compare_value(
    before: Mapping[str, Any], after: Mapping[str, Any], side: str, fed: Container[str]
) -> tuple[str, str] | None:
    """None when equal, otherwise (grade, text) with grade "refined" or "changed".

    Stating what was left open is harmless, except a number demanded of an input. A symbol of an output that no input
    has (``fed`` lacks it) says no more than an open dim.
    """
    name = f"{side} {before['name']!r}"
    if before["type"] != after["type"]:
        return "changed", f"{name}: type {before['type']} became {after['type']}"
    old, new = before["dims"], after["dims"]
    if old == new:
        return None
    text = f"{name}: shape {_shape(old)} became {_shape(new)}"
    if old is None:
        return ("refined" if side == "output" else "changed"), text
    if new is None or len(old) != len(new):
        return "changed", text

    def harmless(o: int | str | None, n: int | str | None) -> bool:
        if side == "output":
            return o is None or (isinstance(o, str) and o not in fed and n is not None)
        return o is None and isinstance(n, str)

    same = all(o == n or harmless(o, n) for o, n in zip(old, new, strict=True))
    return ("refined" if same else "changed"), text


def compare_interfaces(before: Interface, after: Interface) -> dict[str, Any]:
    """Verdict "equal", "refined" (something unstated was filled in) or "changed", and every difference in words."""
    differences: list[tuple[str, str]] = []
    fed = {dim for value in before["inputs"] for dim in value["dims"] or () if isinstance(dim, str)}
    for side, plural in [("input", "inputs"), ("default", "defaults"), ("output", "outputs")]:
        old = {value["name"]: value for value in before[plural]}
        new = {value["name"]: value for value in after[plural]}
        differences += [("changed", f"{side} {name!r} is gone") for name in old.keys() - new.keys()]
        differences += [("changed", f"{side} {name!r} is new") for name in new.keys() - old.keys()]
        common = [name for name in old if name in new]
        if common != [name for name in new if name in old]:
            differences.append(("changed", f"order of the {plural}"))
        compared = [_compare_value(old[name], new[name], side, fed) for name in common]
        differences += [difference for difference in compared if difference]
    grades = {grade for grade, _ in differences}
    verdict = "changed" if "changed" in grades else ("refined" if grades else "equal")
    return {"verdict": verdict, "differences": sorted(text for _, text in differences)}


def facts(path: Path) -> dict[str, Any]:
    """Everything of this module about one file, ready for JSON."""
    model = onnx.load(str(path), load_external_data=False)
    files = [path, *external_files(path)]
    try:
        onnx.checker.check_model(str(path))
        checker = "ok"
    except (onnx.checker.ValidationError, ValueError) as error:  # a finding, not a failure of this tool
        checker = " ".join(str(error).split())[:300]
    return {
        **count_nodes(model),
        "ir_version": model.ir_version,
        "opsets": {entry.domain: entry.version for entry in model.opset_import},
        "bytes": sum(file.stat().st_size for file in files),
        "gzip_bytes": gzip_bytes(files),
        "interface": interface_of(model),
        "checker": checker,
    }
