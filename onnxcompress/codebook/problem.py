"""One layer to be quantized: its weight and rows, and how good a quantized weight is on them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxcompress.codebook.codebook import Choice, Statistics
from onnxcompress.codebook.sharing import SharedCodebook
from onnxcompress.codebook.target import OutputError, corrected_bias, covariance, second_moment


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """What all stages of quantizing one layer share.

    Attributes:
        weight: (outputs, D) of the float net.
        bias: (outputs,) of the float net or None.
        statistics: Moments of the rows to fit to; None for no data.
        held_out: Moments of the rows that decide; None for none.
        choice: The form that is asked for.
        seed: Of the codebook's start.
        correct_bias: Whether the bias takes up the means.
        shared: The codebook, where the form shares one.
    """

    weight: np.ndarray
    bias: np.ndarray | None
    statistics: Statistics | None
    held_out: Statistics | None
    choice: Choice
    seed: int
    correct_bias: bool
    shared: SharedCodebook | None = None

    @property
    def groups(self) -> int:
        return 1 if self.statistics is None else len(self.statistics.gram)

    def moments(self) -> np.ndarray:
        """(groups, D, D): what the error is measured under."""
        if self.statistics is None:
            return np.eye(self.weight.shape[1])[None]
        return covariance(self.statistics) if self.correct_bias else second_moment(self.statistics)

    def stored_bias(self, decoded: np.ndarray) -> np.ndarray | None:
        if self.statistics is None or not self.correct_bias:
            return None if self.bias is None else self.bias.astype(np.float32)
        return corrected_bias(self.weight, self.bias, decoded, self.statistics)

    @cached_property
    def _fitted_error(self) -> OutputError:
        assert self.statistics is not None
        return OutputError(self.weight, self.bias, self.statistics)

    @cached_property
    def _held_out_error(self) -> OutputError:
        assert self.held_out is not None
        return OutputError(self.weight, self.bias, self.held_out)

    def fitted_error(self, decoded: np.ndarray) -> float:
        """Relative output error on the fitted rows; of the weight itself where there are none."""
        if self.statistics is not None:
            return self._fitted_error(decoded, self.stored_bias(decoded))
        size = float(np.linalg.norm(self.weight.astype(np.float64)))
        lost = float(np.linalg.norm(self.weight.astype(np.float64) - decoded))
        return lost / size if size > 0 else (0.0 if lost == 0 else float("inf"))

    def held_out_error(self, decoded: np.ndarray) -> float | None:
        """Relative output error on the held-out rows, if there are any."""
        return None if self.held_out is None else self._held_out_error(decoded, self.stored_bias(decoded))

    def judged(self, decoded: np.ndarray) -> float:
        """The error that decisions are made by: held-out where there is any."""
        held_out = self.held_out_error(decoded)
        return self.fitted_error(decoded) if held_out is None else held_out
