"""Where a merged pair of convolutions is exact, and the bias that repairs it where only the bias is not.

The second convolution pads the *output* of the first with zeros; the merged one (``linear_conv.compose``) computes the
first there too, on its own padded input. Let t run over the positions outside [0, H1) that some window of the second
reads. Nothing is wrong if there are none. If every tap s1*t + d1*u - P1 of the first falls outside [0, H) for each of
them, it yields its bias alone there: wrong, but a constant, and known.
"""

import enum
from collections.abc import Sequence

import numpy as np

from onnxcompress.linear.conv import ConvOp, Sizes, cast, channel_vector, check_chain, sizes_or_unknown, tap_response


class Exactness(enum.IntEnum):
    """How well one convolution can stand for two, from best to worst."""

    EXACT = 1
    """No window of the second convolution that is computed reaches its padding."""
    EXACT_WITHOUT_BIAS = 2
    """Where one does, the first convolution sees zeros only and has no bias, so it gives the zeros of the padding."""
    EXACT_WITH_BIAS_MAP = 3
    """The same, but with a bias: the merged one is wrong on the border ring, and right with ``bias_map`` instead."""
    APPROXIMATE = 4
    """The first convolution sees data there: no zero-padded convolution equals the pair, the error is in the data."""


def border_class(first: ConvOp, second: ConvOp, spatial: Sizes | None) -> Exactness:
    """How exact ``compose(first, second)`` is on an input of this size.

    Args:
        first: Convolution that reads the input.
        second: Convolution that reads the output of ``first``, and nothing between them.
        spatial: Input size per spatial axis; None stands for every size at which both convolutions are defined.

    Returns:
        The class for generic weights: a better one is only possible by accident of the numbers.

    Raises:
        ValueError: The two do not follow one another, or do not fit the size.
    """
    check_chain(first, second)
    sizes = sizes_or_unknown(first, spatial)
    axes = [_axis_border(first, second, axis, size) for axis, size in enumerate(sizes)]
    if not any(touched for touched, _, _ in axes):
        return Exactness.EXACT
    # A padded position shows data only if it does so along every axis, and is padded along one of them.
    if any(leaks for _, leaks, _ in axes) and all(alive for _, _, alive in axes):
        return Exactness.APPROXIMATE
    if first.bias is None or not first.bias.any():
        return Exactness.EXACT_WITHOUT_BIAS
    return Exactness.EXACT_WITH_BIAS_MAP


def bias_map(first: ConvOp, second: ConvOp, spatial: Sizes) -> np.ndarray:
    """Bias that makes ``compose(first, second)`` exact up to class EXACT_WITH_BIAS_MAP.

    Args:
        first: Convolution that reads the input.
        second: Convolution that reads the output of ``first``.
        spatial: Input size of ``first`` per axis; None is allowed along an axis that ``second`` does not pad.

    Returns:
        (1, O, *out), in place of the merged bias; 1 instead of the output size along an axis of unknown size.

    Raises:
        ValueError: The class is APPROXIMATE, or a size is missing.
    """
    if border_class(first, second, spatial) is Exactness.APPROXIMATE:
        raise ValueError("the error at the border depends on the data: no bias can repair it")
    middle = [None if size is None else first.output_length(axis, size) for axis, size in enumerate(spatial)]
    values = np.zeros(first.out_channels) if first.bias is None else first.bias
    return cast(constant_response(second, values, middle), second.weight.dtype)


def shift_input_bias(conv: ConvOp, shift: np.ndarray, spatial: Sizes | None) -> np.ndarray:
    """Bias of conv(x + shift) written as a convolution of x: the constant meets every tap but those on the padding.

    Args:
        conv: The convolution with the weights that the shifted tensor meets (before ``scale_input``, if x is scaled).
        shift: (I,), added to its input.
        spatial: Input size per axis; needed along padded axes unless ``shift`` is zero.

    Returns:
        (O,) where that is exact, with no padding read or nothing shifted; else (1, O, *out) as from ``bias_map``.

    Raises:
        ValueError: A size that the map depends on is unknown.
    """
    sizes = sizes_or_unknown(conv, spatial)
    vector = channel_vector(shift, conv.in_channels)
    ones, zeros = (1,) * conv.spatial_rank, (0,) * conv.spatial_rank
    unit = np.ones((conv.in_channels, 1, *ones), conv.weight.dtype)
    adder = ConvOp(unit, vector, ones, ones, zeros, zeros, conv.in_channels)
    if border_class(adder, conv, sizes) is Exactness.EXACT_WITH_BIAS_MAP:
        return cast(constant_response(conv, vector, sizes), conv.weight.dtype)
    inner = tap_response(conv, vector).reshape(conv.out_channels, -1).sum(1)
    return cast(inner + channel_vector(0.0 if conv.bias is None else conv.bias, conv.out_channels), conv.weight.dtype)


def constant_response(conv: ConvOp, values: np.ndarray, spatial: Sizes) -> np.ndarray:
    """Output (1, O, *out), float64, bias included, for an input that is ``values`` (I,) at every position."""
    # (O, *k); each turn takes the first tap axis off and puts an output axis last.
    field: np.ndarray = tap_response(conv, values)
    for axis, size in enumerate(spatial):
        if size is not None:
            positions = _positions(conv, axis, conv.output_length(axis, size))
            inside = ((positions >= 0) & (positions < size)).astype(np.float64)
        elif conv.pads_begin[axis] or conv.pads_end[axis]:
            raise ValueError(f"spatial axis {axis} is padded, so the bias depends on its size, which is unknown")
        else:
            inside = np.ones((1, conv.kernel[axis]))
        field = np.tensordot(field, inside, axes=(1, 1))
    bias = channel_vector(0.0 if conv.bias is None else conv.bias, conv.out_channels)
    return np.expand_dims(field + bias.reshape(-1, *(1,) * conv.spatial_rank), 0)


def _positions(conv: ConvOp, axis: int, outputs: int) -> np.ndarray:
    """Input coordinate of each tap of each output, (outputs, k); outside [0, H) lies the padding."""
    starts = np.arange(outputs) * conv.strides[axis] - conv.pads_begin[axis]
    return starts[:, None] + np.arange(conv.kernel[axis]) * conv.dilations[axis]


def _axis_border(first: ConvOp, second: ConvOp, axis: int, size: int | None) -> tuple[bool, bool, bool]:
    """Whether along one axis a window of ``second`` touches padding, touches padding where a tap of ``first`` sees
    data, and touches anything where a tap of ``first`` sees data; for an unknown size, whether some size does so.
    """
    results = []
    for length in _telling_sizes(first, second, axis, size):
        middle = first.output_length(axis, length)
        touched = np.unique(_positions(second, axis, second.output_length(axis, middle)))
        padded = (touched < 0) | (touched >= middle)
        offsets = np.arange(first.kernel[axis]) * first.dilations[axis] - first.pads_begin[axis]
        read = touched[:, None] * first.strides[axis] + offsets
        alive = ((read >= 0) & (read < length)).any(axis=1)
        results.append((bool(padded.any()), bool((padded & alive).any()), bool(alive.any())))
    touches, leaks, lives = zip(*results, strict=True)
    return any(touches), any(leaks), any(lives)


def _telling_sizes(first: ConvOp, second: ConvOp, axis: int, size: int | None) -> Sequence[int]:
    """Sizes that decide for ``size``; for None, those that decide for all.

    From ``large`` on, the two ends do not see each other, and only the remainder of the size by s1*s2 matters. A
    smaller size of the same remainder touches fewer padded positions, and sees less data there: it is never worse.
    """
    stride = first.strides[axis]
    period = stride * second.strides[axis]
    span = first.reach[axis] + first.pads_begin[axis] + first.pads_end[axis]
    span += stride * (second.reach[axis] + second.pads_begin[axis] + second.pads_end[axis])
    large = span + period + 1
    if size is None:
        return range(large, large + period)
    return [size if size < large else large + (size - large) % period]
