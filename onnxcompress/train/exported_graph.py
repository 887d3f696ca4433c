"""What torch's exporters write, tidied: one initializer per entry of the state_dict, names from module paths.

TorchScript stores equal tensors once, so that every fresh bias of a net is the same initializer, and dynamo surrounds
each Conv with Shape, CastLike and Expand. The cleanup passes run here with the entries of the state_dict in the place
of inputs: shape arithmetic folds, and no parameter is folded, merged or renamed.

    /layer1/layer1.0/conv1/Conv, /layer1/layer1.0/conv1/Conv_output_0      TorchScript
    node_conv2d_3, conv2d_3                                                dynamo
    layer1.0.conv1/Conv, layer1.0.conv1/Conv_output_0                      both, afterwards
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from torch import Tensor, nn

from onnxcompress import pipeline
from onnxcompress.graph import Constant, Graph, Node, Variable, is_op
from onnxcompress.model_io import StoredValues, load
from onnxcompress.rewrite import Settings

_SCOPES = "pkg.torch.onnx.name_scopes"  # dynamo: the modules around a node, outermost first, then the call itself
Evaluate = Callable[[Any, dict[str, Any]], list[Any]]


def tidy_graph(proto: ModelProto, folder: Path, module: nn.Module, evaluate: Evaluate) -> Graph:
    """The graph of an exported model, cleaned up and named.

    Args:
        proto: As the exporter wrote it; changed.
        folder: Where its external data lie.
        module: What was exported.
        evaluate: Runs a model of one node, for constants.
    """
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    paths = module_paths(proto.graph, [name for name, _ in module.named_modules()])
    _strip(proto)
    _part_equal_initializers(proto.graph, state)
    held = _hold_as_inputs(proto.graph, state)
    graph = load(proto, folder=folder)
    pipeline.run(graph, pipeline.select(level=1), Settings(evaluate=evaluate))
    _release(graph, held)
    _drop_zero_biases(graph, set(state))
    for inner in graph.walk():
        for node in inner.nodes:
            node.made_by = ""  # the file is an export, not a result of the passes
    _rename(graph, paths, set(state))
    return graph


# -- what the exporter left ------------------------------------------------------------------------------------------


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attr in node.attribute:
            for body in [attr.g, *attr.graphs] if attr.HasField("g") else attr.graphs:
                yield from _graphs(body)


def _strip(proto: ModelProto) -> None:
    """Remove doc strings, metadata (stack traces, tens of kilobytes a model) and inferred shapes of inner tensors."""
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    for graph in _graphs(proto.graph):
        for field in ("doc_string", "metadata_props", "value_info"):
            graph.ClearField(field)
        for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")


def _tied(a: Tensor, b: Tensor) -> bool:
    return bool(a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _part_equal_initializers(graph: GraphProto, state: Mapping[str, Tensor]) -> None:
    """Give each entry of the state_dict that was stored under another's name its own initializer; tied ones stay."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in stored and node.output[0] in state:
            source, name = node.input[0], node.output[0]
            if source not in state or not _tied(state[source], state[name]):
                copy = TensorProto()
                copy.CopyFrom(stored[source])
                copy.name = name
                stored[name] = copy
                graph.initializer.append(copy)
                continue
        kept.append(node)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def _hold_as_inputs(graph: GraphProto, state: Mapping[str, Tensor]) -> list[str]:
    """List the initializers of the state_dict as inputs: values that a caller may set are no constants to a pass."""
    held = [tensor for tensor in graph.initializer if tensor.name in state]
    for tensor in held:
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return [tensor.name for tensor in held]


def _release(graph: Graph, held: Sequence[str]) -> None:
    """Undo ``_hold_as_inputs``; what nothing reads is left out."""
    names = set(held)
    carrier = graph.carrier
    assert carrier is not None, "the graph was just read"
    for place in reversed(range(len(carrier.input))):
        if carrier.input[place].name in names:
            del carrier.input[place]
    for tensor in [t for t in graph.inputs if t.name in names]:
        constant = Constant(tensor.name, StoredValues(graph.overridable.pop(tensor.name), graph.folder), home=graph)
        graph.redirect(tensor, constant)
        graph.outputs = [constant if output is tensor else output for output in graph.outputs]
    graph.inputs = [tensor for tensor in graph.inputs if tensor.name not in names]


def _drop_zero_biases(graph: Graph, parameters: set[str]) -> None:
    """Dynamo gives every Conv a bias; one that the module does not have is zeros, or zeros expanded."""
    for inner in graph.walk():
        for node in list(inner.nodes):
            if not (is_op(node, "Conv", "ConvTranspose") and len(node.inputs) == 3):
                continue
            maker = inner.producer(node.inputs[2])
            zeros = maker.inputs[0] if is_op(maker, "Expand") and maker is not None else node.inputs[2]
            if isinstance(zeros, Constant) and zeros.name not in parameters and not np.any(zeros.values):
                node.inputs = node.inputs[:2]
                if maker is not None and not any(t.outputs or inner.is_output(t) for t in maker.outputs):
                    inner.remove(maker)


# -- names -----------------------------------------------------------------------------------------------------------


def module_paths(graph: GraphProto, modules: Sequence[str]) -> dict[str, str]:
    """Per node name the module whose forward made it, as in ``named_modules``: "" for the outermost."""
    nodes = [node for inner in _graphs(graph) for node in inner.node if node.name]
    found = Modules(modules)
    for node in nodes:
        for name in node.input:
            found.learn(_scopes(node), name.rpartition(".")[0])
    return {node.name: _dynamo_path(node, found.names) or found.path(_scopes(node)) for node in nodes}


def _scopes(node: NodeProto) -> tuple[str, ...]:
    return tuple(node.name.split("/")[1:-1]) if node.name.startswith("/") else ()


def _dynamo_path(node: NodeProto, modules: set[str]) -> str:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    named: list[str] = ast.literal_eval(scopes)
    return next((name for name in reversed(named[:-1]) if name in modules), "")


class Modules:
    """Finds modules by the shortened names that TorchScript scopes have.

    A scope is named by the module's last attribute with the numbers behind it: of ``features.2.large.0`` it keeps
    ``large.0``. A module that runs again gets ``_1``, ``_2`` behind it. What is left out where a ModuleList or a
    ModuleDict holds the module is learned from the parameters that are read there.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = set(names)
        self.by_scope: dict[str, list[str]] = {}
        for name in names:
            self.by_scope.setdefault(_scope_name(name), []).append(name)
        self.learned: dict[tuple[str, ...], str] = {}

    def learn(self, scopes: tuple[str, ...], module: str) -> None:
        """A node inside ``scopes`` reads a parameter of ``module``."""
        while scopes and module in self.candidates(scopes[-1]):
            self.learned.setdefault(scopes, module)
            scopes = scopes[:-1]
            around = module.split(".")[:-1]
            while around and scopes and ".".join(around) not in self.candidates(scopes[-1]):
                around.pop()
            module = ".".join(around)

    def candidates(self, scope: str) -> list[str]:
        return self.by_scope.get(scope) or self.by_scope.get(re.sub(r"_\d+$", "", scope), [])

    def path(self, scopes: tuple[str, ...]) -> str:
        if not scopes:
            return ""
        if scopes not in self.learned:
            outer, candidates = self.path(scopes[:-1]), self.candidates(scopes[-1])
            inside = [name for name in candidates if not outer or name.startswith(outer + ".")]
            # A module may be called by another than the one that holds it.
            choice = min(inside or candidates, key=lambda name: (name.count("."), name), default=outer)
            self.learned[scopes] = choice
        return self.learned[scopes]


def _scope_name(module: str) -> str:
    found = re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", module)
    return found[0] if found else module


def _rename(graph: Graph, paths: Mapping[str, str], parameters: set[str]) -> None:
    taken = set(parameters)
    for inner in graph.walk():
        taken |= {tensor.name for tensor in (*inner.inputs, *inner.outputs)}
    taken |= {tensor.name for tensor in graph.scope.pinned}
    nodes = [node for inner in graph.walk() for node in inner.nodes]
    places = [paths[node.name] if node.name in paths else _neighbour_path(node, paths) for node in nodes]
    for node, path in zip(nodes, places, strict=True):
        node.name = _free(f"{path}/{node.op}" if path else node.op, taken)
    for inner in graph.walk():
        kept = {*inner.inputs, *inner.outputs, *graph.scope.pinned}
        for node in inner.nodes:
            for place, tensor in enumerate(node.outputs):
                if tensor not in kept and not tensor.is_empty():
                    tensor.name = _free(f"{node.name}_output_{place}", taken)
    renamed: set[Any] = set()
    for inner in graph.walk():
        for node in inner.nodes:
            for place, tensor in enumerate(node.inputs):
                if isinstance(tensor, Constant) and tensor.name not in parameters and tensor not in renamed:
                    renamed.add(tensor)
                    tensor.name = _free(f"{node.name}_input_{place}", taken)


def _neighbour_path(node: Node, paths: Mapping[str, str]) -> str:
    """The module of a node that a pass made: that of a node it was made beside."""
    around = [maker for t in node.inputs if isinstance(t, Variable) for maker in t.inputs]
    around += [reader for t in node.outputs for reader in t.outputs]
    return next((paths[one.name] for one in around if one.name in paths), "")


def _free(name: str, taken: set[str]) -> str:
    found, number = name, 0
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found
