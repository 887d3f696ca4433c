"""The trainable twin: an ONNX graph, executed by torch, with gradients.

    twin = TorchGraph(load("model.onnx"))
    logits = twin({"image": images})["logits"]          # differentiable
    features = twin({"image": images}, ["layer3.out"])  # any tensor can be asked for, and any can be fed
    twin.edit("layer3.out", lambda t: t * 0.5)          # or changed on its way
    ...                                                 # train twin.parameters() with any loop
    twin.write_back()                                   # the numbers go back into the graph

The graph stays the only description of the model: the twin holds tensors under the names of the initializers and a plan
of function calls. A plan is made once for each set of tensors fed and asked for, and leaves out what they do not need.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from onnxcompress.errors import ModelError
from onnxcompress.graph import Constant, Graph, Node, is_op
from onnxcompress.graph import Tensor as GraphTensor
from onnxcompress.train.ops.call import Mode
from onnxcompress.train.planning import Edit, Plan, Planner
from onnxcompress.train.weights import enters_as_weight, held_values, is_float, to_stored, to_torch, weight_tensors

# An integer tensor of at most so many elements is a shape, an axis, an index: read as numbers, it stays on the CPU.
_HOST_ELEMENTS = 256
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BatchNormNames:
    """A BatchNormalization node and the names of its four tensors, "" for one that is not held by the file."""

    node: str
    scale: str
    bias: str
    mean: str
    variance: str


class TorchGraph(nn.Module):
    """The trainable twin of a graph.

    Args:
        graph: Read, never changed but by ``write_back``.
        float_type: What FLOAT, FLOAT16 and BFLOAT16 are computed in. Half types are rounded on writing back only.
        trainable: Which float initializers are parameters, by name; by default ``weights.enters_as_weight`` decides.
            All others are buffers, running statistics of BatchNormalization among them.

    Raises:
        ModelError: An operator, one of its forms, or a type has no counterpart in torch; named with its node.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        float_type: torch.dtype = torch.float32,
        trainable: Callable[[str], bool] | None = None,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.float_type = float_type
        self.mode = Mode()
        self.freeze_batch_statistics = False
        self.output_names = [str(tensor.name) for tensor in graph.outputs]
        self._trainable = trainable
        self._host: list[str] = []
        self._names: dict[GraphTensor, str] = {}
        self._edits: dict[str, Edit] = {}
        self._plans: dict[tuple[tuple[str, ...], tuple[str, ...]], Plan] = {}
        self._statistics: set[str] = set()
        running = {tensor for node in _batch_normalizations(graph) for tensor in node.inputs[3:5]}
        for name, tensor in weight_tensors(graph):
            self._hold(name, tensor, running=tensor in running)
        mutable = self._statistics.union(self._parameters)
        self._planner = Planner(graph, self._names, mutable, float_type, self.mode)
        # An input with a default need not be fed.
        self.input_names = [str(t.name) for t in graph.inputs if t not in self._names]
        self.eval()
        self._plan(self.input_names, self.output_names)

    # -- running -----------------------------------------------------------------------------------------------------

    def forward(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            feeds: Tensors by name: the graph's inputs, or any tensors that the outputs can be computed from. Half
                types are computed in ``float_type``, and outputs come in it.
            outputs: Names of any tensors; the graph's outputs by default.

        Returns:
            The tensors asked for, by name.

        Raises:
            ModelError: A name is unknown, a tensor that is needed is not fed, or an operator fails on its inputs.
        """
        plan = self._plan(list(feeds), self.output_names if outputs is None else outputs)
        # Weights of half types are held in float_type, and so is what meets them.
        feeds = {name: t.to(self.float_type) if t.dtype in _HALVES else t for name, t in feeds.items()}
        return plan.run(feeds, self._parameters, self._buffers, self._edits)

    def edit(self, tensor: str, function: Edit) -> None:
        """Replace a tensor by ``function(tensor)`` wherever it is read; a second edit takes the place of the first.

        Args:
            tensor: Any tensor of the graph, initializers included.
            function: Differentiable; may ignore what it gets.

        Raises:
            ModelError: The graph has no such tensor.
        """
        self._planner.slot(tensor)
        self._edits[tensor] = function
        self._plans.clear()

    def find(self, name: str) -> GraphTensor:
        """A tensor of the graph, or an initializer, by its name.

        Raises:
            ModelError: The graph has no such tensor.
        """
        return self._planner.find(name)

    def unedit(self, tensor: str) -> None:
        """Take an edit back."""
        del self._edits[tensor]
        self._plans.clear()

    def train(self, mode: bool = True) -> TorchGraph:
        """In training mode BatchNormalization uses the batch's statistics, unless they are frozen."""
        super().train(mode)
        self.mode.batch_statistics = mode and not self.freeze_batch_statistics
        return self

    # -- numbers -----------------------------------------------------------------------------------------------------

    @property
    def batch_normalizations(self) -> list[BatchNormNames]:
        """The BatchNormalization nodes of the graph, in order."""
        found = []
        for node in _batch_normalizations(self.graph):
            names = [self._names.get(tensor, "") for tensor in node.inputs[1:5]]
            found.append(BatchNormNames(str(node.name or node.outputs[0].name), *names))
        return found

    def write_back(self, graph: Graph | None = None) -> list[str]:
        """Put the numbers into a graph's initializers, rounded to their stored types.

        Args:
            graph: The twin's own graph by default; else one whose initializers have the same names, those that it
                does not have are skipped.

        Returns:
            Names of what changed. All else stays bit for bit.

        Raises:
            ModelError: A number does not fit the stored type, or a shape differs.
        """
        changed = []
        for name, tensor in weight_tensors(graph or self.graph):
            held = self._parameters.get(name, self._buffers.get(name))
            before = _file_values(graph or self.graph, tensor)
            if held is None or before is None or not (is_float(before.dtype) or held.dtype.is_floating_point):
                continue
            if tuple(held.shape) != before.shape:
                raise ModelError(f"initializer {name!r}: shape {list(before.shape)}, the twin has {list(held.shape)}")
            after = to_stored(held, before, name)
            if after.tobytes() != before.tobytes():
                _put(graph or self.graph, tensor, after)
                changed.append(name)
        return changed

    def _hold(self, name: str, tensor: GraphTensor, *, running: bool) -> None:
        values = _file_values(self.graph, tensor)
        if values is None or values.dtype.kind in "OSU":
            return  # a string or a sparse tensor: an error where something needs it
        held = to_torch(values, self.float_type, name)
        self._names[tensor] = name
        if running:
            self._statistics.add(name)
        elif held.is_floating_point():
            wanted = self._trainable(name) if self._trainable else enters_as_weight(self.graph, tensor, values.shape)
            if wanted:
                # register_parameter refuses names with a dot, as ONNX names have them.
                self._parameters[name] = nn.Parameter(held)
                return
        elif held.numel() <= _HOST_ELEMENTS:
            self._host.append(name)
        self._buffers[name] = held

    def _plan(self, feeds: Sequence[str], outputs: Sequence[str]) -> Plan:
        key = (tuple(feeds), tuple(outputs))
        plan = self._plans.get(key)
        if plan is None:
            both = {**self._buffers, **self._parameters}
            held = {name: tensor for name, tensor in both.items() if tensor is not None}
            plan = self._plans[key] = self._planner.plan(feeds, outputs, held, self._edits)
        return plan

    # -- what torch expects of a module ------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchGraph:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name in self._host:
            self._buffers[name] = self.get_buffer(name).cpu()
        self._plans.clear()  # they hold constants of the old device
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A dot in a name is not the border of a submodule here.
        own = {prefix + name for name in (*self._parameters, *self._buffers)}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own]
        self._plans.clear()

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter of an initializer."""
        found = self._parameters.get(target)
        if found is None:
            raise AttributeError(f"no parameter {target!r}")
        return found

    def get_buffer(self, target: str) -> Tensor:
        """The buffer of an initializer that is not trained."""
        found = self._buffers.get(target)
        if found is None:
            raise AttributeError(f"no buffer {target!r}")
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchGraph:
        """A twin of the same graph with numbers of its own."""
        twin = TorchGraph(self.graph, float_type=self.float_type, trainable=self._parameters.__contains__)
        memo[id(self)] = twin
        twin.freeze_batch_statistics = self.freeze_batch_statistics
        twin.mode.synchronize = self.mode.synchronize
        for name, tensor in self._parameters.items():
            if tensor is not None:
                twin._parameters[name] = copy.deepcopy(tensor, memo)
        for name, held in self._buffers.items():
            twin._buffers[name] = copy.deepcopy(held, memo)
        twin._edits = dict(self._edits)
        twin._plans.clear()
        twin.train(self.training)
        return twin


def _batch_normalizations(graph: Graph) -> Iterable[Node]:
    return (node for inner in graph.walk() for node in inner.nodes if is_op(node, "BatchNormalization"))


def _file_values(graph: Graph, tensor: GraphTensor) -> np.ndarray | None:
    default = graph.overridable.get(str(tensor.name))
    if default is not None and any(tensor is given for given in graph.inputs):
        return numpy_helper.to_array(default)
    return held_values(tensor)


def _put(graph: Graph, tensor: GraphTensor, values: np.ndarray) -> None:
    if isinstance(tensor, Constant):
        tensor.values = values
    elif tensor.inputs:
        node = tensor.inputs[0]
        node.attrs = {"value": Constant(str(tensor.name), values)}
        node.graph.touch(node)
    else:
        graph.overridable[str(tensor.name)] = numpy_helper.from_array(values, str(tensor.name))
