"""Supernets and pruned graphs: the structure of depth pruning, as ordinary ONNX graphs.

Where the two flows of a block differ, the supernet mixes them by one scalar initializer, lambda:

    activation      (1 - l) * act(z) + l * z                         or l * BatchNormalization(z)
    normalization   (1 - l) * norm(z) + l * BatchNormalization(z)
    at the end      (1 - l) * y + l * act(y)
    padding         all at the first Conv; on the ring that this adds, what the next one reads is multiplied by l
    3x3-capped      taps of the second kernel off the centre are multiplied by (1 - l)
    deletion        x + (1 - l) * f(x)

At l = 0 this is the original, bit for bit but for the order of rounding, borders included. At l = 1 it is the pruned
graph, which ``build_pruned`` makes without the mixes, and which the ordinary passes merge. All weights keep their
names, so that numbers trained in the supernet can be written back into the pruned graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxcompress.errors import RecipeError
from onnxcompress.graph import Constant, Graph, Node, Tensor, rank
from onnxcompress.linear.nodes import read_affine
from onnxcompress.rewrite import remove_if_unread
from onnxcompress.shapes import infer_shapes
from onnxcompress.train.depth.blocks import Block, Site, check_names, locate
from onnxcompress.train.depth.edits import (
    MakeActivation,
    Mixer,
    centre,
    channel_axis,
    end_activation,
    float_type,
    insert_batchnorm,
    insert_mask,
    insert_node,
    moved_pads,
    new_mixer,
    rewire,
    set_pads,
    take_over,
)
from onnxcompress.train.depth.kinds import FLOWS, Flow, Kind
from onnxcompress.train.depth.preparation import copy_graph
from onnxcompress.train.depth.steps import Step

Flows = Mapping[Kind, Flow]


@dataclass(frozen=True, eq=False)
class Supernet:
    """A graph that is the original where a lambda is 0, and has its block pruned where it is 1.

    Attributes:
        graph: The mixed graph.
        lambdas: Name of the scalar initializer by name of the block; all are 0.
        blocks: In order of execution.
        original: What it was made from.
        flows: The choices in the pruned flows.
    """

    graph: Graph
    lambdas: dict[str, str]
    blocks: tuple[Block, ...]
    original: Graph
    flows: Flows = field(default_factory=lambda: FLOWS)

    def at(self, values: Mapping[str, float]) -> Graph:
        """A copy of the graph with lambdas by name of the block; those not named stay."""
        wanted = {self.lambdas[block]: value for block, value in values.items()}
        copied = copy_graph(self.graph)
        for constant in dict.fromkeys(t for node in copied.nodes for t in node.inputs if isinstance(t, Constant)):
            if constant.name in wanted:
                constant.values = np.array(wanted[str(constant.name)], constant.dtype)
        return copied


def build_supernet(graph: Graph, blocks: Sequence[Block], *, flows: Flows | None = None) -> Supernet:
    """The supernet of a graph.

    Args:
        graph: Prepared; not changed.
        blocks: From ``find_blocks`` on this graph; no node in two of them, except that a block may be followed by
            itself as one to delete.
        flows: Choices by kind; ``FLOWS`` for the others.

    Raises:
        RecipeError: Two blocks share a node, a block is not in the graph, or a choice cannot be met.
    """
    check_blocks(graph, blocks, rivals=True)
    chosen_flows = {**FLOWS, **(flows or {})}
    mixed = copy_graph(graph)
    sites = {block.name: locate(mixed, block) for block in blocks}
    lambdas = {}
    for block in blocks:
        site = sites[block.name]
        mixer = new_mixer(mixed, block.name, site.output)
        lambdas[block.name] = str(mixer.pruned.name)
        _Mixed(mixed, block, site, chosen_flows[block.kind], mixer).build()
    mixed.sort()
    infer_shapes(mixed)
    return Supernet(mixed, lambdas, tuple(blocks), graph, chosen_flows)


def build_pruned(
    source: Supernet | Graph,
    blocks: Sequence[Block],
    chosen: Collection[str],
    *,
    deleted: Collection[str] = (),
    flows: Flows | None = None,
) -> Graph:
    """The graph with the chosen blocks in their pruned form; unmerged.

    Args:
        source: The original, prepared; or a supernet, for its original and its choices.
        blocks: From ``find_blocks``.
        chosen: Names of the blocks to prune; a block of kind "residual" is deleted.
        deleted: Names of blocks to delete.
        flows: Choices by kind.

    Raises:
        RecipeError: A name is no block's, a block cannot be deleted, or is chosen twice.
    """
    if isinstance(source, Supernet):
        graph, chosen_flows = source.original, {**source.flows, **(flows or {})}
    else:
        graph, chosen_flows = source, {**FLOWS, **(flows or {})}
    unknown = sorted({*chosen, *deleted} - {block.name for block in blocks})
    if unknown:
        raise RecipeError(f"there is no block {unknown[0]!r}; find_blocks lists {len(blocks)}")
    wanted = [block for block in blocks if block.name in chosen or block.name in deleted]
    check_blocks(graph, wanted)
    pruned = copy_graph(graph)
    sites = {block.name: locate(pruned, block) for block in wanted}
    gone = [block for block in wanted if block.name in deleted or block.kind == "residual"]
    for block in wanted:
        if block not in gone:
            _Pruned(pruned, block, sites[block.name], chosen_flows[block.kind]).build()
    # Last, and from the end: the source of a block may be the output of one that goes as well.
    for block in reversed(gone):
        delete_block(pruned, block)
    pruned.sort()
    infer_shapes(pruned)
    return pruned


def check_blocks(graph: Graph, blocks: Sequence[Block], *, rivals: bool = False) -> None:
    """RecipeError where two blocks have one node in common; with ``rivals`` one of them may delete the other."""
    check_names(graph)
    owner: dict[str, str] = {}
    merged = {block.add for block in blocks if block.kind != "residual"} if rivals else set()
    for block in blocks:
        if block.kind == "residual" and block.add in merged:
            continue
        for node in (*block.nodes, *block.shortcut):
            if node in owner:
                raise RecipeError(f"blocks {owner[node]!r} and {block.name!r} share node {node!r}: take one of them")
            owner[node] = block.name


def delete_block(graph: Graph, block: Block) -> None:
    """Let the block's source stand for its output.

    Raises:
        RecipeError: They have different shapes, or both are needed by name.
    """
    if not block.deletable:
        raise RecipeError(
            f"block {block.name!r} cannot be deleted: from {block.source_shape} it makes {block.output_shape}"
        )
    site = locate(graph, block)
    add, output = site.add, site.output
    assert add is not None, "a block that can be deleted has an Add"
    if graph.is_output(output):
        # The name has to stay, and so does that of the source, which another block may end in.
        add.op, add.attrs, add.inputs = "Identity", {}, [site.source]
    else:
        graph.redirect(output, site.source)
        graph.remove(add)
    remove_if_unread(graph, (site.dead or site.branch.nodes)[::-1])


class _Flow:
    """What both builders share."""

    def __init__(self, graph: Graph, block: Block, site: Site, flow: Flow) -> None:
        self.graph, self.block, self.site, self.flow = graph, block, site, flow
        self.branch = site.branch
        self.end: MakeActivation | None = None
        if block.kind != "residual":
            self.end = end_activation(graph, site.branch, flow, block.end, block.name)

    def name(self, index: int, what: str) -> str:
        return f"{self.block.name}.{what}{index}"

    def readers(self, tensor: Tensor) -> list[Node]:
        return list(dict.fromkeys(tensor.outputs))

    def replacement(self, index: int, step: Step, source: Tensor, before: Node, axis: int) -> Tensor:
        """What the pruned flow has in place of a normalization or an activation."""
        if step.kind == "activation" and self.flow.activation == "nothing":
            return source
        name = self.name(index, "norm")
        return insert_batchnorm(self.graph, source, axis, before=before, name=name, scale=step.scale, bias=step.bias)


class _Mixed(_Flow):
    """One block of a supernet."""

    def __init__(self, graph: Graph, block: Block, site: Site, flow: Flow, mixer: Mixer) -> None:
        super().__init__(graph, block, site, flow)
        self.mixer = mixer

    def build(self) -> None:
        graph, block = self.graph, self.block
        if block.kind == "residual":
            self._fade()
            return
        sources: dict[Tensor, Tensor] = {}
        for index, step in enumerate(self.branch.steps):
            if step.kind not in ("norm", "activation"):
                continue
            readers = self.readers(step.output)
            source = sources.get(step.source, step.source)
            axis = channel_axis(self.branch, step)
            other = self.replacement(index, step, source, readers[0], axis)
            mixed = self.mixer.mix(graph, step.output, other, before=readers[0], name=self.name(index, "step"))
            rewire(readers, step.output, mixed)
            sources[step.output] = mixed
        if block.kind == "basic-3x3":
            self._cap()
        else:
            self._move_padding()
        if self.end is not None:
            inner = take_over(graph, self.site.output)
            before = self._after(inner)
            activated = self.end(inner, before, f"{block.name}.end")
            last = self.mixer.mix(graph, inner, activated, before=before, name=f"{block.name}.end")
            self._produce(last)

    def _after(self, tensor: Tensor) -> Node:
        """A node to insert before; where no node follows, the producer itself: the graph is sorted in the end."""
        readers = self.readers(self.site.output) or self.readers(tensor)
        node = readers[0] if readers else self.graph.producer(tensor)
        assert node is not None
        return node if node.graph is self.graph else self.graph.nodes[-1]

    def _produce(self, made: Tensor) -> None:
        """Let the producer of ``made`` make the block's output instead."""
        node = self.graph.producer(made)
        assert node is not None
        node.outputs = [self.site.output]

    def _fade(self) -> None:
        add = self.site.add
        assert add is not None
        end = next(tensor for tensor in add.inputs if tensor is not self.site.source)
        name = f"{self.block.name}.fade"
        faded = insert_node(self.graph, "Mul", [end, self.mixer.base], add, name)
        rewire([add], end, faded)

    def _cap(self) -> None:
        step = self.branch.linear[1]
        node, conv = step.nodes[0], step.conv
        assert conv is not None
        taps = np.zeros((1, 1, *conv.kernel), conv.weight.dtype)
        place: tuple[int, ...] = (0, 0, *centre(conv))
        taps[place] = 1
        name = f"{self.block.name}.cap"
        kept = self.graph.new_constant(f"{name}.centre", taps)
        mask = insert_node(self.graph, "Max", [kept, self.mixer.base], node, f"{name}.mask")
        weight = insert_node(self.graph, "Mul", [node.inputs[1], mask], node, name)
        node.attrs.setdefault("kernel_shape", list(conv.kernel))
        node.inputs = [node.inputs[0], weight, *node.inputs[2:]]

    def _move_padding(self) -> None:
        for index, (step, pads, begin, end) in enumerate(moved_pads(self.branch)):
            assert step.conv is not None
            if any(begin + end):
                insert_mask(self.graph, step, begin, end, self.mixer, self.name(index, "ring"))
            set_pads(step.nodes[0], step.conv, pads)


class _Pruned(_Flow):
    """One block in its pruned form."""

    def build(self) -> None:
        branch = self.branch
        if any(step.kind == "transpose" for step in branch.steps):
            self._channels_first()
        else:
            self._in_place()
        remove_if_unread(self.graph, branch.nodes[::-1])
        if self.end is not None:
            inner = take_over(self.graph, self.site.output)
            node = self.graph.producer(inner)
            assert node is not None
            activated = self.end(inner, self._following(node), f"{self.block.name}.end")
            maker = self.graph.producer(activated)
            assert maker is not None
            maker.outputs = [self.site.output]

    def _following(self, node: Node) -> Node:
        index = self.graph.nodes.index(node)
        following: Node = self.graph.nodes[min(index + 1, len(self.graph.nodes) - 1)]
        return following

    def _in_place(self) -> None:
        sources: dict[Tensor, Tensor] = {}
        for index, step in enumerate(self.branch.steps):
            if step.kind not in ("norm", "activation"):
                continue
            readers = self.readers(step.output)
            source = sources.get(step.source, step.source)
            other = self.replacement(index, step, source, readers[0], channel_axis(self.branch, step))
            rewire(readers, step.output, other)
            sources[step.output] = other
        if self.block.kind == "basic-3x3":
            self._cap()
            return
        for step, pads, _, _ in moved_pads(self.branch):
            assert step.conv is not None
            set_pads(step.nodes[0], step.conv, pads)

    def _cap(self) -> None:
        step = self.branch.linear[1]
        node, conv = step.nodes[0], step.conv
        assert conv is not None
        weight = node.inputs[1]
        for axis, tap in enumerate(centre(conv)):
            name = f"{self.block.name}.cap"
            place = self.graph.new_constant(f"{name}.tap", np.array([tap], np.int64))
            weight = insert_node(self.graph, "Gather", [weight, place], node, name, axis=axis + 2)
        ones = [1] * conv.spatial_rank
        node.inputs = [node.inputs[0], weight, *node.inputs[2:]]
        node.attrs.update(kernel_shape=ones, dilations=ones)
        set_pads(node, conv, [0] * (2 * conv.spatial_rank))

    def _channels_first(self) -> None:
        """The branch anew with the channels on axis 1 throughout: its matrices become 1x1 convolutions."""
        end = self.branch.output
        readers = self.readers(end)
        before = readers[0]
        tensor = self.branch.source
        moved = {step: pads for step, pads, _, _ in moved_pads(self.branch)}
        for index, step in enumerate(self.branch.steps):
            last = channel_axis(self.branch, step) != 1
            if step.kind == "transpose":
                continue
            if step.kind in ("norm", "activation"):
                tensor = self.replacement(index, step, tensor, before, 1)
            elif step.kind == "matrix":
                tensor = self._pointwise(index, step, tensor, before)
            else:
                tensor = self._copy(index, step, tensor, before, last)
                if step.conv is not None:
                    set_pads(tensor.inputs[0], step.conv, moved[step])
        rewire(readers, end, tensor)

    def _pointwise(self, index: int, step: Step, source: Tensor, before: Node) -> Tensor:
        """A matrix on the last axis as a 1x1 convolution that reads the same initializer."""
        node, name = step.nodes[0], self.name(index, "pointwise")
        affine = read_affine(node)
        assert not isinstance(affine, str), "find_blocks has read it"
        rows, columns = affine.matrix.shape
        weight = insert_node(self.graph, "Transpose", [node.inputs[1]], before, f"{name}.transposed", perm=[1, 0])
        target = self.graph.new_constant(f"{name}.shape", np.array([columns, rows, 1, 1], np.int64))
        kernel = insert_node(self.graph, "Reshape", [weight, target], before, f"{name}.kernel")
        made = insert_node(self.graph, "Conv", [source, kernel], before, name, kernel_shape=[1, 1])
        made.dtype = step.output.dtype
        made.shape = None if source.shape is None else [source.shape[0], columns, *source.shape[2:]]
        return made

    def _copy(self, index: int, step: Step, source: Tensor, before: Node, last: bool) -> Tensor:
        """A convolution or a scale that reads another tensor; a vector along the last axis then lies along axis 1."""
        node, name = step.nodes[0], self.name(index, "step")
        inputs: list[Tensor] = []
        for tensor in node.inputs:
            if tensor is step.source:
                inputs.append(source)
            elif last and rank(tensor):
                size = int(np.prod(tensor.shape))
                target = self.graph.new_constant(f"{name}.shape", np.array([size, 1, 1], np.int64))
                inputs.append(insert_node(self.graph, "Reshape", [tensor, target], before, f"{name}.aligned"))
            else:
                inputs.append(tensor)
        made = insert_node(self.graph, node.op, inputs, before, name, **node.attrs)
        made.dtype, made.shape = float_type(step.output), None if source.shape is None else list(source.shape)
        if step.conv is not None and made.shape is not None:
            made.shape[1] = step.conv.out_channels
        return made
