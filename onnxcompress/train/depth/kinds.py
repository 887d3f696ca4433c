"""What kind of block a branch is, by its linear operators in order; and what its pruned flow is by default.

inverted-residual   1x1 -> kxk depthwise -> 1x1, or without the first
convnext            kxk depthwise -> normalization -> two 1x1, as convolutions or as matrices on the last axis
ffn                 two matrices, or two 1x1, with or without a normalization in front
basic               two kxk;  basic-3x3: the same, the second one kept to its centre
bottleneck          1x1 -> kxk -> 1x1
run                 any other convolutions in a row
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onnxcompress.graph import is_constant, is_op, rank, static_shape
from onnxcompress.linear import ConvOp
from onnxcompress.linear.nodes import spatial_sizes
from onnxcompress.train.depth.steps import Branch, Step

Kind = Literal["inverted-residual", "convnext", "ffn", "basic", "basic-3x3", "bottleneck", "run", "residual"]
KINDS: tuple[Kind, ...] = (
    "inverted-residual",
    "convnext",
    "ffn",
    "basic",
    "basic-3x3",
    "bottleneck",
    "run",
    "residual",
)
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclass(frozen=True)
class Flow:
    """The choices in a pruned flow.

    Args:
        activation: What an inner activation becomes: nothing, or a BatchNormalization.
        end: The activation at the end: "own" is the last one that the block had inside; none where one follows anyway.
    """

    activation: Literal["nothing", "batchnorm"] = "nothing"
    end: Literal["own", "relu", "gelu", "none"] = "own"


# Measured on Fashion-MNIST, fitted and trained for 170 steps, accuracy and speed-up of the whole network: MobileNetV2,
# 7 of 8 blocks, own .875 x1.47, ReLU .876 x1.54, none .821 x1.53; ConvNeXt, 4 of 6 blocks, own .882, none .885, and
# with all 6 x3.11 and x3.57.
FLOWS: dict[Kind, Flow] = {
    "inverted-residual": Flow(end="relu"),
    "convnext": Flow(end="none"),
    "ffn": Flow(end="none"),  # with an activation the skip could not join the matrix
    "basic": Flow(),
    "basic-3x3": Flow(),
    "bottleneck": Flow(),
    "run": Flow(end="relu"),
    "residual": Flow(end="none"),
}


def is_pointwise(step: Step) -> bool:
    """Whether a linear step is one dense matrix at every position."""
    if step.kind == "matrix":
        return True
    conv = step.conv
    assert conv is not None
    return math.prod(conv.kernel) == 1 and conv.group == 1 and not any(conv.pads)


def is_depthwise(step: Step) -> bool:
    """Whether a step is a convolution of each channel by itself."""
    conv = step.conv
    return conv is not None and conv.group == conv.in_channels == conv.out_channels and math.prod(conv.kernel) > 1


def kind_of(branch: Branch) -> Kind | str:
    """The kind, or the reason why the branch is of none."""
    linear = branch.linear
    if len(linear) < 2:
        return f"{len(linear)} linear operators lie in the branch, at least 2 are needed"
    if not any(step.kind in ("activation", "norm") for step in branch.steps):
        return "nothing stands between its linear operators: they merge as they are"
    reason = why_not_layout(branch) or why_not_norms(branch)
    if reason:
        return reason
    pointwise = [is_pointwise(step) for step in linear]
    normed = any(step.kind == "norm" for step in branch.steps)
    if all(pointwise):
        return "ffn"
    if is_depthwise(linear[0]) and all(pointwise[1:]):
        return "convnext" if normed and len(linear) > 2 else "inverted-residual"
    if any(step.kind == "matrix" for step in linear):
        return "matrices and convolutions are mixed in no form that is known"
    if pointwise == [True, False, True]:
        return "inverted-residual" if is_depthwise(linear[1]) else "bottleneck"
    large = [step.conv is not None and math.prod(step.conv.kernel) > 1 for step in linear]
    return "basic" if large == [True, True] and not any(map(is_depthwise, linear)) else "run"


def why_not_layout(branch: Branch) -> str:
    """The reason why the axes of the branch are not known to stay, or to go to the end and come back; else empty."""
    has_conv = any(step.kind == "conv" for step in branch.steps)
    moved, last = False, not has_conv  # whether the data is transposed, and whether the channels are on the last axis
    for step in branch.steps:
        node = step.nodes[0]
        if step.kind == "transpose":
            if list(node.attrs.get("perm") or []) != (TO_FIRST if moved else TO_LAST) or not has_conv:
                return f"Transpose {node.name!r} moves the channels neither to the last axis nor back"
            moved = last = not moved
        elif step.kind == "conv" and last:
            return f"Conv {node.name!r} works on transposed data"
        elif step.kind == "matrix" and not last:
            return f"{node.op} {node.name!r} works along the width"
        elif step.kind == "scale" and (reason := why_not_channels(step, last)):
            return reason
    return "the channels stay on the last axis" if moved else ""


def why_not_channels(step: Step, last: bool) -> str:
    """The reason why a scale or a shift is not one for each channel; else empty."""
    node, axes = step.nodes[0], rank(step.source)
    if is_op(node, "BatchNormalization"):
        return f"BatchNormalization {node.name!r} works on transposed data" if last and axes != 2 else ""
    for tensor in node.inputs:
        shape = static_shape(tensor) if is_constant(tensor) else ()
        if shape is None or math.prod(shape) == 1:
            continue
        if axes is None or len(shape) > axes:
            return f"the constant of {node.op} {node.name!r} may add axes"
        aligned = (1,) * (axes - len(shape)) + shape
        if aligned[axes - 1 if last else 1] != math.prod(shape):
            return f"the constant of {node.op} {node.name!r} has shape {list(shape)}, not one value for each channel"
    return ""


def why_not_norms(branch: Branch) -> str:
    """The reason why a normalization cannot become one with fixed statistics per channel; else empty."""
    last = any(step.kind == "matrix" for step in branch.steps)
    for step in branch.steps:
        if step.kind == "transpose":
            last = list(step.nodes[0].attrs["perm"]) == TO_LAST
        elif step.kind == "norm" and (step.axis != 1) != last and len(step.source.shape or ()) != 2:
            return f"{step.what} {step.nodes[-1].name!r} normalizes another axis than that of the channels"
    return ""


# -- padding ---------------------------------------------------------------------------------------------------------

Pads = tuple[tuple[int, ...], tuple[int, ...]]  # begin, end


def rings(convs: Sequence[ConvOp]) -> list[Pads]:
    """By how much the input of each convolution grows when all padding moves to the first: R_i = P_i + s_i R_(i+1).

    The first entry is what the first convolution pads then, P_1 + s_1 R_2.
    """
    grown: list[Pads] = []
    begin = end = (0,) * convs[-1].spatial_rank
    for conv in reversed(convs):
        begin = tuple(p + s * r for p, s, r in zip(conv.pads_begin, conv.strides, begin, strict=True))
        end = tuple(p + s * r for p, s, r in zip(conv.pads_end, conv.strides, end, strict=True))
        grown.insert(0, (begin, end))
    return grown


def why_not_rings(branch: Branch) -> str:
    """The reason why padding cannot move to the first convolution: a size that is not known; else empty."""
    convs = [step for step in branch.linear if step.conv is not None]
    if not convs:
        return ""
    grown = rings([step.conv for step in convs if step.conv is not None])
    for step, (begin, end) in list(zip(convs, grown, strict=True))[1:]:
        assert step.conv is not None
        if any(begin + end) and (norm := _norm_over_positions(branch, convs[0], step)) is not None:
            return (
                f"padding of Conv {step.nodes[0].name!r} has to move to the first Conv, and {norm.what} "
                f"{norm.nodes[-1].name!r} would take it into its mean"
            )
        if any(begin + end) and None in spatial_sizes(step.source, step.conv):
            return (
                f"padding of Conv {step.nodes[0].name!r} has to move to the first Conv, and the size of "
                f"{step.source.name!r} is not known: fix the input size"
            )
    return ""


def _norm_over_positions(branch: Branch, first: Step, last: Step) -> Step | None:
    """A normalization between two steps whose statistics are those of all positions."""
    between = branch.steps[branch.steps.index(first) : branch.steps.index(last)]
    found = (s for s in between if s.what in ("GroupNormalization", "InstanceNormalization") and s.kind == "norm")
    return next(found, None)


def why_not_capped(branch: Branch) -> str:
    """The reason why the second convolution of a basic block cannot be kept to its centre; else empty."""
    if any(step.kind == "transpose" for step in branch.steps):
        return "the data is transposed on the way"
    conv = branch.linear[1].conv
    assert conv is not None
    for kernel, dilation, begin, end in zip(conv.kernel, conv.dilations, conv.pads_begin, conv.pads_end, strict=True):
        half = dilation * (kernel - 1) // 2
        if kernel % 2 == 0 or begin != half or end != half:
            return f"Conv {branch.linear[1].nodes[0].name!r} has no tap at the position of its output"
    return ""
