"""Merge convolutions of one input, their channel concatenation and the convolution that reads it.

    before   y = Conv(Concat<axis=1>(Conv(x, W1), Conv(x, W2), x), V)
    after    y = Conv(x, W)                               or, with a bias map,   y = Add(Conv(x, W), B)

V falls into one piece per branch, V_i: what it makes is the sum of Conv(branch_i, V_i), a sum of chains of one input.
Each chain is exact or not as in ``fuse-conv-chain``, and the sum as in ``fuse-parallel-convs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxcompress.cost import OperatorSpec
from onnxcompress.graph import Graph, Node, is_op
from onnxcompress.linear import ConvOp, Exactness
from onnxcompress.linear.chain import Merged, Plan, plan_sum
from onnxcompress.linear.nodes import conv_spec_at, read_conv, spatial_sizes
from onnxcompress.merging.paths import (
    Path,
    change_in_macs,
    insert_merged,
    kernel_text,
    looks_linear,
    nominal_shape,
    path_specs,
    path_to,
    plan_specs,
    read_path,
    why_not_merge,
)
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True, eq=False)
class Site:
    conv: Node
    concat: Node
    paths: tuple[Path, ...]
    plan: Plan
    merged: Merged
    before: tuple[OperatorSpec, ...]
    after: tuple[OperatorSpec, ...]

    @property
    def replaced(self) -> list[Node]:
        """Nodes that go, readers first."""
        return [self.conv, self.concat, *(node for path in self.paths for node in reversed(path.nodes))]


class FuseConcatIntoConv(RewritePass[Site]):
    name = "fuse-concat-into-conv"
    ops = ("Conv",)
    is_merge = True

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        concat = graph.producer(node.inputs[0])
        if concat is None or not looks_linear(node) or not is_channel_concat(concat, node.inputs[1].shape):
            return None
        paths = [path_to(graph, tensor, concat) for tensor in concat.inputs]
        if len({path.source for path in paths}) > 1 or not any(path.has_conv for path in paths):
            return None
        if not graph.feeds_only(concat.outputs[0], node):
            return Miss(node.name, "the Concat output is read elsewhere")
        second = read_conv(node)
        branches = read_branches(graph, paths)
        if isinstance(second, str) or isinstance(branches, str):
            return Miss(node.name, second if isinstance(second, str) else str(branches))
        site = self.plan(node, concat, paths, branches, second)
        return Miss(node.name, site) if isinstance(site, str) else site

    def plan(
        self, node: Node, concat: Node, paths: list[Path], branches: list[list[ConvOp]], second: ConvOp
    ) -> Site | str:
        chains = split_over(branches, second)
        if isinstance(chains, str):
            return chains
        source = paths[0].source
        plan = plan_sum(chains, spatial_sizes(source, second))
        if isinstance(plan, str):
            return plan
        shape = nominal_shape(source, second.spatial_rank)
        after = plan_specs(plan, shape)
        before = [
            spec for path, ops in zip(paths, branches, strict=True) for spec in path_specs(path.nodes, ops, shape)
        ]
        middle = (shape[0], *output_after(paths, branches, shape))
        parts = [(middle[0], ops[-1].out_channels, *middle[1:]) for ops in branches]
        dtype = second.weight.dtype.name
        before.append(OperatorSpec("Concat", parts[0], attrs=(("axis", 1),), dtype=dtype, live_shapes=tuple(parts[1:])))
        before.append(conv_spec_at(second, middle))
        replaced = [node, concat, *(link for path in paths for link in path.nodes)]
        reason = why_not_merge(self.settings.cost, before, after, replaced)
        if reason is not None:
            return reason
        try:
            merged = plan.merge()
        except OverflowError as error:
            return str(error)
        return Site(node, concat, tuple(paths), plan, merged, tuple(before), tuple(after))

    def rewrite(self, graph: Graph, site: Site) -> None:
        name, output = site.conv.name or "conv", site.conv.outputs[0]
        insert_merged(graph, site.merged, site.paths[0].source, [output], before=site.conv, name=name)
        graph.remove(*site.replaced)

    def exactness(self, site: Site) -> Exactness:
        return site.plan.exactness

    def detail(self, site: Site) -> str:
        convs = sum(node.op == "Conv" for node in site.replaced)
        bias = "" if site.merged.bias_map is None else " with a bias map"
        macs = change_in_macs(site.before, site.after)
        return f"{convs} Conv and a Concat -> 1 Conv {kernel_text(site.merged.conv)}{bias}, {macs}"


def is_channel_concat(node: Node, like: Sequence[int]) -> bool:
    """Whether the node is a Concat along axis 1 of tensors with as many axes as the shape ``like``."""
    return is_op(node, "Concat") and node.attrs.get("axis") in (1, 1 - len(like))


def read_branches(graph: Graph, paths: Sequence[Path]) -> list[list[ConvOp]] | str:
    """The branches of a Concat as convolutions, in its order, or the reason why not."""
    found: dict[Path, list[ConvOp]] = {}
    like: ConvOp | None = None
    for path in sorted(paths, key=lambda path: not path.has_conv):
        ops = read_path(graph, path, like)
        if isinstance(ops, str):
            return ops
        like = like or ops[0]
        found[path] = ops
    return [found[path] for path in paths]


def split_over(branches: Sequence[Sequence[ConvOp]], second: ConvOp) -> list[list[ConvOp]] | str:
    """One chain per branch with the piece of ``second`` that reads it; the bias goes with the first."""
    widths = [ops[-1].out_channels for ops in branches]
    if sum(widths) != second.in_channels:
        return f"the branches give {sum(widths)} channels, the Conv takes {second.in_channels}"
    pieces = np.split(second.dense_weight(), np.cumsum(widths)[:-1], axis=1)
    parts = [
        replace(second, weight=piece, bias=second.bias if i == 0 else None, group=1) for i, piece in enumerate(pieces)
    ]
    return [[*ops, part] for ops, part in zip(branches, parts, strict=True)]


def output_after(paths: Sequence[Path], branches: Sequence[Sequence[ConvOp]], shape: Sequence[int]) -> tuple[int, ...]:
    """Spatial sizes of what the branches give, from those of a branch with operators."""
    for path, ops in zip(paths, branches, strict=True):
        specs = path_specs(path.nodes, ops, shape)
        if specs:
            return specs[-1].output_shape[2:]
    return tuple(shape[1:])
