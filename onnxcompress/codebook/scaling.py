"""Numbers as the file holds them: float16 factors of the output channels, float16 or int8 codewords.

A file comes with BatchNormalization folded into its weights, so that its output channels differ in size by orders of
magnitude while they share one codebook. A factor for each of them undoes that.
"""

from dataclasses import replace

import numpy as np

from onnxcompress.codebook.codebook import CodebookType
from onnxcompress.codebook.objective import Assignment
from onnxcompress.errors import QuantizationError

FLOAT16_MAX = 65504.0
VANISHING = 1e-2  # relative error of a rounded codebook from which on float16 is refused


def row_scales(target: np.ndarray) -> np.ndarray:
    """Root mean square of each row, over a power of two that makes the median about 1.

    Args:
        target: (groups, rows, D).

    Returns:
        (groups, rows) float32, rounded to float16; 0 for a row of zeros.
    """
    sizes = np.sqrt((target.astype(np.float64) ** 2).mean(axis=2))
    used = sizes[sizes > 0]
    if not len(used):
        return np.zeros(sizes.shape, np.float32)
    # Codewords keep a moderate size themselves: both they and the factors have to fit float16.
    unit = 2.0 ** float(np.clip(np.round(np.log2(np.median(used))), -8, 8))
    return round_scales((sizes / unit).astype(np.float32))


def round_scales(scales: np.ndarray) -> np.ndarray:
    """The nearest float16 values, as float32.

    Raises:
        QuantizationError: A factor is beyond float16.
    """
    largest = float(scales.max(initial=0))
    if largest > FLOAT16_MAX:
        raise QuantizationError(
            f"a channel factor of {largest:.3g} exceeds float16's {FLOAT16_MAX:.0f}; keep this layer"
        )
    return scales.astype(np.float16).astype(np.float32)


def store_codebook(codebook: np.ndarray, codebook_type: CodebookType) -> tuple[np.ndarray, np.ndarray | None]:
    """Round codewords to what the file holds.

    Args:
        codebook: (k, d) float32.
        codebook_type: "float16", or "int8" with a factor for each position.

    Returns:
        Codewords (k, d) of that type, and the factors (d,) float32 of int8 or None.

    Raises:
        QuantizationError: The codewords leave the range of float16.
    """
    if codebook_type == "int8":
        factors = np.abs(codebook).max(axis=0).astype(np.float32) / np.float32(127)
        factors = np.where(factors > 0, factors, np.float32(1)).astype(np.float32)
        return np.clip(np.rint(codebook / factors), -127, 127).astype(np.int8), factors
    largest = float(np.abs(codebook).max(initial=0))
    if largest > FLOAT16_MAX:
        raise QuantizationError(
            f"a codeword of {largest:.3g} exceeds float16's {FLOAT16_MAX:.0f}; use an int8 codebook"
        )
    stored = codebook.astype(np.float16)
    lost = float(np.linalg.norm(stored.astype(np.float64) - codebook))
    if lost > VANISHING * float(np.linalg.norm(codebook.astype(np.float64))):
        raise QuantizationError(
            f"codewords of at most {largest:.1e} vanish in float16; use an int8 codebook or channel factors"
        )
    return stored, None


def restored(codebook: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
    """(k, d) float32: the codewords as the file gives them back."""
    values = codebook.astype(np.float32)
    return values if factors is None else values * factors


def with_stored_values(
    assignment: Assignment, codebook_type: CodebookType
) -> tuple[Assignment, np.ndarray, np.ndarray | None]:
    """Round codewords and factors; give the assignment that uses the rounded values, the codebook and its factors."""
    codebook, factors = store_codebook(assignment.codebook, codebook_type)
    rounded = replace(assignment, codebook=restored(codebook, factors), scales=round_scales(assignment.scales))
    return rounded, codebook, factors
