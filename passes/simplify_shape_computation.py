"""Replace computed shapes by constants, and computed sizes that are equal by one of them.

    before   y = Reshape(x, Concat(Gather(Shape(x), 0), Mul(Gather(Shape(x), 1), 8), [16]))
    after    y = Reshape(x, [0, -1, 16])

Exact for every input size. The elements of small integer tensors are followed as polynomials in the unknown sizes
(``sizes``). A tensor whose elements are all known becomes a constant. A Reshape target becomes one when each element
is a number, the size of that very axis (0), or the only one that is neither (-1, where no other axis can be empty). The
end of a Slice that is the size of its axis becomes "to the end". Of tensors with equal elements the first is read, and
neighbouring sizes of one tensor are taken by one Shape (before opset 15: by one Slice of its Shape).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import Constant, Graph, Node, Tensor, is_constant, numpy_dtype, optional_input
from onnxcompress.patterns.decoded_weights import decoding_nodes
from onnxcompress.patterns.reshape_target import constant_target, left_over_axis
from onnxcompress.patterns.sizes_pass import SizesPass
from onnxcompress.rewrite import Miss
from onnxcompress.sizes import Window, known_or
from onnxcompress.sizes.rules import VALUES

TO_THE_END = (1 << 63) - 1


@dataclass(frozen=True)
class Site:
    """The output is known ``values``, an ``equal`` tensor or a ``window``; or an input becomes ``constant``."""

    node: Node
    values: np.ndarray | None = None
    equal: Tensor | None = None
    window: Window | None = None
    index: int = 0
    constant: tuple[int, ...] = ()


class SimplifyShapeComputation(SizesPass[Site]):
    name = "simplify-shape-computation"
    ops = tuple(VALUES)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        if all(map(is_constant, node.inputs)):
            return None  # a matter of folding
        found = self._values(graph, node)
        if found is not None:
            return found
        if node.op == "Reshape":
            return self._reshape(graph, node)
        return self._slice(graph, node) if node.op == "Slice" else None

    def _values(self, graph: Graph, node: Node) -> Site | None:
        sizes = self.sizes(graph)
        output = node.outputs[0]
        values, dtype = sizes.values(output), numpy_dtype(output)
        if len(node.outputs) != 1 or values is None or dtype is None or graph.is_output(output):
            return None
        if values.known is not None:
            if node in decoding_nodes(graph):
                return None  # indices into a codebook, not sizes
            array = np.array(values.known, dtype).reshape(() if values.scalar else (-1,))
            return Site(node, values=array)
        equal = sizes.first_equal(output)
        if equal is not None and equal is not output and graph.producer(equal) is not None:
            return Site(node, equal=equal)
        window = sizes.window(output)
        if window is None or node.op == "Shape" or (node.op == "Slice" and graph.opset < 15) or graph.opset < 10:
            return None
        return Site(node, window=window) if graph.producer(window.shape) is not None else None

    def _take_window(self, graph: Graph, node: Node, window: Window) -> None:
        output = node.outputs[0]
        if graph.opset >= 15:
            bounds = {"start": window.start, "end": window.end}
            # Beside the other Shape: further down, it would keep the tensor in memory for longer.
            graph.insert("Shape", [window.source], [output], bounds, before=graph.producer(window.shape) or node)
        else:
            label = node.name or node.op
            names = {"starts": window.start, "ends": window.end, "axes": 0}
            cuts = [graph.new_constant(f"{label}.{name}", np.array([n], np.int64)) for name, n in names.items()]
            graph.insert("Slice", [window.shape, *cuts], [output], before=node)
        graph.remove(node)

    def _reshape(self, graph: Graph, node: Node) -> Site | Miss | None:
        sizes = self.sizes(graph)
        dims, target = sizes.dims(node.inputs[0]), sizes.values(optional_input(node, 1))
        if dims is None or target is None or is_constant(node.inputs[1]):
            return None
        wanted = sizes.reshaped(dims, target.items, allow_zero=bool(node.attrs.get("allowzero", 0)))
        constant = None if wanted is None else constant_target(sizes, dims, wanted, left_over_axis(target.items))
        if constant is None:
            return Miss(node.name, "no constant target makes the shape for every size")
        return Site(node, index=1, constant=tuple(constant))

    def _slice(self, graph: Graph, node: Node) -> Site | None:
        ends_tensor = optional_input(node, 2)
        if ends_tensor is None or is_constant(ends_tensor):
            return None
        sizes = self.sizes(graph)
        dims, ends = sizes.dims(node.inputs[0]), sizes.values(ends_tensor)
        if dims is None or ends is None:
            return None
        count = len(ends.items)
        axes = known_or(sizes, optional_input(node, 3), range(count))
        steps = known_or(sizes, optional_input(node, 4), [1] * count)
        if axes is None or steps is None or not len(axes) == len(steps) == count or min(steps, default=1) < 1:
            return None
        constant = []
        for axis, end in zip(axes, ends.items, strict=True):
            if end.known is not None:
                constant.append(end.known)
            elif -len(dims) <= axis < len(dims) and sizes.is_not_negative(end - dims[axis]):
                constant.append(TO_THE_END)
            else:
                return None
        return Site(node, index=2, constant=tuple(constant))

    def rewrite(self, graph: Graph, site: Site) -> None:
        node = site.node
        if site.values is not None or site.equal is not None:
            output = node.outputs[0]
            graph.remove(node)
            if site.values is not None:
                graph.redirect(output, Constant(output.name, site.values, home=graph))
            elif site.equal is not None:
                graph.redirect(output, site.equal)
            return
        if site.window is not None:
            self._take_window(graph, node, site.window)
            return
        name = "shape" if node.op == "Reshape" else "ends"
        constant = graph.new_constant(f"{node.name or node.op}.{name}", np.array(site.constant, np.int64))
        node.inputs = [constant if i == site.index else tensor for i, tensor in enumerate(node.inputs)]
        if node.op == "Reshape":
            node.attrs.pop("allowzero", None)
        graph.touch(node)
