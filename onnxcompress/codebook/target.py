"""Where a layer's weight should go: towards the output of the float net, on the input that the quantized net gives.

    covariances   C = E[x_q x_q'] - m_q m_q',    X = E[x_q x_f'] - m_q m_f'
    target        W_t = W + (W (X - C)' + K') (C + lambda I)^-1
    bias          b' = b + W m_f - W_q m_q + E[c]

Where the output is added to a tensor s (a residual connection), c = s_f - s_q is what the quantized net lost on that
path, and K = E[x_q c'] - m_q E[c]' : the layer makes up for it as far as its input tells it. Elsewhere both are 0.
W_t is the ridge regression of the float output on x_q, pulled towards W instead of 0. With that bias the output error
has mean zero, so that what is left to minimize is  tr((W_t - W_q) C (W_t - W_q)') : the covariance, not the second
moment.

The regression is what few photographs teach too well. On opennsfw at 19x with 48 fitted, the last stage (D up to 2,304,
2,352 rows) takes the feature error to .13 on these and to .30 on others; with C and W alone to .27 and .35, with 150
photographs fitted in that stage to .19 and .28.
"""

import numpy as np

from onnxcompress.codebook.codebook import Skip, Statistics


def by_group(weight: np.ndarray, groups: int) -> np.ndarray:
    """(outputs, D) as (groups, outputs / group, D)."""
    outputs, length = weight.shape
    if outputs % groups:
        raise ValueError(f"{outputs} outputs cannot be split into {groups} groups")
    return weight.reshape(groups, outputs // groups, length)


def covariance(statistics: Statistics) -> np.ndarray:
    """(groups, D, D) float64: covariance of x_q, symmetric."""
    centred = statistics.gram / statistics.rows - statistics.mean[:, :, None] * statistics.mean[:, None, :]
    return np.asarray((centred + centred.transpose(0, 2, 1)) / 2)


def second_moment(statistics: Statistics) -> np.ndarray:
    """(groups, D, D) float64: E[x_q x_q'], symmetric."""
    return np.asarray((statistics.gram + statistics.gram.transpose(0, 2, 1)) / (2 * statistics.rows))


def skip_moment(statistics: Statistics, *, centred: bool = True) -> np.ndarray:
    """(groups, D, outputs / group) float64: E[x_q c'], or the covariance of the two."""
    skip = statistics.skip
    assert skip is not None, "the caller has looked"
    moment = skip.cross / statistics.rows
    return moment - statistics.mean[:, :, None] * skip.mean[:, None, :] if centred else moment


def float_target(weight: np.ndarray, statistics: Statistics, *, damping: float, centred: bool = True) -> np.ndarray:
    """The weight that comes nearest to the float output on the quantized net's input.

    Args:
        weight: (outputs, D).
        statistics: Moments of both inputs.
        damping: lambda as a part of the mean diagonal of C.
        centred: The bias takes the means up.

    Returns:
        (outputs, D) float64; ``weight`` itself where the statistics have no cross term.
    """
    weight = weight.astype(np.float64)
    if statistics.cross is None or statistics.float_mean is None:
        return weight
    groups, length = statistics.mean.shape
    own = covariance(statistics) if centred else second_moment(statistics)
    cross = statistics.cross / statistics.rows
    if centred:
        cross = cross - statistics.mean[:, :, None] * statistics.float_mean[:, None, :]
    mean_diagonal = np.einsum("gdd->g", own) / length
    ridge = np.maximum(damping * mean_diagonal, np.finfo(np.float64).tiny)
    rows = by_group(weight, groups)
    wanted = (cross - own) @ rows.transpose(0, 2, 1)  # (groups, D, outputs / group)
    if statistics.skip is not None:
        wanted = wanted + skip_moment(statistics, centred=centred)
    shift = np.linalg.solve(own + ridge[:, None, None] * np.eye(length), wanted)
    return np.asarray((rows + shift.transpose(0, 2, 1)).reshape(weight.shape))


def corrected_bias(
    weight: np.ndarray, bias: np.ndarray | None, decoded: np.ndarray, statistics: Statistics
) -> np.ndarray:
    """(outputs,) float32: the bias that gives the quantized layer the float layer's mean output."""
    groups = len(statistics.mean)
    float_mean = statistics.mean if statistics.float_mean is None else statistics.float_mean
    wanted = np.einsum("god,gd->go", by_group(weight.astype(np.float64), groups), float_mean)
    given = np.einsum("god,gd->go", by_group(decoded.astype(np.float64), groups), statistics.mean)
    shift = (wanted - given).reshape(-1)
    if statistics.skip is not None:
        shift = shift + statistics.skip.mean.reshape(-1)
    return np.asarray(shift if bias is None else bias.astype(np.float64) + shift, np.float32)


class OutputError:
    """||Y_f - Y_q||_F / ||Y_f - mean(Y_f)||_F over all rows and outputs of a layer, from the moments alone.

    Where the output is added to a tensor, the numerator is that of the sum, ||Y_f + S_f - Y_q - S_q||_F.

    The numerator keeps a wrong mean in; the denominator is the float output's deviation from its own mean, so that an
    error of 1 says: as bad as a constant. An output that is constant has infinite error unless it is met exactly.

    With d = W - W_q and centred moments,  Y_f - Y_q = W (x_f - x_q) + d x_q  has the energy
    tr(d C d') + 2 tr(d (X - C) W') + tr(W (F - X - X' + C) W') : taken apart around x_q, near which x_f is, it cancels
    less than around 0. All that does not hold W_q is computed once.

    Args:
        weight: (outputs, D) of the float net.
        bias: (outputs,) of the float net or None.
        statistics: Moments of the inputs of both.
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None, statistics: Statistics) -> None:
        float_mean = statistics.mean if statistics.float_mean is None else statistics.float_mean
        self._mean = statistics.mean
        self._own = covariance(statistics)
        self._weight = by_group(weight.astype(np.float64), len(self._mean))
        self._mean_output = np.einsum("god,gd->go", self._weight, float_mean).reshape(-1)
        if bias is not None:
            self._mean_output = self._mean_output + bias
        self._mixed: np.ndarray | None = None
        self._moved = 0.0
        if statistics.cross is None or statistics.float_gram is None:
            self._spread = energy(self._weight, self._own)
            return
        cross = statistics.cross / statistics.rows - self._mean[:, :, None] * float_mean[:, None, :]
        float_own = statistics.float_gram / statistics.rows - float_mean[:, :, None] * float_mean[:, None, :]
        self._spread = energy(self._weight, float_own)
        self._mixed = self._weight @ (cross - self._own).transpose(0, 2, 1)
        self._moved = energy(self._weight, float_own - cross - cross.transpose(0, 2, 1) + self._own)
        if statistics.skip is not None:
            self._add_skip(statistics, statistics.skip, float_mean)

    def _add_skip(self, statistics: Statistics, skip: Skip, float_mean: np.ndarray) -> None:
        """With c: tr(d C d') + 2 tr(d ((X - C) W' + K)) + E|W (x_f - x_q) + c|^2, all centred."""
        own = skip_moment(statistics)
        floats = skip.float_cross / statistics.rows - float_mean[:, :, None] * skip.mean[:, None, :]
        assert self._mixed is not None, "a skip comes with the moments of both inputs"
        self._mixed = self._mixed + own.transpose(0, 2, 1)
        self._moved += 2 * float(np.einsum("god,gdo->", self._weight, floats - own))
        self._moved += skip.power / statistics.rows - float((skip.mean**2).sum())
        self._mean_output = self._mean_output + skip.mean.reshape(-1)

    def __call__(self, decoded: np.ndarray, bias: np.ndarray | None) -> float:
        """The error of a quantized layer: (outputs, D) and (outputs,) or None."""
        stored = by_group(decoded.astype(np.float64), len(self._mean))
        mean_error = self._mean_output - np.einsum("god,gd->go", stored, self._mean).reshape(-1)
        if bias is not None:
            mean_error = mean_error - bias
        difference = self._weight - stored
        deviation = energy(difference, self._own) + self._moved
        if self._mixed is not None:
            deviation += 2 * float(np.einsum("god,god->", difference, self._mixed))
        total = max(deviation, 0.0) + float(mean_error @ mean_error)
        if self._spread <= 0:
            return 0.0 if total == 0 else float("inf")
        return float(np.sqrt(total / self._spread))


def relative_error(
    weight: np.ndarray,
    bias: np.ndarray | None,
    decoded: np.ndarray,
    quantized_bias: np.ndarray | None,
    statistics: Statistics,
) -> float:
    """The ``OutputError`` of one quantized layer."""
    return OutputError(weight, bias, statistics)(decoded, quantized_bias)


def energy(rows: np.ndarray, matrix: np.ndarray) -> float:
    """sum over groups of tr(E C E'), in float64."""
    return float(np.einsum("god,god->", rows @ matrix, rows))
