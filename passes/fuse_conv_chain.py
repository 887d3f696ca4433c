"""Merge convolutions in a row, with no activation between them, where fewer and larger ones are cheaper.

    before   y = Conv(Conv(Conv(x, W1, b1), W2, b2), W3, b3)
    after    y = Conv(x, W, b)                    or, with a bias map,   y = Add(Conv(x, W), B)

Where a later Conv pads, its padding stands for zeros and the merged Conv sees more: exact if the Conv before sees zeros
only there, and with a constant map in place of the bias if it has one (see ``linear_chain``). Anything else is left,
unless approximate rewrites are allowed: then the error at the border is that of the whole model, and it is measured.

What to merge is decided per chain, as pairs mislead: 1x1 -> depthwise 3x3 costs 5.8 times as much merged, and with the
1x1 after it 0.6 times. A dynamic program over the cut points finds the fastest partition that does not grow the file.
An AveragePool with a fixed divisor takes part as the depthwise convolution that it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.graph import Graph, Node, is_op
from onnxcompress.linear import Exactness
from onnxcompress.merging.conv_chains import Segment, chain_from, readable_runs, segments_that_pay
from onnxcompress.merging.paths import change_in_macs, insert_merged, kernel_text
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True)
class Site:
    segments: tuple[Segment, ...]


class FuseConvChain(RewritePass[Site]):
    name = "fuse-conv-chain"
    ops = ("Conv", "AveragePool")
    is_merge = True

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        nodes = chain_from(graph, node)
        if len(nodes) == 1:
            return why_not_longer(graph, node)
        found = Miss(node.name, "the numbers of a Conv in the chain are not known or not finite") if nodes else None
        for run in readable_runs(nodes):
            segments = segments_that_pay(graph, run, self.settings.cost)
            if isinstance(segments, str) and self.settings.approximate.left > 0:
                segments = segments_that_pay(graph, run, self.settings.cost, approximate=True)
            if not isinstance(segments, str):
                return Site(tuple(segments))
            found = Miss(run[0].name, segments)
        return found

    def rewrite(self, graph: Graph, site: Site) -> None:
        self.settings.approximate.left -= self.exactness(site) is Exactness.APPROXIMATE
        for segment in site.segments:
            last = segment.nodes[-1]
            name, source = last.name or "conv", segment.nodes[0].inputs[0]
            insert_merged(graph, segment.merged, source, [last.outputs[0]], before=last, name=name)
            graph.remove(*reversed(segment.nodes))

    def exactness(self, site: Site) -> Exactness:
        return max(segment.plan.exactness for segment in site.segments)

    def detail(self, site: Site) -> str:
        parts = []
        for segment in site.segments:
            kinds = [node.op for node in segment.nodes]
            counts = " + ".join(f"{kinds.count(op)} {op}" for op in dict.fromkeys(kinds))
            bias = "" if segment.merged.bias_map is None else " with a bias map"
            macs = change_in_macs(segment.before, segment.after)
            parts.append(f"{counts} -> 1 Conv {kernel_text(segment.merged.conv)}{bias}, {macs}")
        return "; ".join(parts)


def why_not_longer(graph: Graph, node: Node) -> Miss | None:
    """A Miss where the output of a lone Conv is read by a Conv, and yet no chain goes on there."""
    readers = [reader for reader in node.outputs[0].outputs if is_op(reader, "Conv")]
    if not readers or not is_op(node, "Conv"):
        return None
    if graph.only_reader(node.outputs[0]) is None:
        return Miss(node.name, "the Conv output is read elsewhere")
    return Miss(node.name, "the Conv after it has a weight or a bias that is not a constant")
