"""Compute convolutions of one input, alike but for their weights, as one.

    before   y = Concat<axis=1>(Relu(Conv(x, W1)), Relu(Conv(x, W2)))
    after    y = Relu(Conv(x, [W1; W2]))
    before   y1 = Conv(x, W1)   y2 = Conv(x, W2)
    after    y1, y2 = Split<axis=1>(Conv(x, [W1; W2]))

Where a Concat puts the channels side by side again, it goes. Else a Split takes them apart, which costs more than it
gains unless the parts have few channels: in nets of 1x1 -> Relu -> 1x1, onnxruntime 1.31 ran 0.78 to 1.05 times as fast
with it where the parts had 16 channels and more, and 1.75 times as fast with 4.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.cost import OperatorSpec, known_shape
from onnxcompress.graph import Graph, Node, Tensor, is_op
from onnxcompress.linear import ConvOp, concat_channels
from onnxcompress.linear.nodes import conv_spec, explicit_pads, insert_conv, read_conv
from onnxcompress.merging.paths import kernel_text, looks_linear, why_not_merge
from onnxcompress.passes.fuse_concat_into_conv import is_channel_concat
from onnxcompress.rewrite import Miss, RewritePass

# Elementwise, without further inputs. The first five, and Clip, onnxruntime computes within the Conv before.
ACTIVATIONS = (
    "Relu",
    "LeakyRelu",
    "Sigmoid",
    "Tanh",
    "HardSigmoid",
    "HardSwish",
    "Elu",
    "Selu",
    "Softplus",
    "Softsign",
)
FUSED_ACTIVATIONS = (*ACTIVATIONS[:5], "Clip")


@dataclass(frozen=True, eq=False)
class Member:
    """A Conv, an activation that is its only reader or None, and the tensor that the last of both makes."""

    conv: Node
    activation: Node | None
    output: Tensor


@dataclass(frozen=True, eq=False)
class Site:
    """The outputs of the members are inputs ``start`` and following of ``concat``; without one a Split makes them."""

    members: tuple[Member, ...]
    merged: ConvOp
    widths: tuple[int, ...]
    concat: Node | None
    start: int


class FuseSiblingConvs(RewritePass[Site]):
    name = "fuse-sibling-convs"
    ops = ("Conv",)
    is_merge = True

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        siblings = siblings_of(graph, node)
        if len(siblings) < 2 or siblings[0] is not node:
            return None
        convs: dict[Node, ConvOp] = {}
        for sibling in siblings:
            conv = read_conv(sibling)
            if isinstance(conv, str):
                return Miss(sibling.name, conv)
            convs[sibling] = conv
        plain = [Member(sibling, None, sibling.outputs[0]) for sibling in siblings]
        for members in (plain, [with_activation(graph, member) for member in plain]):
            site = longest_run(graph, members, convs)
            if site is not None and self.why_not(site, convs) is None:
                return site
        site = make_site(plain, convs, None, 0)
        reason = self.why_not(site, convs)
        return site if reason is None else Miss(node.name, f"with a Split {reason}")

    def why_not(self, site: Site, convs: dict[Node, ConvOp]) -> str | None:
        source = site.members[0].conv.inputs[0]
        before = [conv_spec(convs[member.conv], source) for member in site.members]
        after = [conv_spec(site.merged, source)]
        merged, dtype = after[0].output_shape, after[0].dtype
        if site.concat is None:
            attrs = (("axis", 1), ("split", site.widths))
            after.append(OperatorSpec("Split", merged, attrs=attrs, dtype=dtype))
            for member, spec in zip(site.members, before, strict=True):
                if any(is_op(reader, *FUSED_ACTIVATIONS) for reader in member.output.outputs):
                    after.append(OperatorSpec("Relu", spec.output_shape, dtype=dtype))
        else:
            made = dict(zip((member.output for member in site.members), before, strict=True))
            shapes = [
                made[tensor].output_shape if tensor in made else known_shape(tensor)[0] or merged
                for tensor in site.concat.inputs
            ]
            stop = site.start + len(site.members)
            before += concat_specs(shapes, dtype)
            after += concat_specs([*shapes[: site.start], merged, *shapes[stop:]], dtype)
        return why_not_merge(self.settings.cost, before, after, [member.conv for member in site.members])

    def rewrite(self, graph: Graph, site: Site) -> None:
        first, concat = site.members[0], site.concat
        before = first.conv if concat is None else concat
        name = first.conv.name or "conv"
        conv = insert_conv(graph, site.merged, first.conv.inputs[0], None, before=before, name=name)
        value = conv.outputs[0]
        value.shape = with_channels(first.conv.outputs[0].shape, sum(site.widths))
        if concat is None:
            insert_split(graph, value, site, before=before)
        else:
            whole = len(concat.inputs) == len(site.members)
            if first.activation is not None:
                made = graph.insert(
                    first.activation.op,
                    [value],
                    [concat.outputs[0]] if whole else None,
                    dict(first.activation.attrs),
                    before=before,
                    name=first.activation.name,
                )
                value = made.outputs[0]
            stop = site.start + len(site.members)
            if not whole:
                concat.inputs = [*concat.inputs[: site.start], value, *concat.inputs[stop:]]
                graph.touch(concat)
            elif first.activation is None:
                conv.outputs = [concat.outputs[0]]
            if whole:
                graph.remove(concat)
        for member in site.members:
            graph.remove(*([member.activation] if member.activation is not None else []), member.conv)

    def detail(self, site: Site) -> str:
        kind = f"{len(site.members)} Conv {kernel_text(site.merged)} of one input -> 1 Conv"
        return f"{kind} and a Split" if site.concat is None else f"{kind}, side by side in a Concat"


def siblings_of(graph: Graph, node: Node) -> list[Node]:
    """Conv nodes that read what ``node`` reads, as it does; by form alone, in the order of the readers."""
    key = geometry(node)
    if key is None:
        return []
    source = node.inputs[0]
    readers = [reader for reader in source.outputs if reader.graph is graph and is_op(reader, "Conv")]
    return [reader for reader in readers if reader.inputs[0] is source and geometry(reader) == key]


def geometry(node: Node) -> Hashable | None:
    """What siblings have in common; None where the node cannot be one."""
    if not looks_linear(node) or node.attrs.get("group", 1) != 1:
        return None
    weight = node.inputs[1]
    kernel = tuple(weight.shape[2:])
    pads = explicit_pads(node, kernel)
    if pads is None:
        return None
    ones = [1] * len(kernel)
    steps = [tuple(node.attrs.get(name) or ones) for name in ("strides", "dilations")]
    return np.dtype(weight.dtype), kernel, tuple(pads), *steps


def with_activation(graph: Graph, member: Member) -> Member:
    """The member with the activation that alone reads its Conv, if there is one."""
    reader = graph.only_reader(member.output)
    if reader is None or not is_op(reader, *ACTIVATIONS):
        return member
    return Member(member.conv, reader, reader.outputs[0])


def longest_run(graph: Graph, members: Sequence[Member], convs: dict[Node, ConvOp]) -> Site | None:
    """The longest run of members that one Concat along the channels holds, all with the same activation or none."""
    made = {member.output: member for member in members}
    best: tuple[list[Member], Node, int] | None = None
    for concat in dict.fromkeys(graph.only_reader(tensor) for tensor in made):
        if concat is None or not is_channel_concat(concat, convs[members[0].conv].weight.shape):
            continue
        run: list[Member] = []
        for index, tensor in enumerate(concat.inputs):
            member = made.get(tensor)
            if member is None or not graph.feeds_only(tensor, concat):
                run = []
                continue
            if run and activation_key(run[0]) != activation_key(member):
                run = []
            run.append(member)
            if len(run) > max(1, len(best[0]) if best else 0):
                best = (list(run), concat, index + 1 - len(run))
    return make_site(best[0], convs, best[1], best[2]) if best else None


def activation_key(member: Member) -> Hashable:
    node = member.activation
    return None if node is None else (node.op, tuple(sorted((k, str(v)) for k, v in node.attrs.items())))


def make_site(members: Sequence[Member], convs: dict[Node, ConvOp], concat: Node | None, start: int) -> Site:
    ops = [convs[member.conv] for member in members]
    return Site(tuple(members), concat_channels(ops), tuple(op.out_channels for op in ops), concat, start)


def concat_specs(shapes: Sequence[tuple[int, ...]], dtype: str) -> list[OperatorSpec]:
    """A Concat of these shapes along axis 1; nothing for one alone."""
    if len(shapes) < 2:
        return []
    return [OperatorSpec("Concat", shapes[0], attrs=(("axis", 1),), dtype=dtype, live_shapes=tuple(shapes[1:]))]


def with_channels(shape: list[int | str | None] | None, channels: int) -> list[int | str | None] | None:
    """The shape with another number of channels."""
    return None if shape is None else [*shape[:1], channels, *shape[2:]]


def insert_split(graph: Graph, tensor: Tensor, site: Site, *, before: Node) -> None:
    """Make the Split that gives the outputs of the members, in the form of the file's opset."""
    name = f"{before.name or 'conv'}.split"
    inputs, attrs = [tensor], {"axis": 1}
    if graph.opset < 13:
        attrs["split"] = list(site.widths)  # type: ignore[assignment]
    else:
        inputs.append(graph.new_constant(name, np.array(site.widths, np.int64)))
    graph.insert("Split", inputs, [member.output for member in site.members], attrs, before=before, name=name)
