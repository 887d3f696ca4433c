"""A layer in int8 or float16, aimed at the float net's output like one with a codebook.

Rounding costs such a layer next to nothing; what it gains is that it makes up for what the layers before it lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxcompress.codebook.codebook import Statistics
from onnxcompress.codebook.layer import TARGET_DAMPINGS, rule_damping
from onnxcompress.codebook.narrow import Float16Layer, Int8Layer, to_float16, to_int8
from onnxcompress.codebook.target import corrected_bias, float_target, relative_error


@dataclass(frozen=True, eq=False)
class NarrowLayer:
    """A layer in a plain form.

    Attributes:
        stored: What goes into the file.
        error: Relative output error on the rows it was aimed with; on the weight itself where there were none.
        held_out_error: The same on other rows.
    """

    stored: Int8Layer | Float16Layer
    error: float
    held_out_error: float | None


def narrow_layer(
    weight: np.ndarray,
    bias: np.ndarray | None,
    statistics: Statistics | None,
    form: Literal["int8", "float16"],
    *,
    held_out: Statistics | None = None,
    correct_bias: bool = True,
    aim: bool = True,
) -> NarrowLayer:
    """Store a layer in int8 or float16.

    Args:
        weight: (outputs, D) float32.
        bias: (outputs,) or None.
        statistics: Moments of its input in both nets; None rounds the weight.
        form: The type.
        held_out: Moments of other rows, to choose by.
        correct_bias: Give a bias that keeps the mean output.
        aim: Aim at the float net's output; otherwise the weight is rounded as it is.

    Returns:
        The layer.
    """
    judge = held_out or statistics
    best: NarrowLayer | None = None
    least = np.inf
    for target in _targets(weight, statistics, held_out is not None, correct_bias) if aim else [weight]:
        made = to_int8(target) if form == "int8" else to_float16(target)
        decoded = made.decode()
        shifted = bias
        if statistics is not None and correct_bias:
            shifted = corrected_bias(weight, bias, decoded, statistics)
        if statistics is None or judge is None:
            size = float(np.linalg.norm(weight.astype(np.float64)))
            return NarrowLayer(made, float(np.linalg.norm(weight - decoded)) / size if size > 0 else 0.0, None)
        reached = relative_error(weight, bias, decoded, shifted, judge)
        if best is None or reached < least:
            least = reached
            given = shifted if correct_bias else None
            stored = (
                Int8Layer(made.values, made.scales, given)
                if isinstance(made, Int8Layer)
                else Float16Layer(made.values, given)
            )
            fitted = relative_error(weight, bias, decoded, shifted, statistics)
            best = NarrowLayer(stored, fitted, None if held_out is None else reached)
    assert best is not None, "there is always the weight itself"
    return best


def _targets(weight: np.ndarray, statistics: Statistics | None, choose: bool, correct_bias: bool) -> list[np.ndarray]:
    """The weight itself, and what would bring the output nearer to the float net's."""
    if statistics is None or statistics.cross is None:
        return [weight]
    dampings = TARGET_DAMPINGS if choose else (rule_damping(statistics.rows, weight.shape[1]),)
    aimed = [float_target(weight, statistics, damping=ridge, centred=correct_bias) for ridge in dampings]
    return [weight, *(target.astype(np.float32) for target in aimed)]
