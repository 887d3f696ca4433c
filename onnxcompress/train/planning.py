"""From a graph to a list of function calls: which nodes are needed, in what order, and what is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onnxcompress.errors import ModelError
from onnxcompress.graph import STANDARD_DOMAINS, Graph, Node, bodies, is_op
from onnxcompress.graph import Tensor as GraphTensor
from onnxcompress.train.fusing import Facts, Fusion, find_fusions
from onnxcompress.train.ops import OPERATORS
from onnxcompress.train.ops.call import Call, Function, Mode

Edit = Callable[[Tensor], Tensor]
Values = list[Tensor | None]
Step = Callable[[Values], None]

# Evaluated anew at each run though all inputs are known: the result is random.
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
_RANDOM |= {"Dropout"}


@dataclass
class Plan:
    """What one kind of run does.

    Args:
        size: Number of slots; slot 0 is the input that is left out.
        feeds: Slot and name of each tensor that is fed.
        outputs: Name and slot of each tensor that is asked for.
        held: Slot and name of each parameter or buffer that is read.
        known: Slots whose values never change.
        edits: Slot and name of what is edited before the first step: tensors that no step makes.
        steps: Each reads slots and fills others.
        labels: For each step the node it computes, for messages.
    """

    size: int
    feeds: list[tuple[int, str]] = field(default_factory=list)
    outputs: list[tuple[str, int]] = field(default_factory=list)
    held: list[tuple[int, str]] = field(default_factory=list)
    known: list[tuple[int, Tensor]] = field(default_factory=list)
    edits: list[tuple[int, str]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def run(
        self,
        feeds: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor | None],
        buffers: Mapping[str, Tensor | None],
        edits: Mapping[str, Edit],
    ) -> dict[str, Tensor]:
        values: Values = [None] * self.size
        for slot, tensor in self.known:
            values[slot] = tensor
        for slot, name in self.held:
            found = parameters.get(name)
            values[slot] = buffers[name] if found is None else found
        for slot, name in self.feeds:
            values[slot] = feeds[name]
        for slot, name in self.edits:
            values[slot] = edits[name](values[slot])  # type: ignore[arg-type]  # filled above
        number = 0
        try:
            for number, step in enumerate(self.steps):  # noqa: B007  # read where a step fails
                step(values)
        except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{self.labels[number]} fails in the twin: {line}") from error
        return {name: values[slot] for name, slot in self.outputs}  # type: ignore[misc]  # the plan fills them


class Planner:
    """Makes plans for one graph.

    Args:
        graph: The graph.
        names: Name of each tensor that the twin holds.
        mutable: Names of those whose numbers change: parameters and running statistics.
        float_type: See ``Call``.
        mode: See ``Call``.
    """

    def __init__(
        self, graph: Graph, names: Mapping[GraphTensor, str], mutable: set[str], float_type: torch.dtype, mode: Mode
    ) -> None:
        self.graph, self.names, self.mutable = graph, names, mutable
        self.float_type, self.mode = float_type, mode
        self.slots: dict[GraphTensor, int] = {}
        self.by_name: dict[str, GraphTensor] = {}
        for inner in graph.walk():
            tensors = [*inner.inputs, *inner.outputs]
            for node in inner.nodes:
                tensors += [*node.inputs, *node.outputs]
            for tensor in tensors:
                if tensor.name and tensor not in self.slots:
                    self.slots[tensor] = len(self.slots) + 1
                    if inner is graph:
                        self.by_name.setdefault(str(tensor.name), tensor)
        for tensor, name in names.items():
            self.by_name.setdefault(name, tensor)

    def find(self, name: str) -> GraphTensor:
        """A tensor of the graph, or one that the twin holds.

        Raises:
            ModelError: The graph has no such tensor.
        """
        if name not in self.by_name:
            raise ModelError(f"the graph has no tensor {name!r}")
        return self.by_name[name]

    def slot(self, name: str) -> int:
        """The slot of a tensor; raises as ``find``."""
        return self.slots[self.find(name)]

    def plan(
        self, feeds: Sequence[str], outputs: Sequence[str], held: Mapping[str, Tensor], edits: Mapping[str, Edit]
    ) -> Plan:
        """A plan for these feeds and outputs; see ``TorchGraph.forward``.

        Raises:
            ModelError: A name is unknown, a tensor that is needed is neither fed nor computed, or an operator has no
                counterpart.
        """
        plan = Plan(len(self.slots) + 2)
        plan.feeds = [(self.slot(name), name) for name in feeds]
        plan.outputs = [(name, self.slot(name)) for name in outputs]
        fed = {self.by_name[name] for name in feeds}
        wanted = [self.by_name[name] for name in outputs]
        work = _Work(self, plan, held, edits, fed)
        nodes = needed_nodes(self.graph, wanted, {*fed, *self.names})
        work.begin(wanted, nodes)
        work.sequence(self.graph, nodes, plan.steps, plan.labels)
        plan.known = [(self.slots[tensor], value) for tensor, value in work.known.items()]
        return plan


class _Work:
    """One plan in the making."""

    def __init__(
        self,
        planner: Planner,
        plan: Plan,
        held: Mapping[str, Tensor],
        edits: Mapping[str, Edit],
        fed: set[GraphTensor],
    ) -> None:
        self.planner, self.plan, self.held, self.fed = planner, plan, held, fed
        self.slots, self.names = planner.slots, planner.names
        self.edits = {planner.by_name[name]: (name, function) for name, function in edits.items()}
        self.known: dict[GraphTensor, Tensor] = {}
        self.kept: set[GraphTensor] = set()
        self.read: set[GraphTensor] = set()

    def begin(self, wanted: Sequence[GraphTensor], nodes: Sequence[Node]) -> None:
        """Learn what is there before the first step."""
        self.kept = {*self.fed, *wanted}
        self.read = {tensor for node in nodes for tensor in reads_of(node)} | set(wanted)
        for tensor in self.read:
            name = self.names.get(tensor)
            if tensor in self.fed or tensor.name == "":
                continue
            if name is not None:
                self.kept.add(tensor)
                if name in self.planner.mutable or tensor in self.edits:
                    self.plan.held.append((self.slots[tensor], name))
                else:
                    self.known[tensor] = self.held[name]
            elif not tensor.inputs:
                given = any(tensor is one for one in self.planner.graph.inputs)
                reason = "is not fed" if given else "holds values that torch has no type for"
                raise ModelError(f"tensor {tensor.name!r} is needed and {reason}")
        for tensor, (name, _) in self.edits.items():
            if tensor in self.read and (tensor in self.fed or tensor in self.names):
                self.plan.edits.append((self.slots[tensor], name))

    def sequence(self, graph: Graph, nodes: Sequence[Node], steps: list[Step], labels: list[str]) -> None:
        """Add the steps of nodes of one graph, in order."""
        fusions = {found.end: found for found in find_fusions(nodes, self._facts(graph))}
        into = {inner: found.end for found in fusions.values() for inner in found.inner}
        place = {node: number for number, node in enumerate(nodes)}
        last: dict[GraphTensor, int] = {}
        for node in nodes:
            for tensor in reads_of(node):
                last[tensor] = max(last.get(tensor, 0), place[into.get(node, node)])
        for number, node in enumerate(nodes):
            step = None if node in into else self._fused(fusions[node]) if node in fusions else self._step(node)
            if step is None:
                continue
            read = [tensor for one in (node, *_inner(fusions.get(node))) for tensor in (*reads_of(one), *one.outputs)]
            dying = [
                self.slots[tensor]
                for tensor in dict.fromkeys(read)
                if tensor.inputs and last.get(tensor, number) <= number and self._is_temporary(tensor)
            ]
            steps.append(_releasing(step, dying) if dying and graph is self.planner.graph else step)
            labels.append(_label(node))

    def _facts(self, graph: Graph) -> Facts:
        def number(tensor: GraphTensor) -> float | None:
            value = self.known.get(tensor)
            return float(value) if value is not None and value.numel() == 1 else None

        return Facts(graph, number, self._held_shape, lambda t: t not in self.kept and t not in self.edits)

    def _fused(self, found: Fusion) -> Step:
        inputs, (output,) = tuple(self._slot(tensor) for tensor in found.inputs), found.end.outputs
        step = _calling(found.function, inputs, (self._target(output),))
        return self._edited(step, found.end) if output in self.edits else step

    def _is_temporary(self, tensor: GraphTensor) -> bool:
        return tensor.name != "" and tensor not in self.kept and tensor not in self.known

    # -- single nodes ------------------------------------------------------------------------------------------------

    def _step(self, node: Node) -> Step | None:
        """The step of a node; None where its outputs are known now."""
        if is_op(node, "If"):
            return self._branch(node)
        function = self._function(node)
        inputs = tuple(self._slot(tensor) for tensor in node.inputs)
        edited = any(output in self.edits for output in node.outputs)
        if not edited and node.op not in _RANDOM and all(t.name == "" or t in self.known for t in node.inputs):
            self._evaluate(node, function)
            return None
        step = _calling(function, inputs, tuple(self._target(tensor) for tensor in node.outputs))
        return self._edited(step, node) if edited else step

    def _function(self, node: Node) -> Function:
        builder = OPERATORS.get(str(node.op)) if node.domain in STANDARD_DOMAINS else None
        if builder is None:
            domain = "" if node.domain in STANDARD_DOMAINS else f"{node.domain}::"
            raise ModelError(
                f"operator {domain}{node.op} of {_label(node)} has no counterpart in torch: the model cannot be "
                "trained as it is"
            )
        return builder(
            Call(
                op=str(node.op),
                name=str(node.name or (node.outputs[0].name if node.outputs else "")),
                attributes=node.attrs,
                opset=int(self.planner.graph.opset),
                inputs=tuple(tensor.name != "" for tensor in node.inputs),
                outputs=tuple(t.name != "" and (t in self.read or t in self.kept) for t in node.outputs),
                constants={i: self.known[t] for i, t in enumerate(node.inputs) if t in self.known},
                float_type=self.planner.float_type,
                mode=self.planner.mode,
            )
        )

    def _evaluate(self, node: Node, function: Function) -> None:
        with torch.no_grad():
            try:
                found = function(*(self.known.get(tensor) for tensor in node.inputs))
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ModelError(f"{_label(node)} fails in the twin: {line}") from error
        for tensor, value in zip(node.outputs, [found] if isinstance(found, Tensor) else found, strict=False):
            if value is not None and tensor.name:
                self.known[tensor] = value

    def _slot(self, tensor: GraphTensor) -> int:
        return self.slots[tensor] if tensor.name else 0

    def _target(self, tensor: GraphTensor) -> int:
        """Where an output goes: what nobody names, or what was fed, goes to a slot that nobody reads."""
        return self.plan.size - 1 if tensor.name == "" or tensor in self.fed else self.slots[tensor]

    def _edited(self, step: Step, node: Node) -> Step:
        changes = [(self.slots[output], self.edits[output][1]) for output in node.outputs if output in self.edits]

        def run(values: Values) -> None:
            step(values)
            for slot, function in changes:
                values[slot] = function(values[slot])  # type: ignore[arg-type]  # the step filled it

        return run

    def _branch(self, node: Node) -> Step | None:
        """An If: one branch's steps where the condition is known, else the choice at run time."""
        condition = self.known.get(node.inputs[0])
        names = ("else_branch", "then_branch")
        chosen = names if condition is None else (names[bool(condition)],)
        programs = {name: self._program(node, node.attrs[name]) for name in chosen}
        if condition is not None:
            inside = node.attrs[chosen[0]].outputs
            if all(tensor in self.known for tensor in inside) and not any(t in self.edits for t in node.outputs):
                self.known.update(zip(node.outputs, (self.known[tensor] for tensor in inside), strict=True))
                return None
        slot = self._slot(node.inputs[0])

        def run(values: Values) -> None:
            for step in programs[names[bool(values[slot])] if condition is None else chosen[0]]:
                step(values)

        return self._edited(run, node) if any(output in self.edits for output in node.outputs) else run

    def _program(self, node: Node, body: Graph) -> list[Step]:
        """The steps of a branch, and last the copies of its outputs to those of the If."""
        steps: list[Step] = []
        self.kept.update(body.outputs)
        inner = needed_nodes(body, body.outputs, {*self.fed, *self.names})
        self.read.update(tensor for one in inner for tensor in reads_of(one))
        self.sequence(body, inner, steps, [])
        pairs = [(self._slot(a), self._target(b)) for a, b in zip(body.outputs, node.outputs, strict=True)]

        def copy(values: Values) -> None:
            for source, target in pairs:
                values[target] = values[source]

        return [*steps, copy]

    def _held_shape(self, tensor: GraphTensor) -> tuple[int, ...] | None:
        """The shape of a weight, held as it is or transposed by a node."""
        name = self.names.get(tensor)
        if name is not None:
            return None if tensor in self.edits else tuple(self.held[name].shape)
        if tensor in self.known:
            return tuple(self.known[tensor].shape)
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or not is_op(node, "Transpose") or tensor in self.edits:
            return None
        shape = self._held_shape(node.inputs[0])
        if shape is None:
            return None
        return tuple(shape[axis] for axis in node.attrs.get("perm", range(len(shape))[::-1]))


def needed_nodes(graph: Graph, wanted: Iterable[GraphTensor], stop: set[GraphTensor]) -> list[Node]:
    """The nodes of ``graph`` that ``wanted`` depends on, each after those it reads from; none that makes ``stop``."""
    order: list[Node] = []
    begun: set[Node] = set()

    def producer(tensor: GraphTensor) -> list[Node]:
        node = None if tensor in stop else graph.producer(tensor)
        return [] if node is None or node in begun else [node]

    # Depth first, without recursion: graphs are deeper than Python's stack.
    for tensor in wanted:
        pending = [(node, False) for node in producer(tensor)]
        while pending:
            node, done = pending.pop()
            if done:
                order.append(node)
            elif node not in begun:
                begun.add(node)
                pending.append((node, True))
                pending += [(one, False) for read in reads_of(node) for one in producer(read)]
    place = {node: number for number, node in enumerate(graph.nodes)}
    in_file_order = sorted(order, key=place.__getitem__)
    return in_file_order if _is_sorted(in_file_order) else order


def _is_sorted(nodes: Sequence[Node]) -> bool:
    place = {node: number for number, node in enumerate(nodes)}
    return all(
        place.get(tensor.inputs[0], -1) < number
        for number, node in enumerate(nodes)
        for tensor in reads_of(node)
        if tensor.inputs
    )


def reads_of(node: Node) -> list[GraphTensor]:
    """What a node reads: its inputs, and what the graphs nested in it take from outside or hold."""
    found: list[GraphTensor] = [tensor for tensor in node.inputs if tensor.name]
    for body in bodies(node):
        made = {
            tensor for inner in body.walk() for one in inner.nodes for tensor in one.outputs if one.op != "Constant"
        }
        made.update(tensor for inner in body.walk() for tensor in inner.inputs)
        used = [tensor for inner in body.walk() for one in inner.nodes for tensor in one.inputs]
        used += [tensor for inner in body.walk() for tensor in inner.outputs]
        found += [tensor for tensor in used if tensor.name and tensor not in made]
    return found


def _inner(found: Fusion | None) -> tuple[Node, ...]:
    return found.inner if found is not None else ()


def _calling(function: Function, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Step:
    """The step that calls a function on slots."""
    if len(outputs) > 1:

        def several(values: Values) -> None:
            found = function(*[values[slot] for slot in inputs])
            for slot, value in zip(outputs, [found] if isinstance(found, Tensor) else found, strict=False):
                values[slot] = value

        return several
    (out,) = outputs
    if len(inputs) == 1:
        (only,) = inputs

        def one(values: Values) -> None:
            values[out] = function(values[only])  # type: ignore[assignment]  # one output, one tensor

        return one

    def many(values: Values) -> None:
        values[out] = function(*[values[slot] for slot in inputs])  # type: ignore[assignment]  # as above

    return many


def _releasing(step: Step, dying: Sequence[int]) -> Step:
    """A step that then forgets tensors, so that memory is free where no gradient needs them."""

    def run(values: Values) -> None:
        step(values)
        for slot in dying:
            values[slot] = None

    return run


def _label(node: Node) -> str:
    return f"{node.op} {str(node.name or (node.outputs[0].name if node.outputs else ''))!r}"
